"""The names of the files in a run's folder."""

from pathlib import Path

CONFIG, FACTS, METRICS = "config.json", "run.json", "metrics.jsonl"
PLOT, SAMPLES, LOCK = "loss.png", "samples.txt", "lock"


def checkpoint_folder(workdir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return workdir / "checkpoints"


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has at least one complete checkpoint."""
    folder = checkpoint_folder(workdir)
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())
