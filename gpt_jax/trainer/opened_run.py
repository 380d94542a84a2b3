"""A run that this process has locked: its plan, its text, its model, its files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt_jax.data.tokens import Corpus
from gpt_jax.files import write_durably
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.metrics import TensorBoard, WandB
from gpt_jax.plan import Plan
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.run_folder import FACTS
from gpt_jax.trainer.origin import Origin
from gpt_jax.training.loop import MAX_STEPS_PER_CALL
from gpt_jax.training.step import Objective


@dataclass
class OpenedRun:
    """What a run consists of."""

    plan: Plan
    workdir: Path
    corpus: Corpus
    model: GPT
    checkpoints: Checkpoints
    trackers: list[TensorBoard | WandB]  # where its metrics go besides metrics.jsonl
    started: float  # when the process started, by `time.monotonic`
    minutes: float | None  # the time limit from the user, see `TimeLimit`
    objective: Objective
    origin: Origin
    max_steps: int = MAX_STEPS_PER_CALL  # that one call of the compiled steps may make
    facts: dict[str, Any] = field(default_factory=dict)  # what run.json says beside the plan

    def write_plan(self, plan: Plan) -> None:
        """Write run.json, with a plan that may differ from that of the start in its number of steps."""
        self.plan = plan
        text = json.dumps({**plan.to_dict(), **self.facts}, indent=1)
        write_durably(self.workdir / FACTS, text + "\n")
