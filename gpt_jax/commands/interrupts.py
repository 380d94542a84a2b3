"""Ctrl-C while text is generated."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_kept() -> Iterator[Callable[[], None]]:
    """Yield a function to call now and then: it raises the KeyboardInterrupt of an earlier Ctrl-C.

    Python raises it wherever the process is. That can be a callback, of the garbage collector for example,
    whose exceptions are ignored; without this function such a Ctrl-C would do nothing.
    """
    was_interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        signal.default_int_handler(number, frame)

    def check() -> None:
        if was_interrupted:
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check  # SIGINT is ignored, or somebody else's
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
