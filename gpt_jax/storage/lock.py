"""One trainer at a time in a run's folder."""

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gpt_jax.errors import UserError
from gpt_jax.files import sync
from gpt_jax.storage.run_folder import LOCK

HOLDER = "lock.holder"  # who holds the lock, for a person
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of some network file systems


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make `workdir` if it does not exist, and lock it.

    The system unlocks it however the process ends. Where a file system has no locks, there is only a warning.

    Raises:
        UserError: another process holds the lock (it is named), or nothing can be written there.
    """
    lock, holder = FileLock(workdir / LOCK), workdir / HOLDER
    try:
        if not workdir.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            sync(workdir.absolute().parent)
        tempfile.TemporaryFile(dir=workdir).close()  # can anything be written?
        _acquire(lock, holder, workdir)
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except OSError as error:
        lock.release()
        raise UserError(
            f"workdir = {workdir} cannot be written ({error.strerror}): choose another with --workdir"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # a failing disk must not hide the error that is on its way
            holder.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, holder: Path, workdir: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = "another process"
        if holder.is_file():
            who = holder.read_text(encoding="utf-8", errors="replace")[:200].strip() or who
        raise UserError(
            f"workdir = {workdir} is in use by {who}: wait for it, stop it, or choose another with --workdir"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        print(f"WARNING: {workdir} cannot be locked ({error}): let no other process train there")
