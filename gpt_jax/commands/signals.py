"""Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) as requests to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


@contextmanager
def stop_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """Turn the first such signal into a request to stop; a second one kills the process as usual.

    Yields:
        A function that returns the signal that came, or None.
    """
    received: list[signal.Signals] = []
    former: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        received.append(signal.Signals(number))
        restore()
        print("\nstopping: saving a checkpoint", flush=True)

    def restore() -> None:
        for known, handler in former.items():
            signal.signal(known, handler)

    try:
        for name in NAMES:
            wanted = getattr(signal, name, None)
            # nohup, and a shell's &, ignore some of them.
            if wanted is not None and signal.getsignal(wanted) != signal.SIG_IGN:
                former[wanted] = signal.signal(wanted, handle)
    except ValueError:  # not in the main thread (a notebook's worker): it gets no signals
        pass
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()
