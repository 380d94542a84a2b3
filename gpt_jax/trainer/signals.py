"""Requests to stop: Ctrl-C, SIGTERM, SIGHUP (the terminal was closed), and `Trainer.stop`."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

from gpt_jax.jax_settings import default_jax_settings
from gpt_jax.training.loop import Stopped

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
POLL_SECONDS = 0.05
T = TypeVar("T")


class StopRequest:
    """Whether a stop was requested, and by what.

    Attributes:
        name: the name of the signal, or "stop()"; empty as long as there is no request.
        signal: None where it was not a signal.
    """

    def __init__(self) -> None:
        self.name = ""
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return bool(self.name)

    @property
    def exit_status(self) -> int:
        """The exit status of a process that a signal stopped, 128 + its number; else 0."""
        return 128 + self.signal if self.signal else 0

    def request(self, cause: signal.Signals | None = None) -> None:
        """Request a stop, because of a signal or of a call. The first cause counts."""
        if not self:
            self.signal, self.name = cause, cause.name if cause else "stop()"

    def check(self) -> None:
        """Raise `Stopped` if a stop was requested."""
        if self:
            raise Stopped

    def during(self, function: Callable[[], T]) -> T:
        """Call something that cannot look for requests itself, such as a compilation.

        It runs in a thread. On a stop, the thread is abandoned and keeps running until the process exits.

        Raises:
            Stopped: a stop was requested before it returned.
        """
        self.check()
        future: Future[T] = Future()

        def run() -> None:
            try:
                with default_jax_settings():
                    future.set_result(function())
            except BaseException as error:  # raised again in the thread that waits
                future.set_exception(error)

        Thread(target=run, daemon=True).start()
        while not wait([future], POLL_SECONDS).done:
            self.check()
        return future.result()


@contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a stop request; a second one kills the process as usual.

    Only the main thread of a process gets signals: elsewhere nothing is changed.
    """
    former: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        stop.request(signal.Signals(number))
        restore()
        print("\nstopping: saving a checkpoint", flush=True)

    def restore() -> None:
        for known, handler in former.items():
            signal.signal(known, handler)

    if threading.current_thread() is threading.main_thread():
        for name in NAMES:
            wanted = getattr(signal, name, None)
            # nohup, and a shell's &, ignore some of them.
            if wanted is not None and signal.getsignal(wanted) not in (signal.SIG_IGN, None):
                former[wanted] = signal.signal(wanted, handle)
    try:
        yield
    finally:
        restore()
