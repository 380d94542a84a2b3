"""The training loop: the only place where training has side effects."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import jax
import numpy as np

from gpt_jax.backend import check_backend
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.chips import flops_per_token, utilization
from gpt_jax.compilation import compiling
from gpt_jax.config import Config
from gpt_jax.corpus import Corpus, load_corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.exported import is_exported
from gpt_jax.integrity import write_durably
from gpt_jax.lock import locked
from gpt_jax.loss import make_loss_of_tokens
from gpt_jax.metadata import Metadata
from gpt_jax.metrics import (
    MetricsFile,
    Record,
    SamplesFile,
    TensorBoard,
    Terminal,
    is_spike,
    plot_losses,
    read_metrics,
)
from gpt_jax.model import GPT
from gpt_jax.optimizer import count_skipped, make_optimizer, make_schedule
from gpt_jax.params import abstract_params, count_params, unstack_layers
from gpt_jax.report import (
    describe_bad_evaluation,
    describe_end,
    describe_evaluation,
    describe_finished,
    describe_not_finite,
    describe_run,
    describe_skip,
    describe_spike,
    describe_stop,
    promise_time,
)
from gpt_jax.resume import resolve_run_dtype, restore_newest, settle, state_items
from gpt_jax.rng import INIT_STREAM, SAMPLE_STREAM, stream
from gpt_jax.run import checkpoint_folder
from gpt_jax.sampler import generate_tokens
from gpt_jax.sampling import make_rules
from gpt_jax.sharding import make_mesh, replicated
from gpt_jax.signals import stop_signals
from gpt_jax.train_state import TrainState, abstract_state, init_state
from gpt_jax.train_step import Metrics, TrainSteps, make_train_steps

MAX_STEPS_PER_CALL = 100
SECONDS_PER_CALL = 1.0  # about how long the program is deaf to Ctrl-C, and the bar stands still


def train(config: Config, workdir: Path, started: float | None = None) -> int:
    """Train, or go on training, the run in `workdir`.

    Args:
        config: the settings.
        workdir: where config.json, metrics.jsonl, loss.png, samples.txt and checkpoints/ go.
        started: `time.monotonic()` at the start of the process, which "seconds" count from.

    Returns:
        The exit status: 0 when the run is finished, 128 + the signal's number when one stopped it
        (everything is saved; the same command goes on).

    Raises:
        UserError: the settings do not fit the text, the devices, or the run that is there, or another
            process trains it.
        RunError: no checkpoint is whole, one cannot be saved, the disk is full, or the loss or a gradient
            is not finite. What was saved before is still there.
    """
    started = time.monotonic() if started is None else started
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir = {workdir} is not a folder: name one, it need not exist")
    if is_exported(workdir):
        raise UserError(f"workdir = {workdir} holds an exported model: train in another one")
    check_backend()
    mesh = make_mesh(config.mesh)
    corpus = load_corpus(config.data.file, config.model.context, config.data.train_fraction)
    settle(config, mesh)  # refuses what the devices cannot share
    tensorboard = TensorBoard(workdir / "tensorboard") if config.train.tensorboard else None
    # Up to here nothing is written, so that bad settings leave no trace.
    with locked(workdir):
        checkpoints = Checkpoints(checkpoint_folder(workdir))
        try:
            return _Trainer(config, workdir, started, mesh, corpus, checkpoints, tensorboard).run()
        except OSError as error:
            raise RunError(f"{workdir} cannot be written: {error}; what was saved before is kept") from error
        finally:
            checkpoints.close()  # an asynchronous save is lost otherwise


class _Trainer:
    """One run: what the loop needs, and where it is."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        started: float,
        mesh: jax.sharding.Mesh,
        corpus: Corpus,
        checkpoints: Checkpoints,
        tensorboard: TensorBoard | None,
    ):
        self.config = config
        self.workdir = workdir
        self.started = started
        self.mesh = mesh
        self.corpus = corpus
        self.checkpoints = checkpoints
        self.tensorboard = tensorboard
        self.model = GPT(config.model, corpus.tokenizer.vocab_size, mesh=mesh)
        self.optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.keep_ema = config.optimizer.ema_decay > 0
        self.schedule = make_schedule(config.optimizer, config.train.steps, config.optimizer.learning_rate)
        # The losses that the next line's train_loss is the mean of. Kept in checkpoints, so that a
        # resumed run writes the very lines that an undisturbed one writes.
        self.recent_losses: deque[float] = deque(maxlen=config.train.log_every)
        self.losses_before: deque[float] = deque(maxlen=32)  # that a new one may stand out of
        self.val_loss: float | None = None  # of the newest evaluation
        self.step = 0
        self.skipped = 0  # updates that the optimizer left out
        self.sampled = False  # the first sample text needs its programs compiled

    def run(self) -> int:
        """Restore or begin, train, say what came of it; the exit status."""
        state = self._restore()
        config, workdir, steps = self.config, self.workdir, self.config.train.steps
        first_step = self.step
        n_params = count_params(abstract_params(self.model, self.mesh))
        print(describe_run(config, self.dtype, workdir, self.corpus, self.mesh.shape, n_params))
        if first_step >= steps:
            print(describe_finished(first_step, steps, workdir))
            return 0
        if first_step:
            print(f"resume  after step {first_step:,} of {steps:,}")
        if self.about_dtype:
            print(f"dtype   {self.about_dtype}")

        write_durably(workdir / "config.json", config.to_json())
        self.samples = SamplesFile(workdir / "samples.txt", first_step)
        with stop_signals() as stopped_by, ExitStack() as closing:
            self.sinks: list[MetricsFile | TensorBoard] = [MetricsFile(workdir / "metrics.jsonl", first_step)]
            if self.tensorboard:
                self.sinks.append(self.tensorboard)
            for sink in self.sinks:
                closing.callback(sink.close)
            tokens_N = jax.device_put(self.corpus.train, replicated(self.mesh))
            state = state or self._init()
            train_steps = self._compile(state, tokens_N)
            self.terminal = Terminal(first_step, steps)
            closing.callback(self.terminal.close)
            self._loop(state, tokens_N, train_steps, stopped_by)
            self._plot()
            self.checkpoints.wait()
            stop = stopped_by()
        if self.step < steps and stop is not None:
            print(describe_stop(stop.name, self.step, steps, workdir))
            return 128 + stop
        print(describe_end(read_metrics(workdir / "metrics.jsonl"), self._seconds(), workdir))
        return 0

    def _restore(self) -> TrainState | None:
        """The state of the newest checkpoint, None for a new run; and the settings that depend on it."""
        state = metadata = None
        if self.checkpoints.steps():
            target = abstract_state(self.model, self.optimizer, self.keep_ema, self.mesh)
            metadata, state = restore_newest(
                self.checkpoints, target, self.config, self.corpus.fingerprint, self.workdir
            )
            self.step = metadata.step
            self.recent_losses.extend(metadata.recent_losses)
            self.val_loss = metadata.val_loss
            self.skipped = int(count_skipped(state.opt_state))
        elif read_metrics(self.workdir / "metrics.jsonl"):
            print(f"WARNING: {self.workdir} has metrics but no checkpoint: training begins at step 0")
        self.checkpoints.prepare()
        self.config = settle(self.config, self.mesh, metadata)
        # The settings keep "auto", so that a sampler elsewhere takes what suits its device.
        self.dtype, self.about_dtype = resolve_run_dtype(self.config, metadata)
        self.model = self.model.clone(config=replace(self.config.model, dtype=self.dtype))
        return state

    def _init(self) -> TrainState:
        """The state that a new run begins with."""
        key = stream(self.config.seed, INIT_STREAM)
        with compiling("initial state"):
            return init_state(self.model, self.optimizer, self.keep_ema, self.mesh, key)

    def _compile(self, state: TrainState, tokens_N: jax.Array) -> TrainSteps:
        with compiling("training steps"):
            steps = make_train_steps(self.config, self.model, self.optimizer, state, MAX_STEPS_PER_CALL)
            return steps.lower(state, tokens_N, np.uint32(self.config.seed), np.int32(1)).compile()

    def _loop(
        self,
        state: TrainState,
        tokens_N: jax.Array,
        train_steps: TrainSteps,
        stopped_by: Callable[[], signal.Signals | None],
    ) -> None:
        train = self.config.train
        tokens_per_step = train.batch_size * self.config.model.context
        loss_of_tokens = make_loss_of_tokens(self.model, train.batch_size // train.accumulate)
        steps_per_call, calls, promised = 1, 0, False
        saved_at = time.monotonic()

        while self.step < train.steps and stopped_by() is None:
            until_evaluation = train.eval_every - self.step % train.eval_every
            n_steps = min(steps_per_call, until_evaluation, train.steps - self.step)
            begun = time.monotonic()
            state, metrics = train_steps(state, tokens_N, np.uint32(self.config.seed), np.int32(n_steps))
            metrics = jax.device_get(metrics)
            n_done = int(metrics["steps"])
            seconds = time.monotonic() - begun
            seconds_per_step = seconds / n_steps
            steps_per_call = int(np.clip(SECONDS_PER_CALL / seconds_per_step, 1, MAX_STEPS_PER_CALL))

            record = self._take_in(metrics, n_done, tokens_per_step / seconds_per_step)
            if n_done < n_steps:
                self._stop_before_nan(state, metrics, n_done, record)
            evaluate_now = self.step % train.eval_every == 0 or self.step == train.steps
            if evaluate_now:
                announce = partial(compiling, write=self.terminal.write)
                self.val_loss = loss_of_tokens(state.eval_params, self.corpus.val, announce)
                if not np.isfinite(self.val_loss):
                    raise RunError(describe_bad_evaluation(self.step, self.val_loss, self.saved_step))
                record |= {"val_loss": self.val_loss, "val_bpc": self.val_loss / float(np.log(2))}
                record["seconds"] = self._seconds()
            if evaluate_now or self.step % train.log_every == 0:
                self._write(record)

            if evaluate_now:
                self._show_evaluation(state, record)
            if evaluate_now or time.monotonic() - saved_at > 60 * train.save_minutes:
                self._save(state, self.val_loss if evaluate_now else None)
                saved_at = time.monotonic()
            seconds_left = (train.steps - self.step) * seconds_per_step
            calls += 1
            # The first call is slower than all that follow, and short ones are no measure of long ones.
            if calls > 1 and not promised and seconds > SECONDS_PER_CALL / 2:
                self.terminal.write(promise_time(seconds_left))
                promised = True
            self.terminal.progress(record, self.val_loss, seconds_left)

        if self.step < train.steps:  # stopped: whenever the signal came, this step is not lost
            self._save(state, None)

    def _take_in(self, metrics: Metrics, n_done: int, tokens_per_second: float) -> Record:
        """Count the steps of a call, write the lines due before the last one, and return the last one's."""
        last_step = self.step + n_done
        record: Record = {}
        for i in range(n_done):
            loss, norm, skipped = (metrics[name][i].item() for name in ("loss", "grad_norm", "skipped"))
            self.step += 1
            if skipped > self.skipped:
                self.terminal.write(describe_skip(self.step, norm, self.config.optimizer.skip_above))
            elif is_spike(loss, self.losses_before):
                self.terminal.write(describe_spike(self.step, loss, self.losses_before, norm))
            self.skipped = skipped
            self.losses_before.append(loss)
            self.recent_losses.append(loss)
            if self.step % self.config.train.log_every == 0 or self.step == last_step:
                record = self._record(norm, tokens_per_second)
                if self.step < last_step:
                    self._write(record)
        return record

    def _stop_before_nan(self, state: TrainState, metrics: Metrics, n_done: int, record: Record) -> None:
        """Save the state before a step that is not finite, and end the run."""
        if record and self.step % self.config.train.log_every == 0:
            self._write(record)
        self._save(state, None)
        raise RunError(
            describe_not_finite(
                self.step + 1,
                metrics["loss"][n_done].item(),
                metrics["grad_norm"][n_done].item(),
                metrics["grad_norms"],
                metrics["finite"],
            )
        )

    def _seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def _record(self, grad_norm: float, tokens_per_second: float) -> Record:
        """A line of metrics.jsonl for the step just done."""
        return {
            "step": self.step,
            "seconds": self._seconds(),
            "train_loss": float(np.mean(self.recent_losses)),
            "learning_rate": float(self.schedule(self.step - 1 - self.skipped)),
            "grad_norm": grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
            **self._utilization(tokens_per_second),
            **({"skipped": self.skipped} if self.config.optimizer.skip_above else {}),
        }

    def _utilization(self, tokens_per_second: float) -> Record:
        """MFU where the device's peak is known; it is a peak of bfloat16 arithmetic."""
        flops = flops_per_token(self.config.model, self.corpus.tokenizer.vocab_size)
        device = self.mesh.devices.flat[0]
        mfu = utilization(tokens_per_second, flops, device.device_kind, self.mesh.size)
        return {} if mfu is None or self.dtype != "bfloat16" else {"mfu": round(mfu, 4)}

    def _write(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)

    @property
    def saved_step(self) -> int:
        """The newest step with a checkpoint, 0 where there is none."""
        return max(self.checkpoints.steps(), default=0)

    def _save(self, state: TrainState, val_loss: float | None) -> None:
        """Begin to save. What the checkpoint lets a resume leave out is on the disk before it is."""
        for sink in self.sinks:
            sink.sync()
        metadata = Metadata(
            config=self.config,
            tokenizer=self.corpus.tokenizer,
            fingerprint=self.corpus.fingerprint,
            step=self.step,
            val_loss=val_loss,
            recent_losses=list(self.recent_losses),
            versions={name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
            compute_dtype=self.dtype,
        )
        self.checkpoints.save(self.step, state_items(state), metadata.to_dict())

    def _show_evaluation(self, state: TrainState, record: Record) -> None:
        """A line of losses, a few lines of sample text, and the plot."""
        losses = describe_evaluation(record)
        self.terminal.write(losses)
        if self.config.train.sample_length:
            sample = self._sample(state)
            self.terminal.write("\n".join("    | " + line for line in sample.strip("\n").splitlines()))
            self.samples.write(losses, sample)
        self._plot()

    def _sample(self, state: TrainState) -> str:
        pieces = generate_tokens(
            self.model.clone(stacked=False, mesh=None),
            jax.jit(unstack_layers)(state.eval_params),
            np.zeros((1, 1), np.int32),  # the first character of the vocabulary: the line end, mostly
            self.config.train.sample_length,
            make_rules(temperature=0.8),
            stream(self.config.seed, SAMPLE_STREAM),
        )
        with nullcontext() if self.sampled else compiling("sampling", self.terminal.write):
            first = [next(pieces)]
        self.sampled = True
        return "".join(self.corpus.tokenizer.decode(piece[0]) for piece in chain(first, pieces))

    def _plot(self) -> None:
        try:
            plot_losses(
                self.workdir / "metrics.jsonl", self.workdir / "loss.png", title=_printable(self.workdir.name)
            )
        except OSError:
            raise
        except Exception as error:  # a picture is no reason to lose a run
            self.terminal.write(f"WARNING: loss.png is not drawn: {type(error).__name__}: {error}")


def _printable(name: str) -> str:
    """A file's name where the locale has no characters for its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
