"""Default paths. No other module knows where the repository is."""

import os
from pathlib import Path

from gpt_jax.config import DataConfig

_folder = Path(__file__).resolve().parents[1]
_is_checkout = (_folder / "sample.py").is_file() and (_folder / "configs").is_dir()
CHECKOUT = _folder if _is_checkout else None  # the repository; None where the package was installed
ROOT = CHECKOUT or Path()  # default paths are relative to the repository, or else to the current folder
ARTIFACTS = ROOT / "artifacts"
PRETRAINED = ARTIFACTS / "pretrained"
# A config to name in errors. Config files are in the repository only.
EXAMPLE_CONFIG = "configs/shakespeare_cpu.py" if CHECKOUT else "FILE"


def expand(path: str | Path) -> Path:
    """A path with the home folder in place of ~; unlike `expanduser`, a user that there is not stays."""
    return Path(os.path.expanduser(path))


def text_file(data: DataConfig) -> Path:
    """The text file of these settings, absolute: tiny Shakespeare where `data.path` is empty."""
    return expand(data.path).absolute() if data.path else (ARTIFACTS / "input.txt").absolute()


def relative_to_root(path: Path) -> Path:
    """A short path for messages: relative to the root if it is inside it."""
    path, root = path.absolute(), ROOT.absolute()
    return path.relative_to(root) if path.is_relative_to(root) else path


def command(name: str) -> str:
    """How to start a command: train.py and sample.py are there in the repository only."""
    return f"python {name}.py" if CHECKOUT and name in ("train", "sample") else f"python -m gpt_jax {name}"
