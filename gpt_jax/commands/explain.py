"""The command explain."""

from collections.abc import Sequence
from pathlib import Path

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.newest_run import newest_run
from gpt_jax.errors import UserError
from gpt_jax.files import write_durably
from gpt_jax.interchange.trained_model import load
from gpt_jax.paths import ARTIFACTS, expand
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache

PURPOSE = "Show what a trained model makes of a text: surprise, guesses, attention, layers."
EXAMPLES = ('--text "ROMEO: But, soft!"', '--workdir runs/a --text "To be" --out to_be.html')


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, explain, print."""
    parser = ArgumentParser("explain", PURPOSE, EXAMPLES)
    flag = parser.add_argument
    flag("--text", required=True, help="a text, no longer than the context")
    flag("--workdir", type=Path, metavar="DIR", help="a run or an exported model (newest in artifacts/)")
    flag("--which", choices=("best", "last"), default="best", help="checkpoint (%(default)s)")
    out = "a .png or .html file (artifacts/explanation.png and .html)"
    flag("--out", type=Path, metavar="FILE", help=out)
    flags = parser.parse_args(arguments)
    pictures = [ARTIFACTS / f"explanation{suffix}" for suffix in (".png", ".html")]
    files = [expand(flags.out)] if flags.out else pictures
    if files[0].suffix not in (".png", ".html"):
        raise UserError(f"--out {flags.out} must end in .png or .html")
    use_compilation_cache()
    workdir = flags.workdir or newest_run()
    model = load(workdir, flags.which)
    with compiling_on_stderr("explanation"):
        explanation = model.explain(flags.text)
    for file in files:
        if file.suffix == ".png":
            explanation.save(file)
        else:
            write_durably(file, explanation.to_html())
    print(f"run        {workdir}, {model.source}, step {model.step:,}")
    print(f"written    {' '.join(str(file) for file in files)}")
    return 0
