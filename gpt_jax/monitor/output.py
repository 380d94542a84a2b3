"""stdout and stderr of a command: they never fail, and a terminal shows control characters escaped."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

# Unicode's category Cc, without tab and line feed.
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def visible(text: str) -> str:
    """`text` with control characters, all but tab and line feed, as `\\x1b`: a terminal only shows them."""
    return text.translate(_ESCAPED)


class SteadyOutput(io.TextIOBase):
    """Text to a file descriptor, unbuffered. It is dropped once the reader has gone, or the disk is full.

    Control characters on a terminal, and characters that the encoding lacks, are escaped.
    """

    def __init__(self, stream: Any, is_raw: bool = False):
        # The same stream, which leaves control characters as they are.
        self.raw: SteadyOutput = self if is_raw else SteadyOutput(stream, is_raw=True)
        self._fd, self._encoding, self._open = stream.fileno(), stream.encoding, True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream that this one replaces."""
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What becomes of characters that the encoding lacks; `input` asks for it, for its prompt."""
        return "backslashreplace"

    def fileno(self) -> int:
        """The file descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Whether it can be written: always."""
        return True

    def write(self, text: str) -> int:
        """Write or drop all of `text`; raises nothing but KeyboardInterrupt."""
        shown = visible(text) if self.raw is not self and self.isatty() else text
        data = shown.encode(self._encoding, self.errors)
        while data and self._open:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # another process made the pipe or terminal non-blocking
                time.sleep(0.01)
            except OSError:
                self._open = False
        return len(text)


def raw(stream: Any) -> Any:
    """The stream for our own control sequences, such as those of a progress bar."""
    return stream.raw if isinstance(stream, SteadyOutput) else stream


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Make stdout and stderr `SteadyOutput`; a stream that was closed from the start goes to os.devnull."""
    former = (sys.stdout, sys.stderr)
    # A closed stdout would let the next opened file take descriptor 1, and everything printed go there.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    with open(os.devnull, "w", encoding="utf-8") as void:
        for stream in filter(None, former):
            with contextlib.suppress(OSError):
                stream.flush()
        streams: Any = [SteadyOutput(stream) if stream else void for stream in former]
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            sys.stdout, sys.stderr = former
