"""The training loop by itself: which callbacks it calls, when, and how it stops."""

import jax
import numpy as np
import pytest

from gpt_jax.training import loop
from gpt_jax.training.loop import Callback, Moment, Stopped, train_loop


def counting(calls, fail_at=None):
    """A program whose state is the number of updates done; `calls` gets the length of each call."""

    def program(state, n_steps, last_step):
        n = int(n_steps)
        calls.append(n)
        if fail_at is not None and state + n > fail_at:
            n = fail_at - state
        return state + n, {"steps": np.int32(n)}

    return program


def run(callbacks, first=0, last=20, is_stopped=lambda: False, fail_at=None, **options):
    """The lengths of the calls; the steps and the state at the end, and whether a stop interrupted it."""
    calls = []

    def on_not_finite(moment):
        raise FloatingPointError(moment.step)

    begin = Moment(first, last, first)
    end, interrupted = train_loop(
        counting(calls, fail_at), begin, callbacks, is_stopped, on_not_finite, **options
    )
    return calls, (end.step, end.state, interrupted)


def recording(seen, every=0):
    return Callback(lambda moment: seen.append(moment.step), every)


def test_a_callback_sees_exactly_the_steps_of_its_interval_and_the_last_one():
    sevens, fives, all_calls = [], [], []
    calls, end = run([recording(sevens, 7), recording(fives, 5), recording(all_calls)])
    assert sevens == [7, 14, 20] and fives == [5, 10, 15, 20]
    assert all_calls == list(np.cumsum(calls)) and sum(calls) == 20 and end == (20, 20, False)


def test_callbacks_are_called_in_their_order_and_share_the_record():
    def write(moment):
        moment.record["loss"] = moment.step

    read = []
    run([Callback(write), Callback(lambda moment: read.append(moment.record["loss"]), every=10)])
    assert read == [10, 20]


def test_a_resumed_loop_keeps_the_intervals():
    seen = []
    calls, end = run([recording(seen, 7)], first=9)
    assert seen == [14, 20] and sum(calls) == 11 and end == (20, 20, False)


def test_calls_grow_with_the_speed_and_have_a_limit():
    calls, _ = run([], last=1000)
    assert calls[0] == 1 and max(calls) == loop.MAX_STEPS_PER_CALL


def test_a_stop_ends_the_loop_after_the_call():
    seen = []
    _, end = run([recording(seen, 5)], is_stopped=lambda: len(seen) == 2)
    assert end == (10, 10, False)


def stopping(at):
    def call(moment):
        if moment.step == at:
            raise Stopped

    return call


def test_a_stop_within_a_callback_ends_the_loop_at_once():
    before, after = [], []
    callbacks = [recording(before, 5), Callback(stopping(10), every=5), recording(after, 5)]
    _, end = run(callbacks)
    assert before == [5, 10] and after == [5] and end == (10, 10, True)


def test_what_a_stop_interrupted_is_called_first():
    seen = []
    calls, end = run([recording(seen, 5), Callback(stopping(-1))], first=10, is_unfinished=True)
    assert seen == [10, 15, 20] and sum(calls) == 10 and end == (20, 20, False)
    _, end = run([Callback(stopping(10))], first=10, is_unfinished=True)
    assert end == (10, 10, True)


def test_a_part_of_the_run():
    """It ends in between, and nothing takes that for the end of the run."""
    seen, last_ones = [], []
    callbacks = [recording(seen, 7), Callback(lambda moment: last_ones.append(moment.is_last))]
    calls, end = run(callbacks, until=10)
    assert seen == [7] and sum(calls) == 10 and end == (10, 10, False) and not any(last_ones)


def test_a_callback_can_end_the_run():
    seen = []

    def end_it(moment):
        moment.is_last = moment.step == 10

    calls, end = run([Callback(end_it, every=5), recording(seen, 7)])
    assert seen == [7, 10] and sum(calls) == 10 and end == (10, 10, False)  # it is due at the last step


def test_an_update_that_is_not_finite_calls_no_callback():
    seen = []
    with pytest.raises(FloatingPointError, match="10"):
        run([recording(seen, 5)], fail_at=10)
    assert seen == [5, 10]


def test_a_moment_says_how_far_it_is():
    moments = []
    run([Callback(moments.append)], last=3)
    assert [moment.is_last for moment in moments] == [False] * (len(moments) - 1) + [True]
    assert all(moment.seconds_per_step > 0 for moment in moments)
    assert sum(moment.n_steps for moment in moments) == 3
    assert jax.tree.leaves(moments[0].metrics)
