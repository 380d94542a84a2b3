"""The run that a command uses where none is named."""

import sys
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.interchange.model_folder import is_exported
from gpt_jax.paths import ARTIFACTS, EXAMPLE_CONFIG, PRETRAINED, command
from gpt_jax.storage.run_folder import checkpoint_folder, has_checkpoint


def newest_run() -> Path:
    """The folder in `artifacts/` whose checkpoints changed last.

    If there is none, as in a fresh clone, the shipped model; a note on stderr says so.

    Raises:
        UserError: there is neither a run nor the shipped model.
    """
    runs = [folder for folder in ARTIFACTS.iterdir() if has_checkpoint(folder)] if ARTIFACTS.is_dir() else []
    if runs:
        return max(runs, key=lambda folder: checkpoint_folder(folder).stat().st_mtime)
    if is_exported(PRETRAINED):
        print(f"no runs in {ARTIFACTS}: using the shipped model, {PRETRAINED.name}/", file=sys.stderr)
        return PRETRAINED
    raise UserError(
        f"no trained run in {ARTIFACTS.absolute()}: train one with {command('train')} --config "
        f"{EXAMPLE_CONFIG}, or name one with --workdir"
    )
