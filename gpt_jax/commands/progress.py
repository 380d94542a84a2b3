"""How long a run takes: measured in a rehearsal, and shown while it trains."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.commands.callbacks import Plotter
from gpt_jax.commands.evaluator import Evaluator, Sampler
from gpt_jax.commands.forecast import Calls, Forecast
from gpt_jax.commands.paths import CHECKOUT
from gpt_jax.commands.saver import Saver
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.messages import describe_time
from gpt_jax.monitor.terminal import Terminal
from gpt_jax.parallel.mesh import platform_of
from gpt_jax.training.loop import MAX_STEPS_PER_CALL, SECONDS_PER_CALL, Moment, Program


class Rehearsal:
    """Compiles and times what a run does at an evaluation."""

    def __init__(self, evaluate: Evaluator, sample: Sampler, plot: Plotter, saver: Saver):
        self.evaluate, self.sample, self.plot, self.saver = evaluate, sample, plot, saver

    def compute(self, moment: Moment) -> tuple[float, float]:
        """The seconds of an evaluation with its sample, and of the final evaluation besides."""
        params = moment.state.eval_params
        per_evaluation = self.evaluate.seconds(params, self.evaluate.part) + self.sample.seconds(moment.state)
        return per_evaluation, self.evaluate.ending_seconds(params)

    def everything(self, moment: Moment) -> tuple[float, float]:
        """The same with the plot, and with a checkpoint, which is kept."""
        per_evaluation, ending = self.compute(moment)
        self.plot(moment)  # the first plot imports Matplotlib

        def save() -> None:
            self.saver.save(moment)
            self.saver.checkpoints.wait()

        return per_evaluation + _seconds(lambda: self.plot(moment)), ending + _seconds(save)


def try_calls(program: Program, moment: Moment) -> Calls:
    """Time calls of the program on a copy of the state; their results are dropped."""
    state, calls, n_steps = jax.tree.map(jnp.copy, moment.state), [], 1
    for _ in range(3):
        begun = time.monotonic()
        state, metrics = program(state, np.int32(n_steps), np.int32(moment.last_step))
        jax.device_get(metrics)
        calls.append((n_steps, (time.monotonic() - begun) / n_steps))
        n_steps = int(np.clip(SECONDS_PER_CALL / calls[-1][1], 1, MAX_STEPS_PER_CALL))
    return calls


class Progress:
    """Shows the newest numbers, and once how long training will take."""

    def __init__(self, rehearsal: Rehearsal, forecast: Forecast, model: GPT, terminal: Terminal):
        self.rehearsal = rehearsal
        self.forecast = forecast
        self.terminal = terminal
        assert model.mesh is not None
        on_cpu = platform_of(model.mesh) == "cpu"
        self.advice = "on a CPU, configs/shakespeare_cpu.py takes minutes" if on_cpu and CHECKOUT else ""
        self.calls = 0
        self.promised = False

    def __call__(self, moment: Moment) -> None:
        """Show them."""
        self.calls += 1
        seconds = moment.seconds_per_step * moment.n_steps
        # The first call is slower than all others, and short calls say little about long ones.
        if self.calls > 1 and not self.promised and seconds > SECONDS_PER_CALL / 2:
            self.promised = True
            per_evaluation, ending = self.rehearsal.compute(moment)
            self.forecast.update(per_evaluation=per_evaluation, ending=ending)
            self.terminal.write(describe_time(self.forecast.seconds_left(moment), self.advice))
        newest = self.rehearsal.evaluate.newest
        self.terminal.progress(moment.record, newest, self.forecast.seconds_left(moment))


def _seconds(call: Callable[[], None]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun
