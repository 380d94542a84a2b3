"""One trainer at a time in a workdir."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.integrity import sync


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make `workdir` where there is none, and hold it. The system lets go of it however a process ends.

    Raises:
        UserError: another process holds it (it is named), or nothing can be written there.
    """
    try:
        if not workdir.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            sync(workdir.absolute().parent)
        file = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(workdir, error) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode("utf-8", "replace").strip() or "another process"
            raise UserError(
                f"workdir = {workdir} is in use by {holder}: wait for it, stop it, or choose another with "
                f"--workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {workdir} cannot be locked ({error.strerror}): let no other process train there")
        try:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise _unwritable(workdir, error) from None
        yield
    finally:
        os.close(file)


def _unwritable(workdir: Path, error: OSError) -> UserError:
    return UserError(
        f"workdir = {workdir} cannot be written ({error.strerror}): choose another with --workdir"
    )
