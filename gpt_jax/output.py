"""Output that cannot stop a program: a reader may leave, fall asleep, or never have been there."""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

PATIENCE = 5.0  # seconds that a reader who does not read is waited for, once


class SteadyOutput(io.TextIOBase):
    """Text to a file descriptor; what nobody takes is dropped, what cannot be encoded is spelled out."""

    def __init__(self, stream: io.TextIOWrapper):
        self._fd = stream.fileno()
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
                if not select.select([], [self._fd], [], self._patience)[1]:
                    self._patience = 0.0  # until it is read from again, no more waiting
                    break
                self._patience = PATIENCE
                data = data[os.write(self._fd, data[:4096]) :]
            except OSError:  # nobody reads any more, or the disk behind it is full
                self._open = False
        return len(text)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Make stdout and stderr `SteadyOutput`, and a stream that was closed from the start a void."""
    former = sys.stdout, sys.stderr
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
