"""Output that cannot stop a program: a reader may leave, fall asleep, or never have been there."""

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import Any

PATIENCE = 5.0  # seconds that a reader who does not read is waited for, once


class SteadyOutput(io.TextIOBase):
    """Text to a file descriptor; what nobody takes is dropped, what cannot be encoded is spelled out."""

    def __init__(self, stream: io.TextIOWrapper):
        self._fd = stream.fileno()
        self._writable = self._fd
        if stat.S_ISFIFO(os.fstat(self._fd).st_mode) or self.isatty():
            # Opened anew, it can refuse to wait without changing what others have of the same stream.
            with contextlib.suppress(OSError):
                self._writable = os.open(
                    f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
                )
        self._encoding = stream.encoding
        self._patience = PATIENCE
        self._open = True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream that this one stands for."""
        return self._encoding

    def fileno(self) -> int:
        """The file descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether a person looks on."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """True, whoever reads."""
        return True

    def write(self, text: str) -> int:
        """Write, or drop, all of `text`; never raises, and waits for `PATIENCE` at most."""
        data = text.encode(self._encoding, "backslashreplace")
        while data and self._open:
            try:
                # A pipe that is ready takes this much (PIPE_BUF) without blocking.
                if not select.select([], [self._writable], [], self._patience)[1]:
                    self._patience = 0.0  # until it is read from again, no more waiting
                    break
                self._patience = PATIENCE
                data = data[os.write(self._writable, data[:4096]) :]
            except BlockingIOError:
                continue
            except OSError:  # nobody reads any more, or the disk behind it is full
                self._open = False
        return len(text)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Make stdout and stderr `SteadyOutput`, and a stream that was closed from the start a void."""
    former = sys.stdout, sys.stderr
    # Were they left closed, the next files opened would take their numbers, and all that is said there.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    with open(os.devnull, "w", encoding="utf-8") as void:

        def steady(stream: Any) -> Any:
            if stream is None:
                return void
            with contextlib.suppress(OSError):
                stream.flush()
            return SteadyOutput(stream)

        sys.stdout, sys.stderr = map(steady, former)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = former
