"""Detect damage: checksums of all files in a folder, in the format of `sha256sum`, and shapes of arrays."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.files import sync, write_durably

CHECKSUMS = "SHA256SUMS"
MAX_CHECKSUMS = 2**24  # bytes; a larger file is not read


class DamagedError(UserError):
    """Files are damaged; the message names the first one."""


def seal(folder: Path) -> None:
    """Write a checksum of every file into `folder`, and flush all to the disk, files before their folders."""
    lines = "".join(f"{checksum(folder / name)}  {name}\n" for name in sorted(_files(folder)))
    write_durably(folder / CHECKSUMS, f"{lines}# {digest(lines)}\n")
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(path, name))
        sync(Path(path))


def verify(folder: Path) -> None:
    """Raise a `DamagedError` that names a file of a checkpoint that is missing, changed or unexpected."""
    try:
        if folder.is_symlink():
            raise DamagedError("a link, not a folder")
        found = set(_files(folder)) - {CHECKSUMS}  # before reading: opening a pipe would block
        if (folder / CHECKSUMS).stat().st_size > MAX_CHECKSUMS:
            raise DamagedError(f"{CHECKSUMS} is too large")
        lines, _, last = (folder / CHECKSUMS).read_text(encoding="utf-8").rpartition("# ")
        if last != digest(lines) + "\n":
            raise DamagedError(f"{CHECKSUMS} was changed")
        sums = {name: sha for sha, name in (line.split("  ", 1) for line in lines.splitlines())}
        for name in sorted(found | sums.keys()):
            if name not in found:
                raise DamagedError(f"{name} is missing")
            if name not in sums:
                raise DamagedError(f"{name} is not listed in {CHECKSUMS}")
            if checksum(folder / name) != sums[name]:
                raise DamagedError(f"{name} was changed")
    except (DamagedError, OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{error.filename or CHECKSUMS}: {error.strerror}"
        elif isinstance(error, ValueError):  # a line without two spaces, or not UTF-8
            reason = f"{CHECKSUMS}: {one_line(error)}"
        raise DamagedError(f"checkpoint {folder} is damaged: {reason}") from None


def _files(folder: Path) -> Iterator[str]:
    """The paths of the files below `folder`, relative to it. Links are an error."""
    for path, folders, files in os.walk(folder, onerror=_raise):
        for name in folders + files:
            mode = os.lstat(os.path.join(path, name)).st_mode
            relative = os.path.relpath(os.path.join(path, name), folder)
            if stat.S_ISREG(mode):
                yield relative
            elif not stat.S_ISDIR(mode):
                raise DamagedError(f"{relative} is neither a file nor a folder")


def _raise(error: OSError) -> None:
    raise error


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(text: str) -> str:
    """The SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def first_difference(there: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first array whose shape differs between the file and the model, with both; None: all fit."""
    for name in [*wanted, *sorted(there.keys() - wanted.keys())]:
        if there.get(name) != wanted.get(name):
            return (
                f"{name} has shape {there.get(name, 'none')} there, {wanted.get(name, 'none')} in the model"
            )
    return None


def one_line(error: BaseException) -> str:
    """The type of an error and its message, shortened, without line feeds."""
    text = " ".join(str(error).split())
    if len(text) > 400:  # such messages name the file at their beginning and the reason at their end
        text = f"{text[:200]} ... {text[-200:]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
