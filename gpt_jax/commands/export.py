"""The command export."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.newest_run import newest_run
from gpt_jax.errors import UserError
from gpt_jax.interchange import families, model_folder
from gpt_jax.interchange.exporting import ELSEWHERE, export, export_elsewhere
from gpt_jax.interchange.model_folder import FILES, PARAMS
from gpt_jax.interchange.trained_model import load
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.paths import expand
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache

PURPOSE = "Export a trained model to a folder, for gpt_jax or for other programs."
EXAMPLES = (
    "--out exported/smoke --dtype float16",
    "--out exported/hf --format hf",
)
# What each format can store.
DTYPES_OF = {"gpt_jax": (*model_folder.DTYPES,), "hf": (*families.DTYPES,), "llama2c": ("float32",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, export, print."""
    parser = ArgumentParser("export", PURPOSE, EXAMPLES)
    flag = parser.add_argument
    flag("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    flag("--workdir", type=Path, metavar="DIR", help="a run (newest in artifacts/)")
    flag("--which", choices=("best", "last"), default="best", help="checkpoint (%(default)s)")
    formats = "hf: for transformers, vLLM, llama.cpp; llama2c: for llama2.c (%(default)s)"
    flag("--format", choices=("gpt_jax", *ELSEWHERE), default="gpt_jax", help=formats)
    flag(
        "--dtype",
        choices=DTYPES_OF["hf"],
        default="float32",
        help="others: half the size; bfloat16: with hf only",
    )
    flag("--text", type=Path, metavar="FILE", help="the text that it was trained on, if it has moved")
    flags = parser.parse_args(arguments)
    use_compilation_cache()
    workdir, out = flags.workdir or newest_run(), expand(flags.out)
    if flags.dtype not in DTYPES_OF[flags.format]:
        allowed = ", ".join(DTYPES_OF[flags.format])
        raise UserError(
            f"--dtype {flags.dtype} does not go with --format {flags.format}: choose from {allowed}"
        )
    if flags.text and flags.format != "gpt_jax":
        raise UserError(f"--text does not go with --format {flags.format}, which needs no text: leave it out")
    model = load(workdir, flags.which)
    if flags.format != "gpt_jax":
        files = export_elsewhere(model, out, flags.format, flags.dtype)
        size = sum((out / name).stat().st_size for name in files)
        print(f"run        {workdir}, {model.source}, step {model.step:,}")
        print(f"written    {out}/: {', '.join(files)}")
        print(f"size       {size / 1e6:.1f} MB, {flags.dtype}")
        return 0
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
