"""The callback that saves checkpoints."""

import time
from functools import partial
from typing import Any

from gpt_jax.commands.callbacks import Recorder
from gpt_jax.commands.evaluator import Evaluator
from gpt_jax.config import Config, Dtype
from gpt_jax.data.corpus import Corpus
from gpt_jax.monitor.metrics import deciding_loss
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.metadata import Metadata, library_versions
from gpt_jax.training.loop import Moment
from gpt_jax.training.resume import state_items


class Saver:
    """Saves a checkpoint at each evaluation, and at least every `train.save_minutes`."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        dtype: Dtype,
        checkpoints: Checkpoints,
        recorder: Recorder,
        evaluate: Evaluator,
        total_steps: int | None,
    ):
        self.config = config
        self.checkpoints = checkpoints
        self.recorder = recorder
        self.evaluate = evaluate
        self.total_steps = total_steps  # as in `Metadata`
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
        if deciding_loss(moment.record) is not None or minutes > self.config.train.save_minutes:
            self.save(moment)

    def save(self, moment: Moment, is_evaluated: bool = True) -> None:
        """Start to save. Metrics are flushed to the disk before the checkpoint that depends on them.

        Args:
            moment: what to save.
            is_evaluated: whether its evaluation, if due, is complete; else a resumed run starts with it.
        """
        self.recorder.sync()
        numbers = {name: value for name, value in moment.record.items() if not name.startswith("val_")}
        losses = {name: moment.record.get(name) for name in ("val_loss", "val_loss_part")}
        late: dict[str, Any] = {
            **(losses if is_evaluated else dict.fromkeys(losses)),
            **vars(self.evaluate.best if is_evaluated else self.evaluate.best_before),
            "total_steps": self.total_steps,
            "unfinished": None if is_evaluated else numbers,
        }
        if moment.step not in self.checkpoints.steps():
            recent_losses = list(self.recorder.recent_losses)
            metadata = self.make_metadata(step=moment.step, recent_losses=recent_losses, **late)
            self.checkpoints.save(moment.step, state_items(moment.state), metadata.to_dict())
        elif is_evaluated and deciding_loss(moment.record) is not None:
            self.checkpoints.amend(moment.step, late)  # it was saved when a stop interrupted its evaluation
        self.saved_at = time.monotonic()
