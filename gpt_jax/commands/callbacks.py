"""Callbacks of the training loop: metrics and plots."""

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt_jax.commands.signals import StopRequest
from gpt_jax.config import Config
from gpt_jax.costs.chips import utilization
from gpt_jax.data.corpus import Corpus
from gpt_jax.model.params import flops_per_token
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.messages import (
    describe_skip,
    describe_spike,
)
from gpt_jax.monitor.metrics import (
    MetricsFile,
    Record,
    TensorBoard,
    deciding_loss,
    is_spike,
)
from gpt_jax.monitor.plots import plot_losses
from gpt_jax.monitor.terminal import Terminal
from gpt_jax.storage.metadata import Metadata
from gpt_jax.training.loop import Moment, Stopped
from gpt_jax.training.optimizer import count_skipped, make_schedule
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
        self.tokens_per_step = config.train.batch_size * config.model.context
        assert model.mesh is not None
        self.device_kind, self.n_devices = model.mesh.devices.flat[0].device_kind, model.mesh.size
        # The known peaks are those of bfloat16 arithmetic.
        is_bfloat16 = model.config.dtype == "bfloat16"
        self.flops_per_token = (
            flops_per_token(config.model, corpus.tokenizer.vocab_size) if is_bfloat16 else None
        )
        self.step = self.written_step = 0
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
        rates = self._learning_rates(moment)
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
            if self.step == moment.step or self.step % log_every == 0:
                record = self._record(norm, rates[i].item(), self.tokens_per_step / moment.seconds_per_step)
                if self.step == moment.step:
                    moment.record |= record
                else:
                    self._write(record)

    def write(self, moment: Moment) -> None:
        """Write the line of the last step, if it is due."""
        is_validated = deciding_loss(moment.record) is not None
        if is_validated:
            moment.record["seconds"] = self.seconds()
        if is_validated or moment.step % self.config.train.log_every == 0:
            self._write(moment.record)

    def amend(self, step: int, values: Record) -> None:
        """Add numbers to the line of an earlier step."""
        for sink in self.sinks:
            sink.amend(step, values)

    def sync(self) -> None:
        """Flush all lines to the disk."""
        for sink in self.sinks:
            sink.sync()

    def _learning_rates(self, moment: Moment) -> np.ndarray:
        """Of each update of a call."""
        if not moment.n_steps:
            return np.empty(0)
        optimizer, skipped = self.config.optimizer, moment.metrics["skipped"]
        counts = self.step + np.arange(len(skipped)) - skipped
        return np.asarray(make_schedule(optimizer, moment.last_step, optimizer.learning_rate)(counts))

    def _record(self, grad_norm: float, learning_rate: float, tokens_per_second: float) -> Record:
        mfu = None
        if self.flops_per_token is not None:
            mfu = utilization(tokens_per_second, self.flops_per_token, self.device_kind, self.n_devices)
        return {
            "step": self.step,
            "seconds": self.seconds(),
            "train_loss": float(np.mean(self.recent_losses)),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
            **({} if mfu is None else {"mfu": round(mfu, 4)}),
            **({"skipped": self.skipped} if self.config.optimizer.skip_grad_norm_factor else {}),
        }

    def _write(self, record: Record) -> None:
        self.written_step = int(record["step"])
        for sink in self.sinks:
            sink.write(record)


class Plotter:
    """Draws loss.png."""

    def __init__(self, metrics: Path, picture: Path, title: str, terminal: Terminal, stop: StopRequest):
        self.metrics, self.picture, self.title = metrics, picture, title
        self.terminal, self.stop = terminal, stop

    def __call__(self, moment: Moment) -> None:
        """Draw; an error other than of the disk is only a warning.

        Raises:
            Stopped: a stop was requested.
        """

        def draw() -> None:
            plot_losses(self.metrics, self.picture, self.title)

        try:
            if moment.is_last:  # all is saved: finish the picture
                draw()
            else:
                self.stop.during(draw)  # importing Matplotlib alone can take seconds
        except (OSError, Stopped):
            raise
        except Exception as error:  # a picture is no reason to lose a run
            self.terminal.write(f"WARNING: could not draw loss.png: {type(error).__name__}: {error}")
