"""How many steps fit into a time: the arithmetic, with a clock of the test's own."""

import re

import numpy as np
import pytest

from gpt_jax.commands.forecast import Budget, Forecast, Speed
from gpt_jax.errors import UserError
from gpt_jax.training.loop import Moment


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
        budget = Budget(minutes, 0.0, warmup, every, self.rehearse, self.try_calls, now=self.clock)
        step, steps_per_call, slower = begin, 1, self.first_call
        moment = Moment(step, most, None)
        budget(moment)  # as where the last process was stopped during an evaluation
        while step < warmup:
            n = min(steps_per_call, warmup - step, every - step % every)
            step += n
            seconds, slower = slower * self.per_step, 1.0
            self.clock.seconds += n * seconds
            moment = Moment(step, most, None, n, {}, seconds)
            if step % every == 0:
                self.clock.seconds += self.per_evaluation
            budget(moment)
            steps_per_call = max(int(1 / self.per_step), 1)
        total, _ = budget.choose(moment)
        left = total // every - step // every + (total % every > 0)
        self.clock.seconds += (total - step) * self.per_step + left * self.per_evaluation + self.ending
        return total, self.clock.seconds

    def try_calls(self, moment):
        calls = [(1, self.first_call * self.per_step), (1, self.per_step), (10, self.per_step)]
        self.clock.seconds += sum(n * seconds for n, seconds in calls)
        return calls

    def rehearse(self, moment):
        self.clock.seconds += self.per_evaluation
        return self.per_evaluation, self.ending


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


@pytest.mark.parametrize("begin", [30, 49, 50])
def test_a_resumed_warmup_does_not_count_its_slow_first_call(begin):
    """However little of the warm-up is left, the number is that of the same run in one process."""
    machine = Machine(per_step=0.01, per_evaluation=1.0, first_call=20.0)
    total, ended = machine.train(minutes=1, warmup=50, every=1000, most=10**6, begin=begin)
    assert total > 5000 and 54 <= ended <= 60


def test_steps_within_is_the_largest_number_that_fits():
    for every in (1, 7, 100):
        speed = Speed(every, 0.5, 3.0, 1.0)
        for seconds in np.linspace(0, 200, 41):
            fitting = [n for n in range(20, 301) if speed.seconds(20, n) <= seconds]
            assert speed.steps_within(seconds, 20, 300) == max(fitting, default=20)


def test_the_time_left_has_all_evaluations_in_it():
    clock = Clock()
    forecast = Forecast(every=10, now=clock)
    for step, seconds in ((10, 9.0), (20, 2.0)):  # the first one compiles
        moment = Moment(step, 45, None, 5, {}, 0.5)
        forecast.begin_call(moment)
        forecast.begin_evaluation(moment)
        clock.seconds += seconds
        forecast.end_evaluation(moment)
    assert forecast.seconds_left(moment) == 25 * 0.5 + 3 * 2.0  # at 30, 40 and 45
    forecast.update(per_evaluation=1.0, ending=7.0)
    assert forecast.seconds_left(moment) == 25 * 0.5 + 3 * 1.0 + 7.0
    assert forecast.seconds_left(Moment(45, 45, None)) == 0
