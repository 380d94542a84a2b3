"""Whether files are what they were: checksums over a folder, and writing that a power cut cannot undo."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.errors import UserError

CHECKSUMS = "SHA256SUMS"  # in the format of the tool of this name: `sha256sum -c SHA256SUMS` checks it too

MOST_CHECKSUMS = 2**24  # bytes; more is not read


class DamagedError(UserError):
    """Files that are not what they were; the message names the first one."""


def seal(folder: Path) -> None:
    """Write a checksum of every file in `folder` into it, and force all of it onto the disk.

    What `seal` has returned from can be moved to its place by a rename: files are durable before the
    folders that name them.
    """
    lines = "".join(f"{checksum(folder / name)}  {name}\n" for name in sorted(_files(folder)))
    write_durably(folder / CHECKSUMS, f"{lines}# {_digest(lines.encode())}\n")
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(path, name))
        sync(Path(path))


def verify(folder: Path) -> None:
    """Check every file of a sealed folder. Nothing that a file says is believed before that.

    Raises:
        DamagedError: a file is missing, changed, or too many.
    """
    try:
        found = set(_files(folder)) - {CHECKSUMS}  # first: a pipe would be waited for
        if (folder / CHECKSUMS).stat().st_size > MOST_CHECKSUMS:
            raise DamagedError(f"{CHECKSUMS} is too large")
        lines, _, last = (folder / CHECKSUMS).read_text(encoding="utf-8").rpartition("# ")
        if last != _digest(lines.encode()) + "\n":
            raise DamagedError(f"{CHECKSUMS} was changed")
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines.splitlines())}
        for name in sorted(found | sums.keys()):
            if name not in found:
                raise DamagedError(f"{name} is missing")
            if name not in sums:
                raise DamagedError(f"{name} does not belong there")
            if checksum(folder / name) != sums[name]:
                raise DamagedError(f"{name} was changed")
    except (OSError, ValueError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, ValueError) else error.strerror
        raise DamagedError(f"{getattr(error, 'filename', None) or CHECKSUMS}: {what}") from None


def write_durably(path: Path, text: str) -> None:
    """Write a file so that a reader, a kill or a power cut finds the old one or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk, where the file system can do such a thing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[str]:
    """The names of the files below `folder`, from there. Links are not followed, nor borne."""
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
