"""Checkpoints, saved by Orbax, with checksums. Knows no model, only named trees of arrays.

Orbax stores the arrays, in the background, and moves them between machines. This module adds what makes a
checkpoint safe: a checksum of every file, a rename to the final name only after everything is on the disk,
and deletion of older checkpoints only after that.
"""

import json
import logging
import math
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from gpt_jax.errors import RunError, UserError
from gpt_jax.files import sync, write_durably
from gpt_jax.storage.format import FormatError
from gpt_jax.storage.integrity import CHECKSUMS, DamagedError, checksum, seal, verify
from gpt_jax.storage.metadata import Metadata

METADATA = "metadata.json"
METADATA_BYTES = 2**26  # a larger file is not read
T = TypeVar("T")
UNFINISHED, DELETED, DAMAGED, AMENDED = ".unfinished", ".deleted", ".damaged", ".amended.json"


class Checkpoints:
    """The checkpoints of one run: the last two, and the best by validation loss.

    A checkpoint is a folder named by its step, which holds a folder of arrays for each tree, `metadata.json`
    and checksums. It is written as `<step>.unfinished` in the background, and renamed when all of it is on
    the disk. `<step>.amended.json` beside it stores metadata that is added later. Only one process may save;
    others may read meanwhile.
    """

    def __init__(self, folder: Path):
        """Checkpoints in `folder`, which need not exist before the first save."""
        self.folder = folder.absolute()  # Orbax wants absolute paths
        with _quiet_orbax():
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order."""
        if not self.folder.is_dir():
            return []
        # A folder gets such a name only when it is complete; `verify` checks that it still is.
        return sorted(int(entry.name) for entry in self.folder.iterdir() if _is_step(entry.name))

    def best_first(self) -> list[int]:
        """The steps that have a checkpoint, from the lowest validation loss to the highest.

        Those without a loss, or whose loss is NaN, come last, the newest of them first.
        """
        return sorted(self.steps(), key=lambda step: (self.deciding_loss(step), -step))

    def save(self, step: int, items: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Start to save; returns when the arrays may change again. A step that is saved is not saved again.

        Args:
            step: updates done.
            items: trees of arrays by name.
            metadata: anything that JSON can hold; its "val_loss_part", or else its "val_loss", decides which
                checkpoint is the best; None excludes this one.

        Raises:
            RunError: this save cannot start, or the one before it has failed.
        """
        self.wait()
        if step in self.steps():
            return
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        unfinished = self.folder / f"{step}{UNFINISHED}"
        with ExitStack() as quiet:
            quiet.enter_context(_quiet_orbax())
            with self._failure_named(step):
                self._make_folder()
                self._orbax.save(unfinished, args=ocp.args.Composite(**arrays))
            until_saved = quiet.pop_all()
        self._saving = self._background.submit(
            self._finish, step, unfinished, json.dumps(metadata), until_saved
        )

    def amend(self, step: int, values: dict[str, Any]) -> None:
        """Change some of the metadata of a checkpoint.

        They go to a file of their own, in one step, so that a kill or a reader never finds half of a change.

        Raises:
            RunError: it cannot be written.
        """
        self.wait()
        with self._failure_named(step):
            values = self._amendments(step) | values
            of = checksum(self.folder / str(step) / CHECKSUMS)
            text = json.dumps([values, of, _digest(values)])
            write_durably(self.folder / f"{step}{AMENDED}", text)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            RunError: the save under way has failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait for the save in progress, and release resources."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            with suppress(Exception), _quiet_orbax():  # the same failure again, which `wait` has raised
                self._orbax.close()

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given as metadata, with the changes by `amend`.

        Raises:
            DamagedError: it is gone or cannot be read.
        """
        path = self.folder / str(step) / METADATA
        try:
            metadata = json.loads(_read_small_file(path))
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedError(f"{path}: {_one_line(error)}") from None
        if not isinstance(metadata, dict):
            raise DamagedError(f"{path} is not the JSON of a checkpoint")
        return metadata | self._amendments(step)

    def verify(self, step: int) -> None:
        """Check every byte of a checkpoint.

        Raises:
            DamagedError: a file is missing, changed or unexpected; it is named.
        """
        folder = self.folder / str(step)
        try:
            if folder.is_symlink():
                raise DamagedError("a link, not a folder")
            verify(folder)
        except DamagedError as error:
            raise DamagedError(f"checkpoint {folder} is damaged: {error}") from None

    def first_good(self, steps: Callable[[], list[int]], read: Callable[[int], T]) -> tuple[T, list[int]]:
        """Read the first checkpoint that is not damaged; warn about the damaged ones before it.

        Args:
            steps: the steps in order of preference; called again after each failure, since a training process
                may delete an old checkpoint at any time.
            read: reads a verified checkpoint; a `DamagedError` from it counts as damage too.

        Returns:
            What `read` returned, and the steps that are damaged.

        Raises:
            RunError: all are damaged, or there is none.
        """
        damaged: dict[int, DamagedError] = {}
        gone: set[int] = set()
        while untried := [step for step in steps() if step not in damaged.keys() | gone]:
            step = untried[0]
            try:
                self.verify(step)
                return read(step), list(damaged)
            except DamagedError as error:
                if step not in self.steps():
                    gone.add(step)
                    continue
                damaged[step] = error
                print(f"WARNING: {error}. Trying an older one.", file=sys.stderr, flush=True)
        if not damaged:
            raise RunError(f"no checkpoint in {self.folder}: train a model first")
        raise RunError(
            f"all checkpoints in {self.folder} are damaged ({', '.join(map(str, damaged))}); nothing was "
            f"changed there. Restore a copy, or start another run with another --workdir"
        )

    def restore(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Read items back.

        Args:
            step: which checkpoint.
            targets: for each item a tree of `jax.ShapeDtypeStruct`; arrays come back in its shapes,
                types and shardings, whatever shardings they were saved with.

        Raises:
            DamagedError: it cannot be read.
            UserError: an array has another shape than its target.
        """
        folder = self.folder / str(step)
        for name, target in targets.items():
            self._check_shapes(folder, name, target)
        arrays = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        restored = _read(folder, lambda: self._orbax.restore(folder, args=ocp.args.Composite(**arrays)))
        return {name: restored[name] for name in targets}

    def disk_size(self, step: int, item: str) -> int:
        """Bytes that an item takes.

        Raises:
            DamagedError: it is gone.
        """
        folder = self.folder / str(step) / item
        try:
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        except OSError as error:
            raise DamagedError(f"{folder}: {_one_line(error)}") from None

    def prepare(self) -> None:
        """Make the folder, check that it can be written, remove what a kill left. Only for saving.

        Raises:
            OSError: it cannot be written.
        """
        self._make_folder()
        for entry in self.folder.iterdir():
            is_orphan = (
                entry.name.endswith(AMENDED) and not (self.folder / entry.name.removesuffix(AMENDED)).exists()
            )
            if UNFINISHED in entry.name or entry.name.endswith((DELETED, ".tmp")) or is_orphan:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        probe = self.folder / f"probe{UNFINISHED}"
        probe.touch()
        probe.unlink()

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, to keep it but not use it; returns its new path."""
        number = 1
        while (aside := self.folder / f"{step}{DAMAGED}{number}").exists():
            number += 1
        (self.folder / str(step)).rename(aside)
        sync(self.folder)
        return aside

    def _make_folder(self) -> None:
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync(self.folder.parent)

    def _finish(self, step: int, unfinished: Path, metadata: str, quiet: ExitStack) -> None:
        with quiet, self._failure_named(step):
            self._orbax.wait_until_finished()
            (unfinished / METADATA).write_text(metadata, encoding="utf-8")
            seal(unfinished)
            unfinished.rename(self.folder / str(step))
            sync(self.folder)
        self._delete_old()

    def _delete_old(self) -> None:
        keep = {*self.steps()[-2:], self.best_first()[0]}
        for step in self.steps():
            if step not in keep and self._is_readable(step):  # it might be the best
                # Deleting takes many operations. Under this name a kill between them leaves no half
                # checkpoint. What cannot be deleted now is deleted at the next start.
                doomed = self.folder / f"{step}{DELETED}"
                with suppress(OSError):
                    (self.folder / str(step)).rename(doomed)
                    (self.folder / f"{step}{AMENDED}").unlink(missing_ok=True)
                    shutil.rmtree(doomed)

    def _is_readable(self, step: int) -> bool:
        try:
            self.metadata(step)
        except DamagedError:
            return False
        return True

    def deciding_loss(self, step: int) -> float:
        """The loss that decides which checkpoint is the best; infinite where there is none."""
        try:
            metadata = self.metadata(step)
        except DamagedError:
            return math.inf
        loss = metadata.get("val_loss_part", None)
        loss = metadata.get("val_loss") if loss is None else loss
        return loss if type(loss) is float and math.isfinite(loss) else math.inf

    def _amendments(self, step: int) -> dict[str, Any]:
        """What `amend` has written for this very checkpoint; nothing where that is damaged."""
        try:
            values, of, digest = json.loads(_read_small_file(self.folder / f"{step}{AMENDED}"))
            is_good = of == checksum(self.folder / str(step) / CHECKSUMS) and digest == _digest(values)
        except (OSError, ValueError, TypeError, RecursionError, DamagedError):
            return {}
        return values if is_good and isinstance(values, dict) else {}

    def _check_shapes(self, folder: Path, name: str, target: Any) -> None:
        saved = _read(folder, lambda: ocp.StandardCheckpointHandler().metadata(folder / name).tree)
        shapes, wanted = _shapes(saved), _shapes(target)
        for leaf in [*wanted, *(shapes.keys() - wanted.keys())]:
            if shapes.get(leaf) != wanted.get(leaf):
                raise UserError(
                    f"checkpoint {folder} does not fit the model: {name}.{leaf} has shape "
                    f"{shapes.get(leaf, 'none')} there, {wanted.get(leaf, 'none')} in the model"
                )

    @contextmanager
    def _failure_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the run must not continue as if it were saved
            for leftover in self.folder.glob(f"{step}{UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)  # a full disk needs the room
            kept = [other for other in self.steps() if other != step][-1:]
            raise RunError(
                f"the checkpoint of step {step:,} could not be saved in {self.folder}: {_one_line(error)}; "
                + (f"the one of step {kept[0]:,} is kept" if kept else "there is no earlier one")
            ) from error


def read_metadata(checkpoints: Checkpoints, step: int) -> Metadata:
    """The metadata of the checkpoint of `step`.

    Raises:
        DamagedError: it is inconsistent.
        FormatError: it is of another version, which this one cannot read.
    """
    where = f"checkpoint {checkpoints.folder / str(step)}: {METADATA}"
    try:
        metadata = Metadata.from_dict(checkpoints.metadata(step))
    except DamagedError:
        raise
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (UserError, RecursionError) as error:  # deeply nested JSON is a RecursionError
        raise DamagedError(f"{where}: {error}") from None
    if metadata.step != step:  # somebody renamed the folder
        raise DamagedError(f"{where}: it belongs to step {metadata.step}")
    return metadata


def _read_small_file(path: Path) -> bytes:
    # Reading a pipe would wait forever, and a device may never end.
    if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > METADATA_BYTES:
        raise DamagedError(f"{path} is not a file, or too large")
    return path.read_bytes()


def _digest(values: Any) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()


def _read(folder: Path, function: Callable[[], T]) -> T:
    """Let Orbax read something; any exception from it is damage of the checkpoint in `folder`."""
    try:
        with _quiet_orbax():
            return function()
    except Exception as error:  # Orbax and its storage raise many types
        raise DamagedError(f"checkpoint {folder} cannot be read: {_one_line(error)}") from None


class _Quiet:
    """Hides warnings and errors in Orbax's log, and what Python says of tasks that Orbax abandoned."""

    def __init__(self) -> None:
        self.users = 0
        self.lock = Lock()
        self.hook: Callable[[Any], None] = sys.unraisablehook

    def start(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.hook, sys.unraisablehook = sys.unraisablehook, self.show_others
                for name in ("absl", "asyncio"):
                    logging.getLogger(name).addFilter(self.is_minor)

    def stop(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                sys.unraisablehook = self.hook
                for name in ("absl", "asyncio"):
                    logging.getLogger(name).removeFilter(self.is_minor)

    @staticmethod
    def is_minor(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    def show_others(self, event: Any) -> None:
        code = getattr(event.object, "cr_code", None)
        is_orbax = code is not None and "orbax" in code.co_filename
        if not is_orbax and str(event.exc_value) != "Event loop is closed":
            self.hook(event)


_QUIET = _Quiet()


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Use Orbax without its log; what matters, it also raises.

    After an error it stays quiet: the threads and tasks that Orbax leaves behind go on logging.
    """
    _QUIET.start()
    yield
    _QUIET.stop()


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name[:18]))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """`{"a.b": shape}` of a tree's leaves, whatever kinds of nodes it has."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > 400:  # such messages name the file at their beginning and the reason at their end
        text = f"{text[:200]} ... {text[-200:]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
