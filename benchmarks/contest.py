"""A contest: programs that do the same work, in turn, on one machine.

Each contender is a process of its own that stays: it prepares, says that it is ready, then does one piece of
work each time it is told to, and answers with the seconds that it took. In every round each does one piece,
so that what slows the machine down for a while slows all of them down. Only one works at a time.

A worker is a program with one argument, its task as JSON. It prints a line of JSON with its facts when it is
ready, and then, for each line that it reads, one piece's seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facts import OURS, REPOSITORY, check_writable, commit, machine, versions
from time_to_loss import absolute_program

from gpt_jax.errors import RunError, UserError

BENCHMARKS = REPOSITORY / "benchmarks"


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
        name: for people.
        worker: the file in this folder that does the work.
        task: what the worker is told.
        python: that runs the worker.
        flops: floating-point operations of one piece of work; 0 if they say nothing.
        units: how much one piece is, such as characters.
    """

    name: str
    worker: str
    task: Mapping[str, Any]
    python: str = sys.executable
    flops: float = 0.0
    units: float = 1.0


@dataclass
class Result:
    """What came of a contender: the seconds of each piece of work, and what its worker said of itself."""

    contender: Contender
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds for a piece of work."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """Seconds for the fastest piece: what counts for a ceiling."""
        return min(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        of = self.contender
        numbers = {"median": self.median, "min": self.fastest, "max": max(self.seconds)}
        work = {"units": of.units, "flops": of.flops, "facts": self.facts, "seconds": self.seconds}
        return {"name": of.name, **numbers, **work}


class Worker:
    """A contender's process."""

    def __init__(self, contender: Contender):
        self.contender = contender
        command = [contender.python, str(BENCHMARKS / contender.worker), json.dumps(contender.task)]
        # One pipe for both outputs: a second one, which nobody reads, would fill up and block the worker.
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=both, encoding="utf-8")
        self.facts = self._answer()

    def work(self) -> float:
        """Do one piece of work; its seconds."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # reading the answer says why
        return float(self._answer())

    def end(self) -> None:
        """End the process; without input it ends by itself, and removes what it has written."""
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        last = "no output"
        while line := self.process.stdout.readline():
            try:
                return json.loads(line)
            except ValueError:  # a library's own output, or an error
                last = line.strip() or last
        self.process.wait()
        raise RunError(f"{self.contender.name} failed: exit status {self.process.returncode}: {last}")


def compete(contenders: Sequence[Contender], repeats: int) -> dict[str, Result]:
    """Let contenders work in turn, each once to warm up and then `repeats` times.

    Raises:
        RunError: one of them failed.
    """
    workers: list[Worker] = []
    results = {contender.name: Result(contender) for contender in contenders}
    try:
        for contender in contenders:
            workers.append(Worker(contender))
            results[contender.name].facts = workers[-1].facts
            workers[-1].work()
        for _ in range(repeats):
            for worker in workers:
                results[worker.contender.name].seconds.append(worker.work())
    finally:
        for worker in workers:
            worker.end()
    return results


def ceilings(is_smoke: bool) -> list[Contender]:
    """What this machine can do at most: matrix products, and reading and writing memory, in XLA."""
    size, numbers, times = (256, 2**20, 1) if is_smoke else (2048, 2**26, 5)
    product = {"task": "product", "size": size, "times": times}
    copy = {"task": "copy", "numbers": numbers, "times": times}
    return [
        Contender("matrix product", "worker_gpt_jax.py", product, flops=2.0 * times * size**3),
        Contender("copy", "worker_gpt_jax.py", copy, units=8.0 * times * numbers),
    ]


def make_parser(description: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """The flags that all programs share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    flag = parser.add_argument
    flag("--repeats", type=int, default=repeats, help="how often each thing is measured (%(default)s)")
    flag("--json", type=Path, metavar="FILE", help="write everything here")
    return parser


def add_nanogpt(parser: argparse.ArgumentParser) -> None:
    """The flags that let nanoGPT take part."""
    flag = parser.add_argument
    flag("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, to run in turn")
    flag(
        "--nanogpt_python", type=absolute_program, default=sys.executable, metavar="PYTHON",
        help="a Python that has torch",
    )  # fmt: skip


def begin_report(flags: argparse.Namespace) -> dict[str, Any]:
    """Check the flags; the facts that stand beside the numbers.

    Raises:
        UserError: an invalid flag.
    """
    if flags.repeats < 1:
        raise UserError(f"repeats = {flags.repeats} must be 1 or above")
    for name, needed in (("nanogpt", "model.py"), ("llama2c", "run.c"), ("llama2c", "runq.c")):
        folder = getattr(flags, name, None)
        if folder and not (folder / needed).is_file():
            raise UserError(f"{name} = {folder} has no {needed}: name a checkout")
    if flags.json:
        check_writable("json", flags.json)
    if plot := getattr(flags, "plot", None):
        if plot.suffix != ".png":
            raise UserError(f"plot = {plot} must end in .png")
        check_writable("plot", plot)
    found = machine()
    if found["load"] > found["cores"] / 2:
        print(f"WARNING: this machine is busy (load {found['load']})", file=sys.stderr)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": found,
        "versions": {"gpt_jax": versions(sys.executable, *OURS)}, "tables": {},
    }  # fmt: skip
    if getattr(flags, "nanogpt", None):
        report["versions"]["nanoGPT"] = versions(flags.nanogpt_python, "torch", "numpy")
    return report


def write_report(flags: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write what there is so far; hours of work are not lost with the last table."""
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of equal width, the first flush left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip(), flush=True)
