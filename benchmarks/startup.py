"""How long a user waits for the first character and for the first training step, and what takes that time.

    python benchmarks/startup.py [--config FILE] [--workdir MODEL] [--length 10000] [--json FILE]

Each repeat begins with an empty cache of compiled programs (cold) and runs the same commands again (warm):
sample.py until its first character, and train.py until its first step is done; last, sample.py with a whole
text. Seconds count from the start of the process. For comparison, a process that imports JAX and reads the
model's file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from contest import begin_report, make_parser, print_table, write_report
from facts import REPOSITORY

from gpt_jax.commands.run_main import run_main
from gpt_jax.errors import RunError, UserError
from gpt_jax.monitor.metrics import read_metrics
from gpt_jax.paths import ARTIFACTS

WORKER = REPOSITORY / "benchmarks" / "worker_startup.py"
PARTS = ("import", "data", "compile", "rest")
# Two steps, and little besides: no sample text, and a small validation split.
SHORT = (
    "--config.train.steps=2", "--config.train.eval_every=2", "--config.train.log_every=1",
    "--config.train.sample_length=0", "--config.optimizer.warmup_steps=1",
    "--config.data.train_fraction=0.999",
)  # fmt: skip
Seconds = dict[str, float]  # in all, and of each part; "cached": how many programs the cache had


def main() -> int:
    """Measure, and print medians."""
    parser = make_parser(__doc__, repeats=3)
    flag = parser.add_argument
    flag("--config", type=Path, default=REPOSITORY / "configs" / "shakespeare_cpu.py", help="to train by")
    flag("--workdir", type=Path, default=ARTIFACTS / "pretrained", help="the model to sample from")
    flag("--length", type=int, default=10_000, help="characters of the whole text (%(default)s)")
    flags = parser.parse_args()
    if flags.length < 1:
        raise UserError(f"length = {flags.length} must be 1 or above")
    report = begin_report(flags)
    for repeat in range(flags.repeats):
        with tempfile.TemporaryDirectory() as place:
            for name, seconds in measure(flags, Path(place)):
                report["tables"].setdefault(name, []).append(seconds)
                print(f"{repeat + 1} of {flags.repeats}: {name}: {seconds['total']:.2f} s", flush=True)
                write_report(flags, report)
    rows = [(name, *medians(repeats)) for name, repeats in report["tables"].items()]
    print_table("Seconds, medians", ("", "total", "spread", *PARTS, "cached programs"), rows)
    return 0


def measure(flags: argparse.Namespace, place: Path) -> Iterator[tuple[str, Seconds]]:
    """Each command once: its name, and the seconds of its parts."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(place)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    yield "import jax, read the model", {"total": import_jax(flags.workdir, environment)}
    for state in ("cold", "warm"):
        character, _ = sample(flags.workdir, 20, place, environment)
        yield f"first character, {state}", character
        yield f"first step, {state}", first_step(flags.config, place / f"run_{state}", environment)
    sample(flags.workdir, flags.length, place, environment)  # what the first command had no need to compile
    character, total = sample(flags.workdir, flags.length, place, environment)
    yield f"{flags.length:,} characters, warm: the first", character
    yield f"{flags.length:,} characters, warm", {"total": total}


def medians(repeats: Sequence[Seconds]) -> list[str]:
    """The median and spread of the total, and the median of each part, "" for one that was not measured."""

    def median(name: str, form: str = ".2f") -> str:
        return format(statistics.median(r[name] for r in repeats), form) if name in repeats[0] else ""

    totals = [repeat["total"] for repeat in repeats]
    spread = f"{min(totals):.2f} to {max(totals):.2f}"
    return [median("total"), spread, *map(median, PARTS), median("cached", "g")]


def import_jax(workdir: Path, environment: dict[str, str]) -> float:
    """Seconds for the least that a program with JAX can do."""
    files = f"pathlib.Path({str(workdir)!r}).rglob('*')"
    read = f"import jax, pathlib; [file.read_bytes() for file in {files} if file.is_file()]"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{workdir} cannot be read: {done.stderr.strip()}")
    return time.monotonic() - begun


def sample(workdir: Path, length: int, place: Path, environment: dict[str, str]) -> tuple[Seconds, float]:
    """Run sample.py: the parts of the seconds until it has written a character, and the seconds of the whole.

    Raises:
        RunError: it failed.
    """
    record, arguments = place / "moments.json", (f"--length={length}", f"--workdir={workdir}")
    begun = time.monotonic()
    command = [
        sys.executable, str(WORKER), str(begun), str(record), "sample", *arguments,
        f"--out={place / 'output.txt'}",
    ]  # fmt: skip
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        character = process.stdout.read(1)
        moment = time.monotonic()
        _, errors = process.communicate()
    if not character or process.returncode:
        raise RunError(f"sample.py ended with exit status {process.returncode}: {errors.decode().strip()}")
    return parts(record, begun, moment), time.monotonic() - begun


def first_step(config: Path, workdir: Path, environment: dict[str, str]) -> Seconds:
    """Run train.py: the parts of the seconds until its first step is done.

    Raises:
        RunError: it failed.
    """
    record = workdir.with_suffix(".json")
    begun = time.monotonic()
    command = [
        sys.executable, str(WORKER), str(begun), str(record), "train", f"--config={config}",
        f"--workdir={workdir}", *SHORT,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RunError(f"train.py ended with exit status {done.returncode}: {done.stderr.strip()}")
    return parts(record, begun, begun + read_metrics(workdir / "metrics.jsonl")[0]["seconds"])


def parts(record: Path, begun: float, moment: float) -> Seconds:
    """The seconds from `begun` until `moment`, and what they were spent on, as the worker wrote it down."""
    moments = json.loads(record.read_text(encoding="utf-8"))
    window = moments["imported"], moment
    compiling = covered(moments["compile"], *window)
    seconds = {
        "import": moments["imported"] - begun,
        "data": covered([*moments["data"], *moments["compile"]], *window) - compiling,
        "compile": compiling,
    }
    rest = moment - begun - sum(seconds.values())
    hits = sum(hit < moment for hit in moments["hits"])
    return {"total": moment - begun, **seconds, "rest": rest, "cached": hits}


def covered(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Seconds from `start` to `end` that lie in at least one span: JAX reports a part and the whole of it."""
    total = 0.0
    for first, last in sorted(spans):
        total += max(min(last, end) - max(first, start), 0.0)
        start = max(start, last)
    return total


if __name__ == "__main__":
    sys.exit(run_main(main))
