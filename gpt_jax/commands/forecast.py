"""How long the rest of a run takes, and how many steps fit into a given time."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.monitor.messages import describe_too_short
from gpt_jax.training.loop import Moment

SHARE = 0.97  # of the time that is left: a reserve of 3%, since later steps may be slower

Calls = list[tuple[int, float]]  # steps of a call, and seconds for each of them


@dataclass(frozen=True)
class Speed:
    """What the parts of a run take.

    Attributes:
        every: steps between evaluations.
        per_step: seconds for an update.
        per_evaluation: seconds for all that is done every `every` steps and after the last one.
        ending: seconds for what is done at the end besides.
    """

    every: int
    per_step: float = 0.0
    per_evaluation: float = 0.0
    ending: float = 0.0

    def seconds(self, step: int, last_step: int) -> float:
        """From `step` updates to the end of a run of `last_step`."""
        if step >= last_step:
            return 0.0
        n_evaluations = -(-last_step // self.every) - step // self.every
        return (last_step - step) * self.per_step + n_evaluations * self.per_evaluation + self.ending

    def steps_within(self, seconds: float, step: int, most: int) -> int:
        """The largest number of updates, `most` or fewer, that fits; `step` where nothing fits."""
        totals = range(step, most + 1)
        return totals[max(bisect_right(totals, seconds, key=lambda last: self.seconds(step, last)) - 1, 0)]


class Forecast:
    """The speed of the latest call and of the fastest evaluation, measured by its callbacks."""

    def __init__(self, every: int, now: Callable[[], float] = time.monotonic):
        """`every`: steps between evaluations; `now`: a clock that counts seconds."""
        self.speed = Speed(every)
        self._now = now
        self._begun = 0.0

    def begin_call(self, moment: Moment) -> None:
        """Use the speed of this call."""
        if moment.n_steps:
            self.update(per_step=moment.seconds_per_step)

    def begin_evaluation(self, _moment: Moment) -> None:
        """Start to measure."""
        self._begun = self._now()

    def end_evaluation(self, _moment: Moment) -> None:
        """Keep the fastest evaluation: one that also compiles takes longer than all others."""
        seconds = self._now() - self._begun
        self.update(per_evaluation=min(seconds, self.speed.per_evaluation or math.inf))

    def update(self, **seconds: Any) -> None:
        """Replace some attributes of the speed."""
        self.speed = replace(self.speed, **seconds)

    def seconds_left(self, moment: Moment) -> float:
        """Until the end of the run."""
        return 0.0 if moment.is_last else self.speed.seconds(moment.step, moment.last_step)


@dataclass
class Budget:
    """Chooses how many steps a run makes, so that it ends after a given time (`--minutes`).

    During the warm-up the learning rate does not depend on the number of steps. The speed is measured until
    its end; then the number is chosen. As a callback, it ends a run early if the time is too short.

    Attributes:
        minutes: from the start of the process to its end.
        started: when it started, by `now`.
        warmup: steps of the warm-up.
        every: steps between evaluations.
        rehearse: measures the seconds of an evaluation, and those that the end of the run takes besides.
        try_calls: times calls whose results are dropped, for a warm-up that was nearly over when it began.
        now: a clock that counts seconds.
    """

    minutes: float
    started: float
    warmup: int
    every: int
    rehearse: Callable[[Moment], tuple[float, float]]
    try_calls: Callable[[Moment], Calls]
    now: Callable[[], float] = time.monotonic
    calls: Calls = field(default_factory=list)

    def __call__(self, moment: Moment) -> None:
        """Take in a call.

        Raises:
            UserError: not even twice the warm-up fits.
        """
        if moment.n_steps:
            self.calls.append((moment.n_steps, moment.seconds_per_step))
        if len(self.calls) > 1 and moment.step < self.warmup:
            fastest = Speed(self.every, min(seconds for _, seconds in self.calls))
            if fastest.seconds(moment.step, self._least(moment)) > self._seconds_left():
                self.choose(moment)

    def choose(self, moment: Moment) -> tuple[int, Speed]:
        """The number of steps, `moment.last_step` or fewer, and the speed that it follows from.

        Raises:
            UserError: not even twice the warm-up fits.
        """
        # The first call of a process is slower than all others.
        calls = self.calls[1:] or self.try_calls(moment)[1:]
        per_step = sum(n * seconds for n, seconds in calls) / sum(n for n, _ in calls)
        speed = Speed(self.every, per_step, *self.rehearse(moment))
        steps = speed.steps_within(SHARE * self._seconds_left(), moment.step, moment.last_step)
        least = self._least(moment)
        if steps < least:
            needed = self.now() - self.started + speed.seconds(moment.step, least) / SHARE
            raise UserError(describe_too_short(self.minutes, needed, least))
        return steps, speed

    def _least(self, moment: Moment) -> int:
        return min(2 * self.warmup, moment.last_step)

    def _seconds_left(self) -> float:
        return 60 * self.minutes - (self.now() - self.started)
