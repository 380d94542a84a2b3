"""Progress on the terminal: a bar, or lines where the output is not a terminal."""

import os
import sys
import time
from typing import Any, Self, TextIO

from tqdm import tqdm

from gpt_jax.monitor.output import raw, visible
from gpt_jax.records import Record, selection_loss


class Terminal:
    """A progress bar where the output is a terminal, and a line every few seconds where it is not."""

    def __init__(self, first_step: int, steps: int, seconds_between_lines: float = 10.0):
        self._bar: Any = None
        self._between = seconds_between_lines
        self._printed_at = 0.0
        self._steps = steps
        self._begun = ""  # a line whose end has not been written yet
        if sys.stdout.isatty():
            self._bar = _bar(sys.stdout, total=steps, initial=first_step, unit="step")

    def write(self, text: str, end: str = "\n") -> None:
        """Like `print`, above the bar. A line without an end is shown beside the bar until the rest comes."""
        if self._bar is None:
            print(text, end=end, flush=True)
        elif end:
            # To the bar's own stream: tqdm then takes the bar away first.
            self._bar.write(visible(self._begun + text), file=raw(sys.stdout))
            self._begun = ""
            self._bar.set_description_str("")
        else:
            self._begun += text
            self._bar.set_description_str(visible(self._begun))

    def set_steps(self, steps: int) -> None:
        """The run will have so many steps."""
        self._steps = steps
        if self._bar is not None:
            self._bar.total = steps
            self._bar.refresh()

    def progress(self, record: Record, losses: Record, seconds_left: float) -> None:
        """Show the newest numbers of the run, and the losses of its newest evaluation."""
        name = "val_part" if "val_loss_part" in losses else "val"
        val_loss = selection_loss(losses)
        shown = {
            "loss": f"{record['train_loss']:.3f}",
            name: "-" if val_loss is None else f"{val_loss:.3f}",
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


class LoadingBar:
    """How much of a text is read, to be called with the bytes that are done and all bytes.

    A terminal shows a bar from the first second on; where there is none, a line comes every few seconds. So a
    small text shows nothing.
    """

    def __init__(self, stream: TextIO | None = None, seconds_between_lines: float = 5.0):
        """`stream`: where to; None: stdout."""
        self._stream = sys.stdout if stream is None else stream
        self._bar: Any = None
        self._between = seconds_between_lines
        self._printed_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show it."""
        if self._stream.isatty():
            if self._bar is None:
                options = {"unit": "B", "unit_scale": True, "delay": 1, "leave": False}
                self._bar = _bar(self._stream, total=total, desc="text", **options)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._printed_at >= self._between:
            self._printed_at = time.monotonic()
            print(f"text    {done / total:.0%} of {total:,} bytes read", file=self._stream, flush=True)

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(stream: TextIO, **options: Any) -> Any:
    # A terminal of unknown size reports 0 columns, and tqdm would draw nothing.
    columns = os.get_terminal_size(stream.fileno()).columns
    size = {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}
    return tqdm(file=raw(stream), **size, **options)


def show_time(seconds: float) -> str:
    """`7 s`, `4 min 05 s`, `16 h 40 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
