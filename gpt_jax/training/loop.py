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

# (state, n_steps) -> (state, metrics): a compiled `make_train_steps`, its other arguments given.
Program = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@dataclass
class Moment:
    """What a callback sees after a call of the program.

    Attributes:
        step: updates done.
        n_steps: updates of this call.
        is_last: whether the run is complete.
        state: after these updates.
        metrics: of this call, see `make_train_steps`; NumPy arrays.
        seconds_per_step: of this call.
        seconds_left: until the last step, at this speed.
        record: the metrics of this step by name, for metrics.jsonl; filled by the callbacks in their order.
    """

    step: int
    n_steps: int
    is_last: bool
    state: TrainState
    metrics: Metrics
    seconds_per_step: float
    seconds_left: float
    record: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Callback:
    """Something to do while training.

    Attributes:
        call: what to do.
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
    state: TrainState,
    first_step: int,
    last_step: int,
    callbacks: Sequence[Callback],
    is_stopped: Callable[[], bool],
    on_not_finite: Callable[[Moment], NoReturn],
) -> tuple[int, TrainState]:
    """Train from `first_step` updates to `last_step`, or until stopped.

    A call of the program ends where a callback with an interval is due, so that it sees exactly that step.

    Args:
        program: makes updates.
        state: after `first_step` updates; donated.
        first_step, last_step: updates done before and after.
        callbacks: called after the updates, in this order.
        is_stopped: asked before each call; true ends the loop.
        on_not_finite: called instead of the callbacks when an update was not made because it would not be
            finite; raises.

    Returns:
        The updates done, and the state.
    """
    step, steps_per_call = first_step, 1
    intervals = [callback.every for callback in callbacks if callback.every]
    while step < last_step and not is_stopped():
        n_steps = min(steps_per_call, last_step - step, *(every - step % every for every in intervals))
        begun = time.monotonic()
        state, metrics = program(state, np.int32(n_steps))
        metrics = jax.device_get(metrics)
        seconds_per_step = (time.monotonic() - begun) / n_steps
        n_done = int(metrics["steps"])
        step += n_done
        seconds_left = (last_step - step) * seconds_per_step
        is_last = step == last_step
        moment = Moment(step, n_done, is_last, state, metrics, seconds_per_step, seconds_left)
        if n_done < n_steps:
            on_not_finite(moment)
        for callback in callbacks:
            if callback.is_due(moment):
                callback.call(moment)
        steps_per_call = int(np.clip(SECONDS_PER_CALL / seconds_per_step, 1, MAX_STEPS_PER_CALL))
    return step, state
