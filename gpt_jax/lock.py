"""One trainer at a time in a workdir."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_jax.errors import UserError


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make `workdir` where there is none, and hold it. The system lets go of it however a process ends.

    Raises:
        UserError: another process holds it (it is named), or nothing can be written there.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"workdir = {workdir} cannot be written ({error.strerror}): choose another with --workdir"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"workdir = {workdir} is in use by {file.read().strip() or 'another process'}: wait for it, "
                f"stop it, or choose another with --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {workdir} cannot be locked ({error.strerror}): let no other process train there")
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError as error:
            raise UserError(
                f"workdir = {workdir} cannot be written ({error.strerror}): choose another with --workdir"
            ) from None
        yield
