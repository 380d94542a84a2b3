"""Where the numbers and samples of a run go: metrics.jsonl, samples.txt, TensorBoard, Weights & Biases."""

import json
import os
import re
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.files import write_durably
from gpt_jax.records import Record, read_metrics, selection_key, selection_loss


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, with ascending steps."""

    def __init__(self, path: Path, first_step: int):
        """Open to append after `first_step`; lines of later steps, which will be done again, are removed."""
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= first_step]
        write_durably(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a record that has a "step"."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def amend(self, step: int, values: Record) -> None:
        """Add numbers to the record of an earlier step, in one step."""
        self._file.close()
        lines = [record | (values if record["step"] == step else {}) for record in read_metrics(self.path)]
        write_durably(self.path, "".join(json.dumps(record) + "\n" for record in lines))
        self._file = self.path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Flush to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SamplesFile:
    """`samples.txt`: the text that the model wrote at each evaluation, below a line with its losses."""

    def __init__(self, path: Path, first_step: int):
        """Open to append after `first_step`; samples of later steps are removed."""
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        kept = [
            sample
            for sample in re.split(r"^(?=--- step [\d,]+: )", text, flags=re.MULTILINE)
            if (heading := re.match(r"--- step ([\d,]+)", sample))
            and int(heading[1].replace(",", "")) <= first_step
        ]
        write_durably(path, "".join(kept))

    def write(self, losses: str, sample: str) -> None:
        """Append a sample; `losses` is a line that begins with "step 1,000: "."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- {losses}\n{sample}\n\n")
            file.flush()
            os.fsync(file.fileno())


def validated(records: list[Record]) -> list[Record]:
    """The records with a validation loss."""
    return [record for record in records if selection_loss(record) is not None]


def best_record(records: list[Record]) -> Record:
    """The best of the validated records."""
    return min(validated(records), key=lambda record: selection_key(record, record["step"]))


class TensorBoard:
    """The same numbers as TensorBoard events."""

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "train.tensorboard = True needs a package that is missing: pip install -e '.[tensorboard]'"
            ) from None
        # The folder is made with the first number, not before the settings are checked.
        self._make_writer = lambda: SummaryWriter(str(folder))
        self._writer: Any = None

    def write(self, record: Record) -> None:
        """Write every number of a record at its step."""
        self._writer = self._writer or self._make_writer()
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def amend(self, step: int, values: Record) -> None:
        """Write more numbers for an earlier step."""
        self.write(values | {"step": step})

    def sync(self) -> None:
        """Flush to the operating system."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._writer:
            self._writer.close()


class WandB:
    """The same numbers as a run of Weights & Biases, which a resumed run continues.

    A process of wandb's own keeps and sends them. What it cannot do is a warning: training goes on.
    """

    def __init__(self, workdir: Path, settings: dict[str, Any]):
        """`settings`: those of the run, which are shown there. Nothing is written before the first number."""
        try:
            import wandb

            quiet: Any = {"silent": True, "console": "off"}
            limits: Any = {"init_timeout": 30, "finish_timeout": 60, "finish_timeout_raises": True}
            mode: Any = wandb.setup(wandb.Settings(**quiet, **limits)).settings.mode
            if mode not in ("offline", "dryrun", "disabled") and not wandb.login(prompt=False):
                raise UserError("train.wandb = True needs a login: `wandb login`, or set WANDB_MODE=offline")
        except ImportError:
            raise UserError("train.wandb = True needs a missing package: pip install -e '.[wandb]'") from None
        except ValueError as error:  # of a variable WANDB_...
            raise UserError(f"train.wandb = True: {' '.join(str(error).split())}") from None
        except wandb.Error as error:  # after 10 s without a network
            print(f"WARNING: wandb: {error} Kept for `wandb sync {workdir}/wandb/offline-run-*`.", flush=True)
            mode = "offline"
        self._id, self._is_on = workdir / "wandb" / "id", True
        self._run: Any = None
        self._init = partial(
            wandb.init, dir=workdir, mode=mode, config=settings, allow_val_change=True, resume="allow",
            project=os.environ.get("WANDB_PROJECT", "gpt_jax"),
            name=os.environ.get("WANDB_NAME", workdir.absolute().name),
            reinit="create_new",  # leaves a run of the user's own in this process alone
        )  # fmt: skip

    def write(self, record: Record) -> None:
        """Log a record. Its "step" is the horizontal axis: a step that is done again is logged again."""
        self._attempt(lambda: self._begun().log(record))

    def amend(self, step: int, values: Record) -> None:
        """Log more numbers for an earlier step."""
        self.write(values | {"step": step})

    def sync(self) -> None:
        """Do nothing: what was logged outlives this process."""

    def close(self) -> None:
        """Wait until all is sent, a minute at most."""
        if self._run:
            self._attempt(self._run.finish)

    def _begun(self) -> Any:
        if not self._run:
            if not self._id.exists():
                self._id.parent.mkdir(exist_ok=True)
                write_durably(self._id, uuid.uuid4().hex)
            self._run = self._init(id=self._id.read_text(encoding="utf-8"))
            self._run.define_metric("*", step_metric="step")
        return self._run

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            if self._is_on:
                action()
        except Exception as error:  # lost numbers are no reason to lose a run
            self._is_on = False
            print(f"\nWARNING: wandb: {' '.join(str(error).split())}; its numbers are incomplete", flush=True)
