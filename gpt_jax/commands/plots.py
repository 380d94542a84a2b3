"""The command plots."""

from collections.abc import Sequence
from pathlib import Path

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.newest_run import newest_run
from gpt_jax.errors import UserError
from gpt_jax.monitor.plots import AXES, plot_runs
from gpt_jax.paths import expand
from gpt_jax.storage.run_folder import read_history

PURPOSE = "Draw the losses, learning rate, gradient norm and speed of runs."
EXAMPLES = ("--workdir runs/a", "--workdir runs/a runs/b --x minutes --out compared.svg")
FORMATS = (".png", ".svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, draw, print."""
    parser = ArgumentParser("plots", PURPOSE, EXAMPLES)
    flag = parser.add_argument
    about = "runs, in one picture (newest in artifacts/)"
    flag("--workdir", type=Path, metavar="DIR", nargs="+", action="extend", help=about)
    flag("--x", choices=AXES, default="step", help="the horizontal axis (%(default)s)")
    out = "a .png or .svg file (plots.png and plots.svg in the first run)"
    flag("--out", type=Path, metavar="FILE", help=out)
    flags = parser.parse_args(arguments)
    workdirs = [expand(workdir) for workdir in flags.workdir or [newest_run()]]
    pictures = [expand(flags.out)] if flags.out else [workdirs[0] / f"plots{suffix}" for suffix in FORMATS]
    if pictures[0].suffix not in FORMATS:
        raise UserError(f"--out {flags.out} must end in .png or .svg")
    runs, folder = [read_history(workdir) for workdir in workdirs], pictures[0].absolute().parent
    if not folder.is_dir():
        raise UserError(f"--out {flags.out}: the folder {folder} does not exist: make it, or name another")
    plot_runs(runs, pictures, flags.x)
    print(f"written    {' '.join(str(picture) for picture in pictures)}")
    return 0
