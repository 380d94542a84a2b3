"""Default paths. No other module knows where the repository is."""

import sys
from pathlib import Path

from gpt_jax.config import DataConfig
from gpt_jax.errors import UserError
from gpt_jax.interchange.model_folder import is_exported
from gpt_jax.storage.run_folder import checkpoint_folder, has_checkpoint


def find_checkout(package: Path) -> Path | None:
    """The repository that the folder of the package `gpt_jax` belongs to; None where it was installed."""
    checkout = package.parent
    is_checkout = (checkout / "sample.py").is_file() and (checkout / "configs").is_dir()
    return checkout if is_checkout else None


CHECKOUT = find_checkout(Path(__file__).resolve().parent.parent)
ROOT = CHECKOUT or Path()  # default paths are relative to the repository, or else to the current folder
ARTIFACTS = ROOT / "artifacts"
PRETRAINED = ARTIFACTS / "pretrained"


def text_file(data: DataConfig) -> Path:
    """The text file of these settings, absolute: tiny Shakespeare where `data.path` is empty."""
    return Path(data.path).expanduser().absolute() if data.path else (ARTIFACTS / "input.txt").absolute()


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
        print(f"no runs in {ARTIFACTS}: using the shipped model, {PRETRAINED.name}/",
              file=sys.stderr)  # fmt: skip
        return PRETRAINED
    raise UserError(
        f"no trained run in {ARTIFACTS.absolute()}: train one with {command('train')} --config "
        f"{'configs/shakespeare_cpu.py' if CHECKOUT else 'FILE'}, or name one with --workdir"
    )


def relative_to_root(path: Path) -> Path:
    """A path as a person would write it: relative to the root where it lies below it."""
    path, root = path.absolute(), ROOT.absolute()
    return path.relative_to(root) if path.is_relative_to(root) else path


def command(name: str) -> str:
    """How to start train.py or sample.py: they are there in the repository only."""
    return f"python {name}.py" if CHECKOUT else f"python -m gpt_jax.{name}"
