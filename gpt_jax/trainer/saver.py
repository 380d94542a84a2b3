"""Saves checkpoints."""

import time
from functools import partial
from typing import Any

from gpt_jax.records import selection_loss
from gpt_jax.storage.metadata import Metadata, library_versions
from gpt_jax.trainer.evaluator import Best
from gpt_jax.trainer.opened_run import OpenedRun
from gpt_jax.training.loop import StepInfo
from gpt_jax.training.resume import state_items


class Saver:
    """Saves a checkpoint at each evaluation, and at least every `train.save_minutes`."""

    def __init__(self, run: OpenedRun):
        self.checkpoints = run.checkpoints
        self.seconds_between = 60 * run.plan.config.train.save_minutes
        self.make_metadata = partial(
            Metadata,
            config=run.plan.config,
            tokenizer=run.corpus.tokenizer,
            fingerprint=run.corpus.fingerprint,
            versions=library_versions(),
            compute_dtype=run.plan.execution.dtype,
            parent=run.origin.record,
        )
        self.saved_at = time.monotonic()

    def is_due(self, info: StepInfo) -> bool:
        """Whether to save."""
        overdue = time.monotonic() - self.saved_at > self.seconds_between
        return overdue or selection_loss(info.record) is not None

    def save(
        self,
        info: StepInfo,
        recent_losses: list[float],
        best: Best,
        total_steps: int | None,
        is_evaluated: bool = True,
    ) -> None:
        """Start to save a state; if it is not evaluated, a resumed run starts with its evaluation."""
        numbers = {name: value for name, value in info.record.items() if not name.startswith("val_")}
        losses = {name: info.record.get(name) for name in ("val_loss", "val_loss_part")}
        late: dict[str, Any] = {
            **(losses if is_evaluated else dict.fromkeys(losses)),
            **vars(best),
            "total_steps": total_steps,
            "unfinished": None if is_evaluated else numbers,
        }
        if info.step not in self.checkpoints.steps():
            metadata = self.make_metadata(step=info.step, recent_losses=recent_losses, **late)
            self.checkpoints.save(info.step, state_items(info.state), metadata.to_dict())
        elif is_evaluated and selection_loss(info.record) is not None:
            self.checkpoints.amend(info.step, late)  # it was saved when a stop interrupted its evaluation
        self.saved_at = time.monotonic()
