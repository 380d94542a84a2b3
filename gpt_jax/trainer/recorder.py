"""The numbers of a run: the lines of metrics.jsonl, and a message where a loss stands out."""

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from gpt_jax.costs.chips import peak_flops
from gpt_jax.model.params import flops_per_token
from gpt_jax.monitor.metrics import MetricsFile, TensorBoard, WandB
from gpt_jax.monitor.terminal import Terminal
from gpt_jax.plan import Plan
from gpt_jax.records import Record, selection_loss
from gpt_jax.storage.metadata import Metadata
from gpt_jax.training.loop import StepInfo
from gpt_jax.training.optimizer import make_schedule

Sinks = Sequence[MetricsFile | TensorBoard | WandB]


class Recorder:
    """Makes the lines of metrics.jsonl, and reports losses that stand out."""

    def __init__(self, plan: Plan, vocab_size: int, sinks: Sinks, terminal: Terminal, started: float):
        """`started`: when the process started, by `time.monotonic`; the other arguments are of the run."""
        self.train_config, self.optimizer = plan.config.train, plan.config.optimizer
        self.sinks, self.terminal, self.started = sinks, terminal, started
        self.tokens_per_step = self.train_config.batch_size * plan.config.model.context
        self.flops_per_token, self.plan = flops_per_token(plan.config.model, vocab_size), plan
        self.step = self.written_step = 0
        # The losses whose mean is the next line's train_loss. They are stored in checkpoints, so that a
        # resumed run writes the same lines as one that was not interrupted.
        self.recent_losses: deque[float] = deque(maxlen=self.train_config.log_every)
        self.losses_before: deque[float] = deque(maxlen=32)  # to notice spikes

    def resume(self, saved: Metadata) -> None:
        """Continue from a checkpoint."""
        self.step = saved.step
        self.recent_losses.extend(saved.recent_losses)

    def seconds(self) -> float:
        """The time since the process started."""
        return round(time.monotonic() - self.started, 3)

    def add(self, info: StepInfo) -> None:
        """Write the lines due before the last step of a call, and start the record of the last step."""
        rates = self._learning_rates(info) if info.n_steps else ()
        for i in range(info.n_steps):
            loss, norm = (info.metrics[name][i].item() for name in ("loss", "grad_norm"))
            self.step += 1
            self._report_spike(loss, norm)
            self.losses_before.append(loss)
            self.recent_losses.append(loss)
            if self.step == info.step or self.step % self.train_config.log_every == 0:
                record = self._record(norm, rates[i].item(), self.tokens_per_step / info.seconds_per_step)
                if self.step == info.step:
                    info.record |= record
                else:
                    self._write(record)

    def _report_spike(self, loss: float, grad_norm: float) -> None:
        """Report a loss half a nat, and six standard deviations, above the mean of those before it."""
        before = self.losses_before
        if len(before) < 5:
            return
        mean = float(np.mean(before))
        if loss > mean + max(0.5, 6 * float(np.std(before))):
            self.terminal.write(
                f"step {self.step:,}: loss {loss:.4f} is far above the mean {mean:.4f} of the {len(before)} "
                f"before it; gradient norm {grad_norm:.3g}"
            )

    def write(self, info: StepInfo) -> None:
        """Write the line of the last step, if it is due."""
        is_validated = selection_loss(info.record) is not None
        if is_validated:
            info.record["seconds"] = self.seconds()
        if is_validated or info.step % self.train_config.log_every == 0:
            self._write(info.record)

    def amend(self, step: int, values: Record) -> None:
        """Add numbers to the line of an earlier step."""
        for sink in self.sinks:
            sink.amend(step, values)

    def sync(self) -> None:
        """Flush all lines to the disk."""
        for sink in self.sinks:
            sink.sync()

    def _learning_rates(self, info: StepInfo) -> np.ndarray:
        """The learning rate of each update of a call."""
        counts = self.step + np.arange(len(info.metrics["loss"]))
        return np.asarray(make_schedule(self.optimizer, info.last_step, self.optimizer.learning_rate)(counts))

    def _record(self, grad_norm: float, learning_rate: float, tokens_per_second: float) -> Record:
        record: Record = {
            "step": self.step,
            "seconds": self.seconds(),
            "train_loss": float(np.mean(self.recent_losses)),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
        }
        if peak := peak_flops(self.plan.mesh, self.plan.execution.dtype):
            record["mfu"] = round(tokens_per_second * self.flops_per_token / peak, 4)
        return record

    def _write(self, record: Record) -> None:
        self.written_step = int(record["step"])
        for sink in self.sinks:
            sink.write(record)
