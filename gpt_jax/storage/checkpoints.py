"""Checkpoints, saved by Orbax, with checksums: named trees of arrays, and metadata.

Orbax stores the arrays in the background. This module adds what makes a checkpoint safe: a checksum of every
file, a rename to the final name only after everything is on the disk, and deletion of older checkpoints only
after that. Orbax's `CheckpointManager` (0.12.8) does not: saves that were killed after its rename had no
checksums (at 11 of 33 places), and where only the deletion of an old checkpoint fails, it reports the save
as failed.

Orbax 1.0 makes its v1 API the top level, and reads what this module writes. The move takes
`save_checkpointables_async`, `load_checkpointables`, and `checkpointables_metadata` for the shapes.
"""

import json
import logging
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from gpt_jax.errors import RunError, UserError
from gpt_jax.files import sync, write_durably
from gpt_jax.records import selection_key
from gpt_jax.storage import integrity
from gpt_jax.storage.integrity import CHECKSUMS, DamagedError, checksum, digest, one_line, seal
from gpt_jax.storage.metadata import FormatError, Metadata

T = TypeVar("T")
METADATA, AMENDED = "metadata.json", ".amended.json"
MAX_BYTES = 2**26  # a larger file of JSON is not read
NO_SPACE = "no space left"  # what the system says of a full disk, in lower case
TEMPORARY, DELETED, DAMAGED = ".unfinished", ".deleted", ".damaged"


class Checkpoints:
    """The checkpoints of one run: the last two, and the best by validation loss.

    A checkpoint is a folder named by its step, which holds a folder of arrays for each tree, `metadata.json`
    and checksums. It is written as `<step>.unfinished` in the background, and renamed when all of it is on
    the disk. `<step>.amended.json` beside it stores metadata that is added later. Only one process may save;
    others may read meanwhile.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()  # Orbax wants absolute paths
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = ThreadPoolExecutor(1)
        self._n_bytes = 0  # of the arrays of the newest checkpoint
        self._saving: Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order."""
        if not self.folder.is_dir():
            return []
        # A folder gets such a name only when it is complete; `verify` checks that it still is.
        names = (entry.name for entry in self.folder.iterdir())
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name))

    def best_first(self) -> list[int]:
        """The steps from the lowest validation loss to the highest, then those without one, newest first."""
        return sorted(self.steps(), key=self.selection_key)

    def selection_key(self, step: int) -> tuple[float, float]:
        """The place of a checkpoint in this order; without metadata it is one without a loss."""
        try:
            return selection_key(self.metadata(step), step)
        except DamagedError:
            return selection_key({}, step)

    def save(self, step: int, items: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Start to save trees of arrays by name; returns when the arrays may change again.

        A step that is saved is not saved again. The metadata are anything that JSON can hold, and decide
        by `selection_key` which checkpoint is the best. Raises `RunError` if this save cannot start, or if
        the one before it has failed.
        """
        self.wait()
        if step in self.steps():
            return
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        temporary = self.folder / f"{step}{TEMPORARY}"
        self._n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        with self._failure_named(step):
            self._orbax.save(temporary, args=ocp.args.Composite(**arrays))
        self._saving = self._background.submit(self._finish, step, temporary, json.dumps(metadata))

    def amend(self, step: int, values: dict[str, Any]) -> None:
        """Change some of the metadata in one step: neither a kill nor a reader finds half of a change.

        Raises `RunError` if it cannot be written, or if the save before has failed.
        """
        self.wait()
        folder = self.folder / str(step)
        with self._failure_named(step):
            values = _amendments(folder) | values
            digests = [checksum(folder / CHECKSUMS), digest(json.dumps(values))]
            write_durably(folder.with_name(folder.name + AMENDED), json.dumps([values, *digests]))

    def wait(self) -> None:
        """Wait until everything is on disk; raises `RunError` if the save under way has failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait for the save in progress, and release resources."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            with suppress(Exception):  # the same failure again, which `wait` has raised
                self._orbax.close()

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` and `amend` were given; raises `DamagedError` if it is gone or cannot be read."""
        path = self.folder / str(step) / METADATA
        try:
            metadata = json.loads(_read_small_file(path))
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedError(f"{path} cannot be read: {one_line(error)}") from None
        if not isinstance(metadata, dict):
            raise DamagedError(f"{path} is not the JSON of a checkpoint")
        return metadata | _amendments(path.parent)

    def verify(self, step: int) -> None:
        """Check every byte of a checkpoint; raises `DamagedError`."""
        integrity.verify(self.folder / str(step))

    def first_good(self, steps: Callable[[], list[int]], read: Callable[[int], T]) -> tuple[T, list[int]]:
        """Read the first checkpoint that is not damaged. Those before it are named on stderr, and returned.

        `steps` lists the steps in order of preference. It is called again after each failure, since a trainer
        may delete an old checkpoint at any time. `read` gets a step that is verified; a `DamagedError` or an
        `OSError` from it counts as damage too. Raises `RunError` where no checkpoint is left.
        """
        damaged: list[int] = []
        tried: set[int] = set()
        while untried := [step for step in steps() if step not in tried]:
            step = untried[0]
            tried.add(step)
            try:
                self.verify(step)
                return read(step), damaged
            except (DamagedError, OSError) as error:
                if step in self.steps():  # else it was deleted meanwhile
                    damaged.append(step)
                    print(f"WARNING: {error}. Trying an older one.", file=sys.stderr, flush=True)
        if not damaged:
            raise RunError(f"no checkpoint in {self.folder}: train a model first")
        raise RunError(
            f"all checkpoints in {self.folder} are damaged ({', '.join(map(str, damaged))}); nothing was "
            f"changed there. Restore a copy, or start another run with another --workdir"
        )

    def restore(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Read items back, in the types and shardings of a tree of `jax.ShapeDtypeStruct` for each.

        Raises `DamagedError` if they cannot be read, `UserError` if an array has another shape.
        """
        folder = self.folder / str(step)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        try:
            saved = {name: ocp.StandardCheckpointHandler().metadata(folder / name).tree for name in targets}
            if difference := integrity.first_difference(_shapes(saved), _shapes(targets)):
                raise UserError(f"checkpoint {folder} does not fit the model: {difference}")
            restored = self._orbax.restore(folder, args=ocp.args.Composite(**args))
        except UserError:
            raise
        except Exception as error:  # Orbax and its storage raise many types
            raise DamagedError(f"checkpoint {folder} cannot be read: {one_line(error)}") from None
        return {name: restored[name] for name in targets}

    def prepare(self) -> None:
        """Before saving, make the folder and remove what a kill left; `OSError` if it cannot be written."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync(self.folder.parent)
        for entry in self.folder.iterdir():
            amended = entry.with_name(entry.name.removesuffix(AMENDED))
            is_orphan = amended != entry and not amended.exists()
            if TEMPORARY in entry.name or entry.name.endswith((DELETED, ".tmp")) or is_orphan:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        tempfile.TemporaryFile(dir=self.folder, suffix=".tmp").close()  # can anything be written?

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, to keep it but not use it; returns its new path."""
        number = 1
        while (aside := self.folder / f"{step}{DAMAGED}{number}").exists():
            number += 1
        (self.folder / str(step)).rename(aside)
        sync(self.folder)
        return aside

    def _finish(self, step: int, temporary: Path, metadata: str) -> None:
        with self._failure_named(step):
            self._orbax.wait_until_finished()
            (temporary / METADATA).write_text(metadata, encoding="utf-8")
            seal(temporary)
            temporary.rename(self.folder / str(step))
            sync(self.folder)
        self._delete_old()

    def _delete_old(self) -> None:
        keep = {*self.steps()[-2:], self.best_first()[0]}
        for step in sorted(set(self.steps()) - keep):
            # Deleting takes many operations. Under this name a kill between them leaves no half checkpoint.
            # What cannot be deleted now is deleted at the next start; what cannot be read might be the best.
            with suppress(OSError, DamagedError):
                self.metadata(step)
                doomed = self.folder / f"{step}{DELETED}"
                (self.folder / str(step)).rename(doomed)
                (self.folder / f"{step}{AMENDED}").unlink(missing_ok=True)
                shutil.rmtree(doomed)

    @contextmanager
    def _failure_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the run must not continue as if it were saved
            for leftover in self.folder.glob(f"{step}{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)  # a full disk needs the room
            others = [other for other in self.steps() if other != step][-1:]
            kept = f"the one of step {others[0]:,} is kept" if others else "there is no earlier one"
            what = f"the checkpoint of step {step:,} could not be saved in {self.folder}"
            if NO_SPACE in str(error).lower():  # tensorstore says it in the middle of a long message
                size = f"{self._n_bytes / 1e6:,.1f} MB"
                raise RunError(f"{NO_SPACE} on device: {what}, which takes {size}; {kept}") from error
            raise RunError(f"{what}: {one_line(error)}; {kept}") from error


def read_metadata(checkpoints: Checkpoints, step: int) -> Metadata:
    """The metadata of a checkpoint; raises `DamagedError`, or `FormatError` for a version it cannot read."""
    where = f"checkpoint {checkpoints.folder / str(step)}: {METADATA}"
    stored = checkpoints.metadata(step)
    try:
        metadata = Metadata.from_dict(stored)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (UserError, RecursionError) as error:  # deeply nested JSON is a RecursionError
        raise DamagedError(f"{where}: {error}") from None
    if metadata.step != step:  # somebody renamed the folder
        raise DamagedError(f"{where}: it belongs to step {metadata.step}")
    return metadata


def hide_tracebacks_of_orbax() -> None:
    """Hide them in a command; this changes loggers and `sys.unraisablehook` of the whole process.

    When one write of a save fails, Orbax raises the error, and logs it with a traceback. It also abandons the
    other writes, and as these end, Python reports for each that its event loop is closed.
    """
    show = sys.unraisablehook
    sys.unraisablehook = lambda event: None if str(event.exc_value) == "Event loop is closed" else show(event)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """`{"a.b": shape}` of a tree's leaves, whatever kinds of nodes it has."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _amendments(folder: Path) -> dict[str, Any]:
    """What was written for this very checkpoint; nothing where that is damaged."""
    try:
        values, *digests = json.loads(_read_small_file(folder.with_name(folder.name + AMENDED)))
        is_good = digests == [checksum(folder / CHECKSUMS), digest(json.dumps(values))]
    except (OSError, ValueError, TypeError, RecursionError, DamagedError):
        return {}
    return values if is_good and isinstance(values, dict) else {}


def _read_small_file(path: Path) -> bytes:
    # Reading a pipe would wait forever, and a device may never end.
    if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > MAX_BYTES:
        raise DamagedError(f"{path} is not a file, or too large")
    return path.read_bytes()
