"""Checksums of all files in a folder, to notice damage.

`sha256sum -c SHA256SUMS` checks them too.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.files import sync, write_durably

CHECKSUMS = "SHA256SUMS"
MAX_CHECKSUMS = 2**24  # bytes; a larger file is not read


class DamagedError(UserError):
    """Files are damaged; the message names the first one."""


def seal(folder: Path) -> None:
    """Write a checksum of every file in `folder` into it, and flush all of it to the disk.

    Then the folder can be renamed to its final name: files are flushed before the folders that hold them.
    """
    lines = "".join(f"{checksum(folder / name)}  {name}\n" for name in sorted(_files(folder)))
    write_durably(folder / CHECKSUMS, f"{lines}# {_digest(lines.encode())}\n")
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(path, name))
        sync(Path(path))


def verify(folder: Path) -> None:
    """Check every file of a sealed folder, before anything in it is used.

    Raises:
        DamagedError: a file is missing, changed or unexpected.
    """
    try:
        found = set(_files(folder)) - {CHECKSUMS}  # before reading: opening a pipe would block
        if (folder / CHECKSUMS).stat().st_size > MAX_CHECKSUMS:
            raise DamagedError(f"{CHECKSUMS} is too large")
        lines, _, last = (folder / CHECKSUMS).read_text(encoding="utf-8").rpartition("# ")
        if last != _digest(lines.encode()) + "\n":
            raise DamagedError(f"{CHECKSUMS} was changed")
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines.splitlines())}
        for name in sorted(found | sums.keys()):
            if name not in found:
                raise DamagedError(f"{name} is missing")
            if name not in sums:
                raise DamagedError(f"{name} is not listed in {CHECKSUMS}")
            if checksum(folder / name) != sums[name]:
                raise DamagedError(f"{name} was changed")
    except (OSError, ValueError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, ValueError) else error.strerror
        raise DamagedError(f"{getattr(error, 'filename', None) or CHECKSUMS}: {what}") from None


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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
