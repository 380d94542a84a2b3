"""stdout and stderr that never fail, and never block for long, even if nobody reads them."""

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import Any

PATIENCE = 5.0  # seconds to wait for a reader who does not read, once


class SteadyOutput(io.TextIOBase):
    """Text to a file descriptor. What nobody reads is dropped; what cannot be encoded is escaped."""

    def __init__(self, stream: io.TextIOWrapper):
        self._fd = stream.fileno()
        self._writable = self._fd
        if stat.S_ISFIFO(os.fstat(self._fd).st_mode) or self.isatty():
            # A new descriptor can be non-blocking without changing that of other processes.
            with contextlib.suppress(OSError, AttributeError):  # other systems have no such names
                self._writable = os.open(
                    f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
                )
        self._encoding = stream.encoding
        self._patience = PATIENCE
        self._open = True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream that this one replaces."""
        return self._encoding

    def fileno(self) -> int:
        """The file descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Write or drop all of `text`; never raises, and waits for `PATIENCE` at most."""
        data = text.encode(self._encoding, "backslashreplace")
        while data and self._open:
            try:
                if not self._is_ready():
                    self._patience = 0.0  # do not wait again until something is read
                    break
                self._patience = PATIENCE
                # A pipe that is ready takes this much (PIPE_BUF) without blocking.
                data = data[os.write(self._writable, data[:4096]) :]
            except BlockingIOError:
                continue
            except OSError:  # nobody reads any more, or the disk is full
                self._open = False
        return len(text)

    def _is_ready(self) -> bool:
        try:
            return bool(select.select([], [self._writable], [], self._patience)[1])
        except (OSError, ValueError, AttributeError):  # Windows can only wait for sockets: just write
            return True


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Make stdout and stderr `SteadyOutput`; a stream that was closed from the start goes to os.devnull."""
    former = sys.stdout, sys.stderr
    # A closed stdout would let the next opened file take descriptor 1, and everything printed go there.
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
