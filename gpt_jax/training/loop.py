"""The training loop: calls of the compiled steps, one after another."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.records import Record
from gpt_jax.training.state import TrainState
from gpt_jax.training.step import Metrics

MAX_STEPS_PER_CALL = 100
SECONDS_PER_CALL = 1.0  # about how long a call takes; between calls a run reacts to signals

# (state, n_steps, last_step) -> (state, metrics): a compiled `make_train_steps`, its other arguments given.
Program = Callable[[TrainState, int, int], tuple[TrainState, Metrics]]


class Stopped(Exception):  # noqa: N818
    """A stop was requested; raised where the work under way can be abandoned and done again later."""


class CallbackError(Exception):
    """Carries what a callback of the user raised past the handlers of this package's own errors."""

    def __init__(self, error: BaseException):
        super().__init__(error)
        self.error = error


@dataclass
class StepInfo:
    """The state of a run after one call of the compiled training steps."""

    step: int  # updates done
    last_step: int  # updates of the whole run
    state: TrainState  # after these updates. The next call donates it: copy what you keep
    n_steps: int = 0  # updates of this call; 0 where a resumed run completes an evaluation first
    # What this call returned, see `make_train_steps`: NumPy arrays. Empty where `n_steps` is 0.
    metrics: Metrics = field(default_factory=dict)
    seconds_per_step: float = 0.0  # the mean over this call
    record: Record = field(default_factory=dict)  # the metrics of this step, as in metrics.jsonl
    is_last: bool = False  # whether the run ends with this step

    def __post_init__(self) -> None:
        self.is_last = self.is_last or self.step >= self.last_step

    def is_due(self, every: int) -> bool:
        """Whether something is due that happens every N steps and after the last one; 0: always."""
        return every == 0 or self.step % every == 0 or self.is_last


@dataclass(frozen=True)
class Callback:
    """A function for `gpt_jax.train(callbacks=...)` to call while it trains."""

    call: Callable[[StepInfo], object]
    # Call it after every N steps and after the last; 0: after each call, about once a second.
    every: int = 0

    def __post_init__(self) -> None:
        if not callable(self.call):
            raise UserError(f"callback {self.call!r} must be a function of a StepInfo")
        if type(self.every) is not int or self.every < 0:
            raise UserError(f"every = {self.every!r} of a callback must be a whole number, 0 or above")


def next_multiple(step: int, *intervals: int) -> int:
    """The first number above `step` that one of the intervals divides."""
    return min(step - step % every + every for every in intervals)


def train_loop(
    program: Program,
    begin: StepInfo,
    boundary: Callable[[int], int],
    max_steps: int = MAX_STEPS_PER_CALL,
) -> Iterator[StepInfo]:
    """Train from `begin.step` updates to `begin.last_step`, in calls of `max_steps` or fewer.

    `boundary` gives the next step, after a given one, at which a call has to end. The state of `begin` is
    donated. The caller may change `last_step` and `is_last` of what is yielded; the next call reads them.
    A non-finite update is skipped: fewer steps are done than requested, `metrics["is_finite"]` is False, and
    the loop ends.
    """
    info, steps_per_call = begin, 1
    while info.step < info.last_step and not info.is_last:
        n_steps = min(steps_per_call, info.last_step - info.step, boundary(info.step) - info.step)
        begun = time.monotonic()
        state, metrics = program(info.state, n_steps, info.last_step)
        metrics = jax.device_get(metrics)
        per_step = (time.monotonic() - begun) / n_steps
        n_done = int(metrics["steps"])
        metrics["is_finite"] = n_done == n_steps
        info = StepInfo(info.step + n_done, info.last_step, state, n_done, metrics, per_step)
        yield info
        if n_done < n_steps:
            return
        steps_per_call = int(np.clip(SECONDS_PER_CALL / per_step, 1, max_steps))
