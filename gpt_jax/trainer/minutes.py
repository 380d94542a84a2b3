"""How long the rest of a run takes, and how many steps fit into a given time (`--minutes`)."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.config import Config
from gpt_jax.errors import UserError
from gpt_jax.monitor.terminal import show_time
from gpt_jax.storage.metadata import Metadata

SHARE = 0.97  # of the time that is left: a reserve of 3%, since later steps may be slower


@dataclass
class Pace:
    """Measured durations of the parts of a run.

    Attributes:
        every: steps between evaluations.
        per_step: seconds for an update, callbacks included: the mean of all calls but the first, which is
            slower than all others.
        per_evaluation: seconds for all that is done every `every` steps and after the last one.
        ending: extra seconds at the end.
        calls: how many were measured, in this process.
    """

    every: int
    per_step: float = 0.0
    per_evaluation: float = 0.0
    ending: float = 0.0
    calls: int = 0
    _steps: int = 0
    _seconds: float = 0.0

    def add(self, n_steps: int, seconds: float) -> None:
        """Add what a call and its callbacks took."""
        self.calls += 1
        if self.calls == 2:
            self._steps, self._seconds = 0, 0.0
        self._steps += n_steps
        self._seconds += seconds
        self.per_step = self._seconds / self._steps

    def seconds(self, step: int, last_step: int) -> float:
        """The time from `step` updates to the end of a run of `last_step`."""
        if step >= last_step:
            return 0.0
        n_evaluations = -(-last_step // self.every) - step // self.every
        return (last_step - step) * self.per_step + n_evaluations * self.per_evaluation + self.ending

    def steps_within(self, seconds: float, step: int, most: int) -> int:
        """The largest number of updates, `most` or fewer, that fits; `step` where nothing fits."""
        totals = range(step, most + 1)
        return totals[max(bisect_right(totals, seconds, key=lambda last: self.seconds(step, last)) - 1, 0)]


@dataclass
class TimeLimit:
    """Chooses how many steps a run makes, so that it ends after a given time (`--minutes`).

    During the warm-up the learning rate does not depend on the number of steps. At its end the model is
    evaluated once, which shows what an evaluation takes; then the number is chosen.

    Attributes:
        minutes: the time from the start of the process to its end.
        started: when it started, by `now`.
        warmup: steps of the warm-up.
        now: a clock that counts seconds.
    """

    minutes: float
    started: float
    warmup: int
    now: Callable[[], float] = time.monotonic

    def fitting_steps(self, pace: Pace, step: int, most: int) -> int:
        """The number of steps of the run, `most` or fewer, that fit into the time.

        Raises:
            UserError: not even twice the warm-up fits.
        """
        passed, least = self.now() - self.started, min(2 * self.warmup, most)
        if step < self.warmup and self.warmup % pace.every:
            passed += pace.per_evaluation  # the one at the end of the warm-up
        steps = pace.steps_within(SHARE * (60 * self.minutes - passed), step, most)
        if steps < least:
            needed = passed + pace.seconds(step, least) / SHARE
            raise UserError(
                f"--minutes = {self.minutes:g} is too short here: the run needs at least {least:,} steps "
                f"(twice optimizer.warmup_steps), which take {show_time(needed)}; use --minutes "
                f"{math.ceil(needed / 60)} or a smaller model"
            )
        return steps


def check_minutes(minutes: float | None, config: Config) -> None:
    """Raise `UserError` if `--minutes` cannot be met with these settings."""
    if minutes is None:
        return
    if not (minutes > 0 and math.isfinite(minutes)):
        raise UserError(f"--minutes = {minutes:g} must be above 0 and finite")
    if not config.optimizer.warmup_steps:
        raise UserError(
            f"--minutes = {minutes:g} requires optimizer.warmup_steps of 1 or more: the speed is measured "
            f"during the warm-up, when the learning rate does not depend on the number of steps"
        )


def check_not_too_late(minutes: float | None, config: Config, saved: Metadata, workdir: Path) -> None:
    """Raise `UserError` if the warm-up of a run whose length was not chosen is over."""
    steps, warmup = config.train.steps, config.optimizer.warmup_steps
    chosen = saved.total_steps is not None and steps == saved.config.train.steps
    # At the end of the warm-up, the evaluation that comes before the choice may be left to do.
    is_over = saved.step > warmup or (saved.step == warmup and saved.unfinished is None)
    if minutes is not None and not chosen and is_over and saved.step < steps:
        raise UserError(
            f"--minutes = {minutes:g} is too late: the warm-up of {warmup} steps of {workdir} is over, "
            f"so its learning rate depends on train.steps = {steps}; resume it without --minutes, or start "
            f"another run with another --workdir"
        )
