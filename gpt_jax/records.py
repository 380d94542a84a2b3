"""The numbers of a run by name: a record is what one line of metrics.jsonl says of a step."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, float]


def selection_loss(record: Mapping[str, Any]) -> float | None:
    """The validation loss that decides which step is the best: on a part of the split, where there is one."""
    part: float | None = record.get("val_loss_part")
    return record.get("val_loss") if part is None else part


def selection_key(record: Mapping[str, Any], step: float) -> tuple[float, float]:
    """Sorts steps from the best to the worst: by finite `selection_loss`, then newest first."""
    loss = selection_loss(record)
    return loss if type(loss) is float and math.isfinite(loss) else math.inf, -step


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, without lines that are incomplete or damaged."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return list(filter(_is_record, records))


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() >= {"step", "seconds", "train_loss"}
        and all(type(number) in (int, float) for number in value.values())
    )


@dataclass(frozen=True)
class RunHistory:
    """The records of a run, and what it takes to draw them."""

    name: str
    records: list[Record]
    tokens_per_step: int
    has_dropout: bool  # then the training loss is that of a model with dropout
    unit: str  # of the losses: "nats per character", "nats per token"
    baselines: dict[str, float]  # losses of models that need no training, by name

    def minutes(self) -> list[float]:
        """The time of each record, in minutes of all processes of the run: "seconds" begin anew in each.

        A process begins where they decrease, or are too few for the steps since the record before.
        """
        total = seconds = step = 0.0
        minutes = []
        for record in self.records:
            rate = record.get("tokens_per_second") or math.inf
            least = (record["step"] - step) * self.tokens_per_step / rate / 2
            is_new = record["seconds"] - seconds < least
            total += record["seconds"] - (0 if is_new else seconds)
            seconds, step = record["seconds"], record["step"]
            minutes.append(total / 60)
        return minutes
