"""Where the numbers of a run go: the terminal, `metrics.jsonl`, `loss.png`, TensorBoard."""

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt_jax.errors import UserError
from gpt_jax.integrity import write_durably

Record = dict[str, float]


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, one line a step, steps rising."""

    def __init__(self, path: Path, first_step: int):
        """Open to append after `first_step`; lines beyond it (of steps to be done again) go out."""
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= first_step]
        write_durably(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a record that has a "step"."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force what is written onto the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; lines that a kill tore or a disk spoiled are left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if _is_record(record):
                records.append(record)
    return records


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() >= {"step", "seconds", "train_loss"}
        and all(type(number) in (int, float) for number in value.values())
    )


class SamplesFile:
    """`samples.txt`: what the model wrote at each evaluation, under a line with its losses."""

    def __init__(self, path: Path, first_step: int):
        """Open to append after `first_step`; samples beyond it go out."""
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


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Whether a loss is half a nat, and six standard deviations, above the mean of those before it."""
    return len(recent) >= 5 and loss > float(np.mean(recent)) + max(0.5, 6 * float(np.std(recent)))


def best_record(validated: list[Record]) -> Record:
    """Of records with a "val_loss" the one with the lowest; NaN counts as the highest."""
    return min(validated, key=lambda r: r["val_loss"] if math.isfinite(r["val_loss"]) else math.inf)


class TensorBoard:
    """The same numbers as TensorBoard events."""

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "train.tensorboard = True needs a package that is missing: pip install -e '.[tensorboard]'"
            ) from None
        # The folder comes into being with the first number, not before the settings are checked.
        self._make_writer = lambda: SummaryWriter(str(folder))
        self._writer: Any = None

    def write(self, record: Record) -> None:
        """Write every number of a record at its step."""
        self._writer = self._writer or self._make_writer()
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def sync(self) -> None:
        """Hand what is written to the system."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._writer:
            self._writer.close()


class Terminal:
    """A progress bar where the output is a terminal; plain lines now and then where it is not."""

    def __init__(self, first_step: int, steps: int, seconds_between_lines: float = 10.0):
        self._bar: Any = None
        self._between = seconds_between_lines
        self._printed_at = 0.0
        self._steps = steps
        self._begun = ""  # a line without an end so far
        if sys.stdout.isatty():
            # A terminal that does not know its size says 0, and tqdm would draw nothing.
            columns = os.get_terminal_size(sys.stdout.fileno()).columns
            self._bar = tqdm(
                total=steps,
                initial=first_step,
                file=sys.stdout,
                unit="step",
                **({"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}),
            )

    def write(self, text: str, end: str = "\n") -> None:
        """Like `print`, above the bar; a line without an end stands beside the bar until the rest comes."""
        if self._bar is None:
            print(text, end=end, flush=True)
        elif end:
            self._bar.write(self._begun + text)
            self._begun = ""
            self._bar.set_description_str("")
        else:
            self._begun += text
            self._bar.set_description_str(self._begun)

    def progress(self, record: Record, val_loss: float | None, seconds_left: float) -> None:
        """Show the newest numbers of the run."""
        shown = {
            "loss": f"{record['train_loss']:.3f}",
            "val": "-" if val_loss is None else f"{val_loss:.3f}",
            "tok/s": f"{record['tokens_per_second']:,.0f}",
            **({"mfu": f"{record['mfu']:.0%}"} if "mfu" in record else {}),
        }
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(int(record["step"]) - self._bar.n)
        elif record["seconds"] - self._printed_at >= self._between:
            self._printed_at = record["seconds"]
            numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
            step = f"step {record['step']:,.0f}/{self._steps:,}"
            print(f"{step}  {numbers}  {show_time(seconds_left)} left", flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def show_time(seconds: float) -> str:
    """`7 s`, `4 min 05 s`, `16 h 40 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def plot_losses(metrics: Path, picture: Path, title: str) -> None:
    """Draw the training and the validation loss of a `metrics.jsonl` over the steps."""
    from matplotlib.figure import Figure  # slow to import, and not needed to train

    records = read_metrics(metrics)
    validated = [record for record in records if "val_loss" in record]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, color, rows, key in (
        ("training", "tab:blue", records, "train_loss"),
        ("validation", "tab:orange", validated, "val_loss"),
    ):
        marker = "o" if key == "val_loss" else None
        steps, losses = [row["step"] for row in rows], [row[key] for row in rows]
        axes.plot(steps, losses, label=label, color=color, marker=marker, markersize=4)
    if validated:
        best = best_record(validated)
        axes.axhline(best["val_loss"], color="tab:orange", linewidth=0.8, linestyle=":")
        title += f": best validation loss {best['val_loss']:.4f} at step {best['step']:,.0f}"
    axes.set(xlabel="step", ylabel="loss, nats per character", title=title)
    axes.title.set_parse_math(False)  # a folder may be called "$x$"
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = picture.with_name("." + picture.name)
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, picture)
