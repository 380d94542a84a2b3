"""The training loop by itself: how steps are divided into calls, and how it ends."""

import jax
import numpy as np
import pytest

from gpt_jax.training import loop
from gpt_jax.training.loop import StepInfo, next_multiple, train_loop


def counting(calls, fail_at=None):
    """A program whose state is the number of updates done; `calls` gets the length of each call."""

    def program(state, n_steps, last_step):
        calls.append(n_steps)
        if fail_at is not None and state + n_steps > fail_at:
            n_steps = fail_at - state
        return state + n_steps, {"steps": np.int32(n_steps)}

    return program


def run(*intervals, first=0, last=20, fail_at=None, see=lambda info: None):
    """The lengths of the calls, and what the loop yields."""
    calls, infos = [], []
    begin = StepInfo(first, last, first)
    boundary = (lambda step: next_multiple(step, *intervals)) if intervals else (lambda step: last)
    for info in train_loop(counting(calls, fail_at), begin, boundary):
        infos.append(info)
        see(info)
    return calls, infos


def due(infos, every):
    return [info.step for info in infos if info.is_due(every)]


def test_a_call_ends_at_each_boundary():
    calls, infos = run(7, 5)
    assert due(infos, 7) == [7, 14, 20] and due(infos, 5) == [5, 10, 15, 20]
    assert due(infos, 0) == list(np.cumsum(calls)) and sum(calls) == 20
    assert [info.state for info in infos] == [info.step for info in infos]


def test_a_resumed_loop_keeps_the_intervals():
    calls, infos = run(7, first=9)
    assert due(infos, 7) == [14, 20] and sum(calls) == 11


def test_calls_grow_with_the_speed_and_have_a_limit():
    calls, _ = run(last=1000)
    assert calls[0] == 1 and max(calls) == loop.MAX_STEPS_PER_CALL


def test_the_length_may_change_on_the_way():
    def shorten(info):
        if info.step == 10:
            info.last_step = 13

    calls, infos = run(5, see=shorten)
    assert infos[-1].step == infos[-1].last_step == 13 and infos[-1].is_last and sum(calls) == 13


def test_a_run_may_end_early():
    def end(info):
        info.is_last = info.is_last or info.step == 10

    calls, infos = run(5, see=end)
    assert sum(calls) == 10 and due(infos, 7) == [10]  # it is due at the last step


def test_a_finished_run_makes_no_call():
    assert run(first=20) == ([], [])


def test_an_update_that_is_not_finite_ends_the_loop():
    _, infos = run(5, fail_at=12)
    assert [info.metrics["is_finite"] for info in infos] == [True] * (len(infos) - 1) + [False]
    assert infos[-1].step == 12 and not infos[-1].is_last


@pytest.mark.parametrize("step, wanted", [(0, 5), (4, 5), (5, 7), (7, 10), (34, 35)])
def test_next_multiple(step, wanted):
    assert next_multiple(step, 5, 7) == wanted


def test_what_is_yielded_says_how_far_it_is():
    _, infos = run(last=3)
    assert [info.is_last for info in infos] == [False] * (len(infos) - 1) + [True]
    assert all(info.seconds_per_step > 0 for info in infos)
    assert sum(info.n_steps for info in infos) == 3
    assert jax.tree.leaves(infos[0].metrics)
