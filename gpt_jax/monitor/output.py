"""stdout and stderr of a command: they never fail, and a terminal shows control characters escaped."""

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Unicode's category Cc, without tab and line feed.
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def visible(text: str) -> str:
    """`text` with control characters, all but tab and line feed, as `\\x1b`: a terminal only shows them."""
    return text.translate(_ESCAPED)


@dataclass
class Patience:
    """How long streams wait, once, for a reader who does not read.

    Attributes:
        seconds: None: as long as it takes. Ctrl-C while a stream waits sets it to 0.
    """

    seconds: float | None = None


class SteadyOutput(io.TextIOBase):
    """Text to a file descriptor, as it is; what cannot be encoded is escaped.

    What nobody reads within `patience` is dropped, and so is all text once the reader has gone.
    """

    def __init__(self, stream: io.TextIOWrapper, patience: Patience):
        self._fd = stream.fileno()
        self._writable = self._fd
        if stat.S_ISFIFO(os.fstat(self._fd).st_mode) or self.isatty():
            # A new descriptor can be non-blocking without changing that of other processes.
            with contextlib.suppress(OSError, AttributeError):  # other systems have no such names
                self._writable = os.open(
                    f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
                )
        self._encoding = stream.encoding
        self._patience = patience
        self._is_read = True  # False: the reader sleeps, so do not wait again until it reads
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
        """Write or drop all of `text`; raises nothing but KeyboardInterrupt."""
        data = text.encode(self._encoding, "backslashreplace")
        while data and self._open:
            try:
                self._is_read = self._is_ready()
                if not self._is_read:
                    break
                # A pipe that is ready takes this much (PIPE_BUF) without blocking.
                data = data[os.write(self._writable, data[:4096]) :]
            except BlockingIOError:
                continue
            except OSError:  # nobody reads any more, or the disk is full
                self._open = False
            except KeyboardInterrupt:
                self._patience.seconds = 0.0
                raise
        return len(text)

    def _is_ready(self) -> bool:
        seconds = self._patience.seconds if self._is_read else 0.0
        try:
            return bool(select.select([], [self._writable], [], seconds)[1])
        except (OSError, ValueError, AttributeError):  # Windows can only wait for sockets: just write
            return True


class VisibleOutput(SteadyOutput):
    """A `SteadyOutput` that shows control characters escaped where it is a terminal.

    Attributes:
        raw: the same stream, without escapes.
    """

    def __init__(self, stream: io.TextIOWrapper, patience: Patience):
        super().__init__(stream, patience)
        self.raw = SteadyOutput(stream, patience)

    def write(self, text: str) -> int:
        """As `SteadyOutput.write`."""
        super().write(visible(text) if self.isatty() else text)
        return len(text)


def raw(stream: Any) -> Any:
    """The stream for our own control sequences, such as those of a progress bar."""
    return stream.raw if isinstance(stream, VisibleOutput) else stream


@contextlib.contextmanager
def steady_output(patience: float | None = None) -> Iterator[None]:
    """Make stdout and stderr `VisibleOutput`; a stream that was closed from the start goes to os.devnull.

    Args:
        patience: seconds to wait for a reader who does not read, before text is dropped; None: no text is.
    """
    former = sys.stdout, sys.stderr
    shared = Patience(patience)
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
            return VisibleOutput(stream, shared)

        sys.stdout, sys.stderr = map(steady, former)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = former
