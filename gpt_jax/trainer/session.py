"""The training of a run in one process: what happens after each call of the compiled steps."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NoReturn

from gpt_jax.costs.chips import peak_flops
from gpt_jax.data.baselines import baseline_losses
from gpt_jax.data.tokens import TokenFileError
from gpt_jax.errors import RunError, UserError
from gpt_jax.model.params import name_leaves
from gpt_jax.monitor.messages import describe_evaluation, describe_not_finite
from gpt_jax.monitor.metrics import MetricsFile, SamplesFile
from gpt_jax.monitor.plots import plot_losses
from gpt_jax.monitor.terminal import Terminal, show_time
from gpt_jax.paths import CHECKOUT, EXAMPLE_CONFIG
from gpt_jax.records import Record, selection_key, selection_loss
from gpt_jax.storage.integrity import DamagedError
from gpt_jax.storage.metadata import Metadata
from gpt_jax.storage.run_folder import METRICS, PLOT, PROFILE, SAMPLES, read_history
from gpt_jax.trainer.evaluator import Best, Evaluator, Sampler
from gpt_jax.trainer.minutes import Pace, TimeLimit
from gpt_jax.trainer.opened_run import OpenedRun
from gpt_jax.trainer.profiler import Profiler
from gpt_jax.trainer.recorder import Recorder
from gpt_jax.trainer.saver import Saver
from gpt_jax.trainer.signals import StopRequest
from gpt_jax.training.loop import (
    SECONDS_PER_CALL,
    Callback,
    CallbackError,
    Program,
    StepInfo,
    Stopped,
    next_multiple,
    train_loop,
)
from gpt_jax.training.resume import restore_params

LONG = 30 * 60  # seconds; a longer run on a CPU gets advice


class Session:
    """Starts or resumes training in this process."""

    def __init__(
        self,
        run: OpenedRun,
        begin: StepInfo,
        saved: Metadata | None,
        stop: StopRequest,
        callbacks: Sequence[Callback],
        closing: ExitStack,
    ):
        """Open the files, which `closing` closes. `saved` is of the checkpoint that the run resumes from."""
        plan, corpus, model = run.plan, run.corpus, run.model
        self.run, self.info, self.stop, self.callbacks = run, begin, stop, callbacks
        self.train_config = plan.config.train
        # Whether a stop came before all was done that is due after the call that ended at `info.step`.
        self.after_call_pending = saved is not None and saved.unfinished is not None
        complete = begin.step - self.after_call_pending  # the files are complete up to here
        sinks = [MetricsFile(run.workdir / METRICS, complete), *run.trackers]
        self.terminal = terminal = Terminal(begin.step, begin.last_step)
        for part in (*sinks, terminal):
            closing.callback(part.close)
        self.profiler = Profiler(self.train_config.profiled, run.workdir / PROFILE, terminal.write)
        closing.callback(self.profiler.end)
        is_late = 0 <= self.profiler.ends[0] < begin.step
        if is_late and not (run.workdir / PROFILE).exists():
            terminal.write(f"WARNING: no profile: update {self.profiler.ends[0] + 1} was made before")
        self.recorder = Recorder(plan, model.vocab_size, sinks, terminal, run.started)
        self.evaluate = Evaluator(plan, model, corpus, terminal, stop)
        self.sample = Sampler(plan, model, corpus.tokenizer, terminal, stop)
        self.samples = SamplesFile(run.workdir / SAMPLES, complete)
        self.saver = Saver(run)
        self.pace = Pace(self.train_config.eval_every)
        self.total_steps = plan.steps if plan.steps_were_chosen else None  # as --minutes chose
        self.limit: TimeLimit | None = None  # as long as the number of steps is to be chosen
        if run.minutes is not None and self.total_steps is None and not begin.is_last:
            self.limit = TimeLimit(run.minutes, run.started, plan.config.optimizer.warmup_steps)
        self.best, self.newest_losses = Best(), Record()
        if saved is not None:
            self.recorder.resume(saved)
            self.best, self.newest_losses = Best(saved.best_loss, saved.since_best), saved.losses()
        self.has_plotted = False  # in this process
        # Whether the time that training takes was shown; with --minutes it is known.
        self.eta_shown = self.limit is not None

    def train_to_the_end(self, compile_steps: Callable[[], Program]) -> bool:
        """Train until the run ends or is stopped; whether it is complete.

        By then the state is saved, or its save is under way. `compile_steps` may raise `Stopped`.

        Raises:
            RunError: a loss, gradient or update is not finite; the state before it is saved.
            TokenFileError: a token file was changed or cut; the state is saved.
            UserError: the time of `--minutes` is too short.
            CallbackError: a callback of the user raised; the state is saved.
        """
        failed: TokenFileError | None = None
        try:
            program = compile_steps()
            if self.after_call_pending:
                self._after_call()
            if not self.stop:
                self.profiler.begin_after(self.info)
                for info in train_loop(program, self.info, self._boundary, self.run.max_steps):
                    self.info = info
                    if info.step >= self.profiler.ends[1]:
                        self.profiler.end()
                    if not info.metrics["is_finite"]:
                        self._end_at_nan()
                    self.after_call_pending = True
                    self._after_call()
                    self.after_call_pending = False
                    if self.stop:
                        break
                    self.profiler.begin_after(info)
        except Stopped:
            pass
        except TokenFileError as error:  # after what was trained before is saved
            failed = error
        is_left = self.after_call_pending and self._has_evaluation(self.info)
        is_evaluated = not (is_left and self.recorder.written_step < self.info.step)
        is_complete = self.info.is_last and is_evaluated
        if not is_complete:
            self._save(is_evaluated)
        if failed:
            raise failed
        return is_complete

    def _boundary(self, step: int) -> int:
        """Where a call that begins at `step` has to end."""
        every = [callback.every for callback in self.callbacks if callback.every]
        multiple = next_multiple(step, self.train_config.eval_every, *every)
        ends = (*self.profiler.ends, self.limit.warmup if self.limit else 0)
        return min([multiple, *(end for end in ends if end > step)])

    def _has_evaluation(self, info: StepInfo) -> bool:
        """Whether there is an evaluation after a step: at intervals, and before the steps are chosen."""
        is_choice = self.limit is not None and info.step == self.limit.warmup
        return is_choice or info.is_due(self.train_config.eval_every)

    def _after_call(self) -> None:
        """Everything that is due after a call of the program, in this order."""
        info, is_evaluation, begun = self.info, self._has_evaluation(self.info), self._clock()
        has_plotted = self.has_plotted  # the first plot imports Matplotlib
        self.recorder.add(info)
        if "peak_flops" not in self.run.facts:  # measured only now, so that the first step is not delayed
            self.run.facts["peak_flops"] = peak_flops(self.run.plan.mesh, self.run.plan.execution.dtype)
            self.run.facts["baselines"] = baseline_losses(self.run.corpus)
            self.run.write_plan(self.run.plan)
        if is_evaluation:
            best = self._evaluate(info)
            self._finish_evaluation(info)
            self._show_sample(info)
        self.recorder.write(info)
        if is_evaluation:
            self.best = best  # together with the line of metrics
            self.pace.per_evaluation = self._clock() - begun
        self._measure(info, self._call_user(info))
        if self.limit and not info.is_last:
            self._choose_steps(self.limit, info)
        begun = self._clock()
        if self.saver.is_due(info):
            self._save()
        if is_evaluation:
            self._plot(info)
            self.pace.per_evaluation += has_plotted * (self._clock() - begun)
        self._show_progress(info)

    def _measure(self, info: StepInfo, callback_seconds: float) -> None:
        """Measure the speed of a call."""
        n_steps, per_step = info.n_steps, info.seconds_per_step
        if not n_steps:  # a resumed run that completes an evaluation first: use the speed before
            n_steps, per_step = 1, self.recorder.tokens_per_step / info.record["tokens_per_second"]
        self.pace.add(n_steps, n_steps * per_step + callback_seconds)
        if not self.evaluate.is_compiled:  # none has been made: a forward pass is a third of an update
            self.evaluate.seconds_per_token = self.pace.per_step / 3 / self.recorder.tokens_per_step
            self.pace.per_evaluation = self.evaluate.n_tokens * self.evaluate.seconds_per_token
        self.pace.ending = self.evaluate.ending_seconds

    def _clock(self) -> float:
        """The time in seconds, without what the parts of an evaluation took to compile."""
        return time.monotonic() - self.evaluate.compile_seconds - self.sample.compile_seconds

    def _evaluate(self, info: StepInfo) -> Best:
        """Add the loss to the record, and end the run where `train.patience` says so."""
        losses = self.evaluate(info.state.model_params, self.evaluate.part)
        loss = selection_loss(losses)
        assert loss is not None
        if not abs(loss) < float("inf"):
            saved_step = max(self.run.checkpoints.steps(), default=0)
            raise RunError(
                f"step {info.step:,}: the validation loss is {loss}; the newest checkpoint is that of step "
                f"{saved_step:,}. Start another run with a lower learning rate"
            )
        self.newest_losses = losses
        info.record |= losses
        best = self.best.after(loss)
        if 0 < self.train_config.patience <= best.since_best and not info.is_last:
            evaluations = "evaluation" if self.train_config.patience == 1 else "evaluations"
            self.terminal.write(
                f"stopping early: no new best validation loss in {self.train_config.patience} {evaluations} "
                f"(train.patience)"
            )
            info.is_last = True
        return best

    def _finish_evaluation(self, info: StepInfo) -> None:
        """At the end of a run that evaluated a part: the loss of the whole split, now and at the best one."""
        if not (info.is_last and self.evaluate.part):
            return
        checkpoints = self.run.checkpoints
        info.record |= self.evaluate(info.state.model_params)
        checkpoints.wait()  # for the best one, which may be the newest
        best = next(iter(checkpoints.best_first()), info.step)
        if checkpoints.selection_key(best) >= selection_key(info.record, info.step):
            return
        try:
            params = restore_params(checkpoints, best, info.state)
        except DamagedError as error:
            self.terminal.write(f"WARNING: {error}; its loss on the whole split is not computed")
            return
        whole = self.evaluate(params)
        checkpoints.amend(best, {"val_loss": whole["val_loss"]})
        self.recorder.amend(best, whole)

    def _show_sample(self, info: StepInfo) -> None:
        """Show the losses and a sample text, and append both to samples.txt."""
        losses = describe_evaluation(info.record, self.train_config.eval_tokens)
        self.terminal.write(losses)
        if self.train_config.sample_length:
            sample = self.sample(info.state.model_params)
            self.terminal.write("\n".join("    | " + line for line in sample.strip("\n").split("\n")))
            self.samples.write(losses, sample)

    def _save(self, is_evaluated: bool = True) -> None:
        self.recorder.sync()  # metrics are on the disk before the checkpoint that depends on them
        recent_losses = list(self.recorder.recent_losses)
        # Until the steps are chosen, a resumed run makes the evaluation before the choice again.
        is_chosen = self.limit is None or self.info.step < self.limit.warmup or self.info.is_last
        self.saver.save(self.info, recent_losses, self.best, self.total_steps, is_evaluated and is_chosen)

    def _plot(self, info: StepInfo) -> None:
        """Draw loss.png; an error other than of the disk is only a warning."""

        def draw() -> None:
            plot_losses(read_history(self.run.workdir), self.run.workdir / PLOT)

        self.has_plotted = True
        try:
            if info.is_last:  # all is saved: finish the picture
                draw()
            else:
                self.stop.during(draw)  # importing Matplotlib alone can take seconds
        except (OSError, Stopped):
            raise
        except Exception as error:  # a picture is no reason to lose a run
            self.terminal.write(f"WARNING: could not draw loss.png: {type(error).__name__}: {error}")

    def _show_progress(self, info: StepInfo) -> None:
        """Show the newest numbers, and once how long training will take."""
        seconds_left = 0.0 if info.is_last else self.pace.seconds(info.step, info.last_step)
        # The first call is slower than all others, and short calls say little about long ones.
        is_typical = self.pace.calls > 1 and info.seconds_per_step * info.n_steps > SECONDS_PER_CALL / 2
        if is_typical and not self.eta_shown:
            self.eta_shown = True
            is_slow = self.run.plan.execution.on_cpu and seconds_left > LONG
            advice = f"; on a CPU, {EXAMPLE_CONFIG} takes minutes" if is_slow and CHECKOUT else ""
            time_left = f"{show_time(seconds_left)} from here to the end, evaluations included"
            self.terminal.write(f"time    about {time_left}{advice}")
        self.terminal.progress(info.record, self.newest_losses, seconds_left)

    def _choose_steps(self, limit: TimeLimit, info: StepInfo) -> None:
        """Choose the length of the run at the end of the warm-up, and record it.

        Raises:
            UserError: the time is too short, which can show before that; the state is saved.
        """
        if info.step < limit.warmup and self.pace.calls == 1:
            return
        if info.step == limit.warmup:
            self._plot(info)  # the first one imports Matplotlib
            begun = self._clock()
            self._plot(info)
            self._save()
            self.run.checkpoints.wait()
            self.pace.per_evaluation += self._clock() - begun
        try:
            total = limit.fitting_steps(self.pace, info.step, info.last_step)
        except UserError:
            self._save()
            raise
        if info.step == limit.warmup:
            most = f"{total:,} of {info.last_step:,} steps fit"
            self.terminal.write(
                f"steps   {most if total < info.last_step else f'all {total:,} steps fit'} into "
                f"{limit.minutes:g} min: {self.pace.per_step:.3g} s for a step, "
                f"{self.pace.per_evaluation:.1f} s for an evaluation"
            )
            self.limit, self.total_steps, info.last_step = None, total, total
            self.run.write_plan(replace(self.run.plan, steps=total, steps_were_chosen=True))
            self.terminal.set_steps(total)

    def _call_user(self, info: StepInfo) -> float:
        """Call the callbacks that are due, with a copy, so that they cannot change the run; the seconds.

        Raises:
            CallbackError: one of them raised; the state is saved.
        """
        begun = time.monotonic()
        try:
            for callback in self.callbacks:
                if info.is_due(callback.every):
                    callback.call(replace(info, record=dict(info.record)))
        except BaseException as error:
            self._save()
            self.run.checkpoints.wait()
            raise CallbackError(error) from error
        return time.monotonic() - begun

    def _end_at_nan(self) -> NoReturn:
        info = self.info
        if info.n_steps:  # else the line of this step is written
            self.recorder.add(info)
            self.recorder.write(info)
        self._save()
        metrics, i = info.metrics, info.n_steps  # i: of the update that was not made
        norms = {name: norm.item() for name, norm in name_leaves(metrics["grad_norms"]).items()}
        finite = {name: bool(is_finite) for name, is_finite in name_leaves(metrics["finite"]).items()}
        loss, grad_norm = metrics["loss"][i].item(), metrics["grad_norm"][i].item()
        raise RunError(describe_not_finite(info.step + 1, loss, grad_norm, norms, finite))
