"""A run's folder: the names of its files, its metrics, and its lock: one process at a time trains there."""

import errno
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gpt_jax.errors import UserError
from gpt_jax.files import sync
from gpt_jax.records import RunHistory, read_metrics

CONFIG, FACTS, METRICS = "config.json", "run.json", "metrics.jsonl"
PLOT, SAMPLES, PROFILE = "loss.png", "samples.txt", "profile"
LOCK, HOLDER = "lock", "lock.holder"  # the second says who holds the lock
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of some network file systems


def checkpoint_folder(workdir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return workdir / "checkpoints"


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has at least one complete checkpoint."""
    folder = checkpoint_folder(workdir)
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())


def read_history(workdir: Path) -> RunHistory:
    """The metrics of a run, with what config.json and run.json say about them.

    Raises:
        UserError: the folder has no metrics, or no readable config.json.
    """
    records = read_metrics(workdir / METRICS)
    if not records:
        raise UserError(f"no numbers in {workdir / METRICS}: name the folder of a run that has been trained")
    try:
        config = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
        model, batch_size = config["model"], config["train"]["batch_size"]
        tokens_per_step = batch_size * model["context"]
        has_dropout = model["dropout"] > 0 or model["attention_dropout"] > 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{workdir / CONFIG} cannot be used ({what}): restore it, or train again") from None
    try:
        facts = json.loads((workdir / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # without it, only the baselines are missing
        facts = {}
    unit = "nats per character" if facts.get("tokenizer") == "char" else "nats per token"
    name = workdir.absolute().name
    return RunHistory(name, records, tokens_per_step, has_dropout, unit, facts.get("baselines", {}))


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make `workdir` if it does not exist, and lock it.

    The system unlocks it however the process ends. A `UserError` names the process that holds the lock, or
    says that nothing can be written there. Where a file system has no locks, there is only a warning.
    """
    lock, holder = FileLock(workdir / LOCK), workdir / HOLDER
    try:
        if not workdir.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            sync(workdir.absolute().parent)
        tempfile.TemporaryFile(dir=workdir).close()  # can anything be written?
        lock.acquire(timeout=0)
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        who = holder.read_text(encoding="utf-8", errors="replace")[:200].strip() if holder.is_file() else ""
        raise UserError(
            f"workdir = {workdir} is in use by {who or 'another process'}: wait for it, stop it, or choose "
            f"another with --workdir"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            lock.release()
            raise UserError(
                f"workdir = {workdir} cannot be written ({error.strerror}): choose another with --workdir"
            ) from None
        print(f"WARNING: {workdir} cannot be locked ({error}): let no other process train there")
    try:
        yield
    finally:
        with suppress(OSError):  # a failing disk must not hide the error that is on its way
            holder.unlink(missing_ok=True)
        lock.release()
