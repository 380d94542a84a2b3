"""The training of a run in one process: its callbacks, and the loop that calls them."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from gpt_jax.commands.callbacks import Plotter, Recorder
from gpt_jax.commands.evaluator import Evaluator, FinalEvaluator, Sampler
from gpt_jax.commands.forecast import Budget, Forecast
from gpt_jax.commands.progress import Progress, Rehearsal, try_calls
from gpt_jax.commands.saver import Saver
from gpt_jax.commands.signals import StopRequest
from gpt_jax.config import Config
from gpt_jax.data.corpus import Corpus
from gpt_jax.errors import RunError
from gpt_jax.files import write_durably
from gpt_jax.model.loss import make_loss_of_tokens
from gpt_jax.model.params import name_leaves
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.messages import describe_not_finite, describe_steps
from gpt_jax.monitor.metrics import MetricsFile, SamplesFile, TensorBoard
from gpt_jax.monitor.terminal import Terminal
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.metadata import Metadata
from gpt_jax.storage.run_folder import FACTS, METRICS, PLOT, SAMPLES
from gpt_jax.training.loop import Callback, Moment, Program, Stopped, train_loop


@dataclass
class Run:
    """What a run consists of.

    Attributes:
        config: the settings.
        workdir: its folder.
        started: when the process started, by `time.monotonic`.
        minutes: that the user gave it, see `Budget`; None: as many as it takes.
        mesh: of devices.
        corpus: the text.
        model: with the mesh, and with the type of its activations resolved.
        checkpoints: of the run.
        facts: what run.json says, the numbers of the run that do not change while it trains.
        chosen_steps: its length, if `--minutes` chose it before.
    """

    config: Config
    workdir: Path
    started: float
    minutes: float | None
    mesh: Any
    corpus: Corpus
    model: GPT
    checkpoints: Checkpoints
    facts: dict[str, Any] = field(default_factory=dict)
    chosen_steps: int | None = None

    def write_facts(self) -> None:
        """Write run.json."""
        write_durably(self.workdir / FACTS, json.dumps(self.facts, indent=1) + "\n")


class Session:
    """Trains a run, from where it was left, in this process."""

    def __init__(
        self,
        run: Run,
        begin: Moment,
        saved: Metadata | None,
        tensorboard: TensorBoard | None,
        stop: StopRequest,
        closing: ExitStack,
    ):
        """Open the files.

        Args:
            run: what to train.
            begin: where it begins.
            saved: of the checkpoint that it was resumed from.
            tensorboard: where the metrics go besides metrics.jsonl.
            stop: the request to stop.
            closing: closes the files.
        """
        config, corpus, model, workdir = run.config, run.corpus, run.model, run.workdir
        self.run, self.begin, self.stop = run, begin, stop
        self.is_unfinished = saved is not None and saved.unfinished is not None
        complete = begin.step - 1 if self.is_unfinished else begin.step  # the files are complete up to here
        sinks: list[Any] = [MetricsFile(workdir / METRICS, complete)]
        sinks += [tensorboard] if tensorboard else []
        self.terminal = terminal = Terminal(begin.step, begin.last_step)
        for part in (*sinks, terminal):
            closing.callback(part.close)

        self.recorder = Recorder(config, corpus, model, sinks, terminal, run.started)
        loss_of_tokens = make_loss_of_tokens(model, config.train.batch_size // config.train.grad_accum_steps)
        self.evaluate = Evaluator(config, loss_of_tokens, corpus, run.checkpoints, terminal, stop, saved)
        if saved is not None:
            self.recorder.resume(saved, begin.state)
        samples = SamplesFile(workdir / SAMPLES, complete)
        self.sample = Sampler(config, corpus, model, samples, terminal, stop)
        self.plot = Plotter(workdir / METRICS, workdir / PLOT, _printable(workdir.name), terminal, stop)
        dtype = run.facts["dtype"]
        self.saver = Saver(
            config, corpus, dtype, run.checkpoints, self.recorder, self.evaluate, run.chosen_steps
        )
        self.forecast = Forecast(config.train.eval_every)
        rehearsal = Rehearsal(self.evaluate, self.sample, self.plot, self.saver)
        self.progress = Progress(rehearsal, self.forecast, model, terminal)

    def train(self, compile_steps: Callable[[], Program]) -> tuple[Moment, bool]:
        """Train to the end, or until stopped; all is saved then, or being saved.

        Args:
            compile_steps: makes the program; may raise `Stopped`.

        Returns:
            The newest moment, and whether the run is complete.
        """
        # outstanding: a stop came before the callbacks of `moment` were complete.
        moment, outstanding = self.begin, self.is_unfinished
        try:
            program = compile_steps()
            loop = partial(
                train_loop, program, is_stopped=lambda: bool(self.stop), on_not_finite=self._stop_at_nan
            )
            if self.run.minutes is not None and self.saver.total_steps is None:
                budget = self._budget(self.run.minutes, program)
                self.progress.promised = True  # choosing the number says more
                callbacks = [*self._callbacks(), Callback(budget)]
                moment, outstanding = loop(moment, callbacks, until=budget.warmup, is_unfinished=outstanding)
                if not self.stop and not moment.is_last:
                    moment = self._choose_steps(budget, moment)
            if not self.stop:
                moment, outstanding = loop(moment, self._callbacks(), is_unfinished=outstanding)
        except Stopped:
            pass
        is_due = moment.step % self.run.config.train.eval_every == 0 or moment.is_last
        is_evaluated = not (outstanding and is_due and self.recorder.written_step < moment.step)
        is_complete = moment.is_last and is_evaluated
        if not is_complete:
            self.saver.save(moment, is_evaluated)
        return moment, is_complete

    def _callbacks(self) -> list[Callback]:
        every = self.run.config.train.eval_every
        return [
            Callback(self.recorder.take_in),
            Callback(self.forecast.begin_call),
            Callback(self.forecast.begin_evaluation, every),
            Callback(self.evaluate, every),
            Callback(FinalEvaluator(self.evaluate, self.recorder)),
            Callback(self.sample, every),
            Callback(self.recorder.write),
            Callback(self.saver),
            Callback(self.plot, every),
            Callback(self.forecast.end_evaluation, every),
            Callback(self.progress),
        ]

    def _stop_at_nan(self, moment: Moment) -> NoReturn:
        if moment.n_steps:  # else the line of this step is written
            self.recorder.take_in(moment)
            self.recorder.write(moment)
        self.saver.save(moment)
        raise RunError(_describe_not_finite(moment))

    def _budget(self, minutes: float, program: Program) -> Budget:
        config = self.run.config
        return Budget(
            minutes,
            self.run.started,
            config.optimizer.warmup_steps,
            config.train.eval_every,
            self.progress.rehearsal.everything,
            partial(try_calls, program),
        )

    def _choose_steps(self, budget: Budget, moment: Moment) -> Moment:
        """Choose the length of the run, and record it; the moment with that length."""
        total, speed = budget.choose(moment)
        self.run.checkpoints.amend(moment.step, {"total_steps": total})
        self.saver.total_steps = total
        self.run.facts["steps"] = total
        self.run.write_facts()
        self.terminal.set_steps(total)
        self.terminal.write(
            describe_steps(total, moment.last_step, budget.minutes, speed.per_step, speed.per_evaluation)
        )
        self.forecast.speed = speed
        return replace(moment, last_step=total)


def _describe_not_finite(moment: Moment) -> str:
    metrics, i = moment.metrics, moment.n_steps  # i: of the update that was not made
    norms = {name: norm.item() for name, norm in name_leaves(metrics["grad_norms"]).items()}
    finite = {name: bool(is_finite) for name, is_finite in name_leaves(metrics["finite"]).items()}
    loss, grad_norm = metrics["loss"][i].item(), metrics["grad_norm"][i].item()
    return describe_not_finite(moment.step + 1, loss, grad_norm, norms, finite)


def _printable(name: str) -> str:
    """A file's name, where the locale cannot decode its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
