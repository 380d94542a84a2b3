"""The command export."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.newest_run import newest_run
from gpt_jax.interchange.exporting import export
from gpt_jax.interchange.model_folder import DTYPES, FILES, PARAMS
from gpt_jax.interchange.trained_model import load
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.paths import expand
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache

PURPOSE = "Export a trained model to a folder of a few megabytes, which is read like a run."
EXAMPLES = ("--workdir artifacts/smoke --out exported/smoke", "--out exported/small --dtype float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, export, print."""
    parser = ArgumentParser("export", PURPOSE, EXAMPLES)
    flag = parser.add_argument
    flag("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    flag("--workdir", type=Path, metavar="DIR", help="a run (newest in artifacts/)")
    flag("--which", choices=("best", "last"), default="best", help="checkpoint (%(default)s)")
    flag("--dtype", choices=tuple(DTYPES), default="float32", help="float16: half the size")
    flag("--text", type=Path, metavar="FILE", help="the text that it was trained on, if it has moved")
    flags = parser.parse_args(arguments)
    use_compilation_cache()
    workdir, out = flags.workdir or newest_run(), expand(flags.out)
    model = load(workdir, flags.which)
    with compiling_on_stderr("evaluation"):
        model.loss(np.zeros(2, np.int32))
    with LoadingBar(sys.stderr) as progress:
        exported = export(model, out, flags.dtype, flags.text, progress)
    before = model.metadata.val_loss
    print(f"run        {workdir}, {model.source}, step {model.step:,}")
    print(f"written    {out}/: {', '.join(FILES)}")
    print(f"size       {(out / PARAMS).stat().st_size / 1e6:.1f} MB, {flags.dtype}")
    print(
        f"loss       {exported.metadata.val_loss:.5f} nats per token as exported"
        + ("" if before is None else f", {before:.5f} when it was saved")
    )
    return 0
