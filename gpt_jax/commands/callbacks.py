"""The callbacks of the training loop: metrics, evaluation, sample text, plots, checkpoints, progress."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from gpt_jax.commands.paths import CHECKOUT
from gpt_jax.config import Config, Dtype
from gpt_jax.costs.chips import utilization
from gpt_jax.data.corpus import Corpus
from gpt_jax.errors import RunError
from gpt_jax.model.loss import LossOfTokens
from gpt_jax.model.params import flops_per_token
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.messages import (
    describe_bad_evaluation,
    describe_evaluation,
    describe_skip,
    describe_spike,
    describe_time,
)
from gpt_jax.monitor.metrics import MetricsFile, Record, SamplesFile, TensorBoard, is_spike
from gpt_jax.monitor.plots import plot_losses
from gpt_jax.monitor.terminal import Terminal
from gpt_jax.parallel.mesh import platform_of
from gpt_jax.rng import SAMPLE_STREAM, stream
from gpt_jax.sampling.generate import generate_tokens
from gpt_jax.sampling.rules import make_rules
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.compilation_cache import compiling
from gpt_jax.storage.metadata import Metadata, library_versions
from gpt_jax.training.loop import SECONDS_PER_CALL, Moment
from gpt_jax.training.optimizer import count_skipped, make_schedule
from gpt_jax.training.resume import state_items
from gpt_jax.training.state import TrainState

Sinks = Sequence[MetricsFile | TensorBoard]


class Recorder:
    """Makes the lines of metrics.jsonl, and reports steps that stand out."""

    def __init__(
        self, config: Config, corpus: Corpus, model: GPT, sinks: Sinks, terminal: Terminal, started: float
    ):
        self.config = config
        self.sinks = sinks
        self.terminal = terminal
        self.started = started
        self.schedule = make_schedule(config.optimizer, config.train.steps, config.optimizer.learning_rate)
        self.tokens_per_step = config.train.batch_size * config.model.context
        assert model.mesh is not None
        self.device_kind, self.n_devices = model.mesh.devices.flat[0].device_kind, model.mesh.size
        # The known peaks are those of bfloat16 arithmetic.
        is_bfloat16 = model.config.dtype == "bfloat16"
        self.flops_per_token = (
            flops_per_token(config.model, corpus.tokenizer.vocab_size) if is_bfloat16 else None
        )
        self.step = 0
        self.skipped = 0  # updates that the optimizer skipped
        # The losses whose mean is the next line's train_loss. They are stored in checkpoints, so that a
        # resumed run writes the same lines as one that was not interrupted.
        self.recent_losses: deque[float] = deque(maxlen=config.train.log_every)
        self.losses_before: deque[float] = deque(maxlen=32)  # to notice spikes

    def resume(self, metadata: Metadata, state: TrainState) -> None:
        """Continue from a checkpoint."""
        self.step = metadata.step
        self.recent_losses.extend(metadata.recent_losses)
        self.skipped = int(count_skipped(state.opt_state))

    def seconds(self) -> float:
        """Since the process started."""
        return round(time.monotonic() - self.started, 3)

    def take_in(self, moment: Moment) -> None:
        """Write the lines due before the last step of a call, and start the record of the last step."""
        factor, log_every = self.config.optimizer.skip_grad_norm_factor, self.config.train.log_every
        tokens_per_second = self.tokens_per_step / moment.seconds_per_step
        for i in range(moment.n_steps):
            loss, norm, skipped = (
                moment.metrics[name][i].item() for name in ("loss", "grad_norm", "skipped")
            )
            self.step += 1
            if skipped > self.skipped:
                self.terminal.write(describe_skip(self.step, norm, factor))
            elif is_spike(loss, self.losses_before):
                self.terminal.write(describe_spike(self.step, loss, self.losses_before, norm))
            self.skipped = skipped
            self.losses_before.append(loss)
            self.recent_losses.append(loss)
            if self.step == moment.step:
                moment.record |= self._record(norm, tokens_per_second)
            elif self.step % log_every == 0:
                self._write(self._record(norm, tokens_per_second))

    def write(self, moment: Moment) -> None:
        """Write the line of the last step, if it is due."""
        if "val_loss" in moment.record:
            moment.record["seconds"] = self.seconds()
        if "val_loss" in moment.record or (moment.record and moment.step % self.config.train.log_every == 0):
            self._write(moment.record)

    def sync(self) -> None:
        """Flush all lines to the disk."""
        for sink in self.sinks:
            sink.sync()

    def _record(self, grad_norm: float, tokens_per_second: float) -> Record:
        mfu = None
        if self.flops_per_token is not None:
            mfu = utilization(tokens_per_second, self.flops_per_token, self.device_kind, self.n_devices)
        return {
            "step": self.step,
            "seconds": self.seconds(),
            "train_loss": float(np.mean(self.recent_losses)),
            "learning_rate": float(self.schedule(self.step - 1 - self.skipped)),
            "grad_norm": grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
            **({} if mfu is None else {"mfu": round(mfu, 4)}),
            **({"skipped": self.skipped} if self.config.optimizer.skip_grad_norm_factor else {}),
        }

    def _write(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)


class Evaluator:
    """Computes the validation loss."""

    def __init__(
        self, loss_of_tokens: LossOfTokens, corpus: Corpus, checkpoints: Checkpoints, terminal: Terminal
    ):
        self.loss_of_tokens = loss_of_tokens
        self.corpus = corpus
        self.checkpoints = checkpoints
        self.announce = partial(compiling, write=terminal.write)
        self.val_loss: float | None = None  # of the newest evaluation

    def __call__(self, moment: Moment) -> None:
        """Add the loss to the record.

        Raises:
            RunError: it is not finite.
        """
        val = self.corpus.val
        self.val_loss = self.loss_of_tokens(moment.state.eval_params, val, self.announce)
        if not np.isfinite(self.val_loss):
            saved_step = max(self.checkpoints.steps(), default=0)
            raise RunError(describe_bad_evaluation(moment.step, self.val_loss, saved_step))
        per_character = self.val_loss * ((len(val) - 1) / (len(self.corpus.val_text) - 1))
        moment.record |= {"val_loss": self.val_loss, "val_bpc": per_character / float(np.log(2))}


class Sampler:
    """Shows the losses and a sample text, and appends both to samples.txt. Comes after `Evaluator`."""

    def __init__(
        self, config: Config, corpus: Corpus, model: GPT, path: Path, first_step: int, terminal: Terminal
    ):
        self.file = SamplesFile(path, first_step)
        self.length = config.train.sample_length
        self.seed = config.seed
        self.tokenizer = corpus.tokenizer
        self.model = model.clone(mesh=None)
        self.terminal = terminal
        self.is_compiled = False

    def __call__(self, moment: Moment) -> None:
        """Show and write."""
        losses = describe_evaluation(moment.record)
        self.terminal.write(losses)
        if self.length:
            sample = self._sample(moment.state)
            self.terminal.write("\n".join("    | " + line for line in sample.strip("\n").splitlines()))
            self.file.write(losses, sample)

    def _sample(self, state: TrainState) -> str:
        pieces: Iterable[np.ndarray] = generate_tokens(
            self.model,
            state.eval_params,
            np.array([[self.tokenizer.start_id]], np.int32),
            self.length,
            make_rules(temperature=0.8),
            stream(self.seed, SAMPLE_STREAM),
        )
        if not self.is_compiled:
            with compiling("sampling", self.terminal.write):
                pieces = chain([next(iter(pieces))], pieces)
            self.is_compiled = True
        decode = self.tokenizer.decoder()
        return "".join(decode(piece[0]) for piece in pieces)


class Plotter:
    """Draws loss.png."""

    def __init__(self, metrics: Path, picture: Path, title: str, terminal: Terminal):
        self.metrics, self.picture, self.title, self.terminal = metrics, picture, title, terminal

    def __call__(self, _moment: Moment | None = None) -> None:
        """Draw; an error other than of the disk is only a warning."""
        try:
            plot_losses(self.metrics, self.picture, self.title)
        except OSError:
            raise
        except Exception as error:  # a picture is no reason to lose a run
            self.terminal.write(f"WARNING: could not draw loss.png: {type(error).__name__}: {error}")


class Saver:
    """Saves a checkpoint at each evaluation, and at least every `train.save_minutes`."""

    def __init__(
        self, config: Config, corpus: Corpus, dtype: Dtype, checkpoints: Checkpoints, recorder: Recorder
    ):
        self.config = config
        self.checkpoints = checkpoints
        self.recorder = recorder
        self.make_metadata = partial(
            Metadata,
            config=config,
            tokenizer=corpus.tokenizer,
            fingerprint=corpus.fingerprint,
            versions=library_versions(),
            compute_dtype=dtype,
        )
        self.saved_at = time.monotonic()

    def __call__(self, moment: Moment) -> None:
        """Save, if it is time."""
        minutes = (time.monotonic() - self.saved_at) / 60
        if "val_loss" in moment.record or minutes > self.config.train.save_minutes:
            self.save(moment.step, moment.state, moment.record.get("val_loss"))

    def save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        """Start to save. Metrics are flushed to the disk before the checkpoint that depends on them."""
        self.recorder.sync()
        recent_losses = list(self.recorder.recent_losses)
        metadata = self.make_metadata(step=step, val_loss=val_loss, recent_losses=recent_losses)
        self.checkpoints.save(step, state_items(state), metadata.to_dict())
        self.saved_at = time.monotonic()


class Progress:
    """Shows the newest numbers, and once how long training will take."""

    def __init__(self, evaluator: Evaluator, model: GPT, terminal: Terminal):
        self.evaluator = evaluator
        self.terminal = terminal
        assert model.mesh is not None
        on_cpu = platform_of(model.mesh) == "cpu"
        self.advice = "on a CPU, configs/shakespeare_cpu.py takes minutes" if on_cpu and CHECKOUT else ""
        self.calls = 0
        self.told = False

    def __call__(self, moment: Moment) -> None:
        """Show them."""
        self.calls += 1
        seconds = moment.seconds_per_step * moment.n_steps
        # The first call is slower than all others, and short calls say little about long ones.
        if self.calls > 1 and not self.told and seconds > SECONDS_PER_CALL / 2:
            self.terminal.write(describe_time(moment.seconds_left, self.advice))
            self.told = True
        self.terminal.progress(moment.record, self.evaluator.val_loss, moment.seconds_left)
