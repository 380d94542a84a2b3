"""Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) as requests to stop, not as ends."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; a second one acts as ever.

    Yields:
        A function that returns the signal that came, or None while none did.
    """
    received: list[signal.Signals] = []
    former: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        received.append(signal.Signals(number))
        restore()
        print("\nstopping: saving first", flush=True)

    def restore() -> None:
        for known, handler in former.items():
            signal.signal(known, handler)

    try:
        for wanted in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(wanted) != signal.SIG_IGN:  # as nohup, and a shell's &, have it
                former[wanted] = signal.signal(wanted, handle)
    except ValueError:  # not the main thread (a notebook's worker): signals go elsewhere
        pass
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()
