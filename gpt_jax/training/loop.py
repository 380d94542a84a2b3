"""The training loop: it calls the compiled steps, and callbacks at intervals, which do everything else."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import numpy as np

from gpt_jax.training.state import TrainState
from gpt_jax.training.step import Metrics

MAX_STEPS_PER_CALL = 100
SECONDS_PER_CALL = 1.0  # about how long a call takes; between calls the loop reacts to signals

# (state, n_steps, last_step) -> (state, metrics): a compiled `make_train_steps`, its other arguments given.
Program = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]


class Stopped(Exception):  # noqa: N818
    """A stop was requested while a callback, or a compilation, was under way."""


@dataclass
class Moment:
    """What a callback sees after a call of the program.

    Attributes:
        step: updates done.
        last_step: how many the run will have done in the end.
        state: after these updates.
        n_steps: updates of this call; 0: none, see `unfinished` of `train_loop`.
        metrics: of this call, see `make_train_steps`; NumPy arrays.
        seconds_per_step: of this call.
        record: the metrics of this step by name, for metrics.jsonl; filled by the callbacks in their order.
        is_last: whether the run is complete. A callback may set it, to end the run early.
    """

    step: int
    last_step: int
    state: TrainState
    n_steps: int = 0
    metrics: Metrics = field(default_factory=dict)
    seconds_per_step: float = 0.0
    record: dict[str, float] = field(default_factory=dict)
    is_last: bool = False

    def __post_init__(self) -> None:
        self.is_last = self.is_last or self.step == self.last_step


@dataclass(frozen=True)
class Callback:
    """Something to do while training.

    Attributes:
        call: what to do. It may raise `Stopped`.
        every: after every so many steps and after the last one; 0: after each call of the program, whose
            lengths vary.
    """

    call: Callable[[Moment], None]
    every: int = 0

    def is_due(self, moment: Moment) -> bool:
        """Whether to call it now."""
        return self.every == 0 or moment.step % self.every == 0 or moment.is_last


def train_loop(
    program: Program,
    begin: Moment,
    callbacks: Sequence[Callback],
    is_stopped: Callable[[], bool],
    on_not_finite: Callable[[Moment], NoReturn],
    until: int | None = None,
    is_unfinished: bool = False,
) -> tuple[Moment, bool]:
    """Train from `begin.step` updates to `begin.last_step`, or until stopped.

    A call of the program ends where a callback with an interval is due, so that it sees exactly that step.

    Args:
        program: makes updates.
        begin: where to begin; its state is donated.
        callbacks: called after the updates, in this order.
        is_stopped: asked before each call; true ends the loop.
        on_not_finite: called instead of the callbacks when an update was not made because it would not be
            finite; raises.
        until: end after this step, although the run goes on.
        is_unfinished: whether a stop interrupted the callbacks of `begin`: they are called first.

    Returns:
        The newest moment, and whether a stop interrupted its callbacks.
    """
    moment, steps_per_call = begin, 1
    until = begin.last_step if until is None else min(until, begin.last_step)
    intervals = [callback.every for callback in callbacks if callback.every]
    try:
        if is_unfinished:
            _call_back(callbacks, moment)
        while moment.step < until and not moment.is_last and not is_stopped():
            step = moment.step
            n_steps = min(steps_per_call, until - step, *(every - step % every for every in intervals))
            begun = time.monotonic()
            state, metrics = program(moment.state, np.int32(n_steps), np.int32(begin.last_step))
            metrics = jax.device_get(metrics)
            seconds_per_step = (time.monotonic() - begun) / n_steps
            n_done = int(metrics["steps"])
            moment = Moment(step + n_done, begin.last_step, state, n_done, metrics, seconds_per_step)
            if n_done < n_steps:
                on_not_finite(moment)
            _call_back(callbacks, moment)
            steps_per_call = int(np.clip(SECONDS_PER_CALL / seconds_per_step, 1, MAX_STEPS_PER_CALL))
    except Stopped:
        return moment, True
    return moment, False


def _call_back(callbacks: Sequence[Callback], moment: Moment) -> None:
    for callback in callbacks:
        if callback.is_due(moment):
            callback.call(moment)
