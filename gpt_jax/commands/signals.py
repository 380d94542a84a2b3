"""Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) as requests to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, TypeVar

from gpt_jax.training.loop import Stopped

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
POLL_SECONDS = 0.05
T = TypeVar("T")


class StopRequest:
    """Whether a stop was requested, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Of the signal; empty without one."""
        return self.signal.name if self.signal else ""

    @property
    def exit_status(self) -> int:
        """Of a process that a signal stopped: 128 + its number."""
        return 128 + self.signal if self.signal else 0

    def check(self) -> None:
        """Raise `Stopped` if a stop was requested."""
        if self:
            raise Stopped

    def during(self, function: Callable[[], T]) -> T:
        """Call something that cannot look for signals itself, such as a compilation.

        It runs in a thread. On a stop, the thread is abandoned and keeps running until the process exits.

        Raises:
            Stopped: a stop was requested before it returned.
        """
        self.check()
        results: list[T] = []
        errors: list[BaseException] = []
        done = Event()

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:  # raised again in the thread that waits
                errors.append(error)
            finally:
                done.set()

        Thread(target=run, daemon=True).start()
        while not done.wait(POLL_SECONDS):
            self.check()
        if errors:
            raise errors[0]
        return results[0]


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn the first such signal into a request to stop; a second one kills the process as usual."""
    request = StopRequest()
    former: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        request.signal = signal.Signals(number)
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
        yield request
    finally:
        restore()
