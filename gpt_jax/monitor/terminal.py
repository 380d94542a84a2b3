"""The terminal during training: a progress bar, or lines where the output is not a terminal."""

import os
import sys
from typing import Any

from tqdm import tqdm

from gpt_jax.monitor.metrics import Record


class Terminal:
    """A progress bar where the output is a terminal, and a line every few seconds where it is not."""

    def __init__(self, first_step: int, steps: int, seconds_between_lines: float = 10.0):
        self._bar: Any = None
        self._between = seconds_between_lines
        self._printed_at = 0.0
        self._steps = steps
        self._begun = ""  # a line whose end has not been written yet
        if sys.stdout.isatty():
            # A terminal of unknown size reports 0 columns, and tqdm would draw nothing.
            columns = os.get_terminal_size(sys.stdout.fileno()).columns
            self._bar = tqdm(
                total=steps,
                initial=first_step,
                file=sys.stdout,
                unit="step",
                **({"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}),
            )

    def write(self, text: str, end: str = "\n") -> None:
        """Like `print`, above the bar. A line without an end is shown beside the bar until the rest comes."""
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
