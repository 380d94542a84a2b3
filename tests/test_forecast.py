"""How many steps fit into a time: the arithmetic, with a clock of the test's own."""

import re

import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.trainer.minutes import Pace, TimeLimit


class Clock:
    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def __call__(self):
        return self.seconds


class Machine:
    """What a run takes, second by second. A call makes up to a second's worth of steps, as the loop does."""

    def __init__(self, per_step, per_evaluation, ending=0.0, first_call=1.0, start_up=0.0):
        self.per_step, self.per_evaluation, self.ending = per_step, per_evaluation, ending
        self.first_call = first_call  # how many times slower than all others
        self.clock = Clock(start_up)

    def train(self, minutes, warmup, every, most, begin=0):
        """The steps of the whole run, and when it ended, in seconds."""
        limit = TimeLimit(minutes, 0.0, warmup, now=self.clock)
        pace = Pace(every, per_evaluation=self.per_evaluation, ending=self.ending)
        step, steps_per_call, slower, calls = begin, 1, self.first_call, 0
        while step < warmup:
            n = min(steps_per_call, warmup - step, every - step % every)
            step += n
            seconds, slower, calls = slower * self.per_step, 1.0, calls + 1
            self.clock.seconds += n * seconds
            pace.add(n, n * seconds)
            if step % every == 0 or step == warmup:
                self.clock.seconds += self.per_evaluation
            if calls > 1 or step == warmup:
                total = limit.fitting_steps(pace, step, most)
            steps_per_call = max(int(1 / self.per_step), 1)
        left = total // every - step // every + (total % every > 0)
        self.clock.seconds += (total - step) * self.per_step + left * self.per_evaluation + self.ending
        return total, self.clock.seconds


@pytest.mark.parametrize("seed", range(40))
def test_a_run_ends_within_a_tenth_of_its_time(seed):
    """On fast and slow machines, with cheap and dear evaluations, short and long warm-ups."""
    rng = np.random.default_rng(seed)
    per_step = float(10 ** rng.uniform(-4, 1))
    machine = Machine(
        per_step,
        per_evaluation=per_step * float(rng.uniform(0, 50)),
        ending=float(rng.uniform(0, 2)),
        first_call=float(rng.uniform(1, 5)),
        start_up=float(rng.uniform(1, 10)),
    )
    warmup, every = int(rng.integers(2, 60)), int(rng.integers(10, 500))
    minutes = float(rng.choice([1, 5, 30]))
    try:
        total, ended = machine.train(minutes, warmup, every, most=10**8)
    except UserError as error:  # the time that it names is enough, and not much more than needed
        enough = float(re.search(r"use --minutes (\d+) or", str(error))[1])
        assert enough > minutes
        again = Machine(per_step, machine.per_evaluation, machine.ending, machine.first_call)
        total, ended = again.train(enough, warmup, every, most=10**8)
        assert total >= 2 * warmup and ended <= 60 * enough
        return
    assert 2 * warmup <= total < 10**8
    assert ended <= 60 * minutes
    # One step, or the evaluation that comes with it, may be longer than a tenth.
    assert ended >= 0.9 * 60 * minutes - machine.per_step - machine.per_evaluation


def test_where_all_steps_fit_nothing_is_left_out():
    assert Machine(0.01, 1.0).train(minutes=1, warmup=10, every=100, most=500)[0] == 500


def test_a_hopeless_run_ends_after_its_second_call():
    """Not after a warm-up of hours."""
    machine = Machine(per_step=27.0, per_evaluation=60.0)
    with pytest.raises(UserError) as error:
        machine.train(minutes=5, warmup=100, every=250, most=5000)
    assert machine.clock.seconds < 60 * 3
    assert str(error.value) == (
        "--minutes = 5 is too short here: the run needs at least 200 steps (twice optimizer.warmup_steps), "
        "which take 1 h 34 min; use --minutes 95 or a smaller model"
    )


@pytest.mark.parametrize("begin", [30, 48])
def test_a_resumed_warmup_does_not_count_its_slow_first_call(begin):
    """However little of the warm-up is left, the number is that of the same run in one process."""
    machine = Machine(per_step=0.01, per_evaluation=1.0, first_call=20.0)
    total, ended = machine.train(minutes=1, warmup=50, every=1000, most=10**6, begin=begin)
    assert total > 5000 and 54 <= ended <= 60


def test_a_single_slow_call_makes_a_run_too_short_but_not_late():
    machine = Machine(per_step=0.01, per_evaluation=1.0, first_call=20.0)
    total, ended = machine.train(minutes=1, warmup=50, every=1000, most=10**6, begin=49)
    assert 100 <= total < 1000 and ended < 60


def test_steps_within_is_the_largest_number_that_fits():
    for every in (1, 7, 100):
        pace = Pace(every, 0.5, 3.0, 1.0)
        for seconds in np.linspace(0, 200, 41):
            fitting = [n for n in range(20, 301) if pace.seconds(20, n) <= seconds]
            assert pace.steps_within(seconds, 20, 300) == max(fitting, default=20)


def test_the_time_left_has_all_evaluations_in_it():
    pace = Pace(every=10)
    for n_steps, seconds in ((1, 9.0), (5, 2.0), (5, 3.0)):
        pace.add(n_steps, seconds)
    pace.per_evaluation = 2.0
    assert pace.per_step == 0.5
    assert pace.seconds(20, 45) == 25 * 0.5 + 3 * 2.0  # at 30, 40 and 45
    pace.per_evaluation, pace.ending = 1.0, 7.0
    assert pace.seconds(20, 45) == 25 * 0.5 + 3 * 1.0 + 7.0
    assert pace.seconds(45, 45) == 0
