"""Writing files so that neither a kill nor a power cut leaves half of one."""

import errno
import os
from pathlib import Path

OPENS_FOLDERS = hasattr(os, "O_DIRECTORY")  # Windows cannot, and flushes only files that are open for writing


def write_durably(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, a kill or a power cut finds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, where the system can do that."""
    if not OPENS_FOLDERS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if OPENS_FOLDERS else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
