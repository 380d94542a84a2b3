"""How soon is a validation loss reached, and how soon by nanoGPT's own recipe for a CPU?

    python benchmarks/time_to_loss.py --target 1.88
    python benchmarks/time_to_loss.py --target 1.88 --nanogpt ../nanoGPT --nanogpt_python ../torch/bin/python

Each side is a process of its own, several times, in turn. The seconds are this program's, from the start of a
process until an evaluation at or below the target is seen, so imports and compilation count. A run that has
reached the target is ended; one that never does takes the time to its end. Our loss is that of the whole
validation split; nanoGPT's is what it prints, an estimate from a few random batches.

On a machine that does other work besides, the threads of both wait for each other, PyTorch's much longer:
such figures mean nothing. Exit status 1 if ours does not reach the target.

More settings for our run are given as with train.py: --config.train.eval_every=100.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facts import OURS, REPOSITORY, check_writable, commit, machine, versions

from gpt_jax.commands.run_main import run_main
from gpt_jax.errors import RunError, UserError
from gpt_jax.monitor.metrics import read_metrics
from gpt_jax.paths import ARTIFACTS

Evaluation = dict[str, float]  # "step", "loss", and "seconds" since the process was started
EvaluationsAfter = Callable[[str], list[Evaluation]]


@dataclass(frozen=True)
class TimedRun:
    """The result of one process."""

    who: str
    command: str
    seconds: float  # to the target, or to the end
    reached: bool
    lowest: float
    evaluations: list[Evaluation]


def watch(
    who: str,
    command: Sequence[str],
    target: float,
    evaluations_after: EvaluationsAfter,
    shown: str,
    **process_options: Any,
) -> TimedRun:
    """Run a command until an evaluation is at or below `target`, then end it; without one, to its own end.

    Args:
        who: a name for the result.
        command: what to start.
        target: nats per character.
        evaluations_after: the evaluations that are new with a line of its output.
        shown: the command for a person, without this machine's paths.
        **process_options: of `subprocess.Popen`.

    Raises:
        RunError: the process failed, or never evaluated.
    """
    seen: list[Evaluation] = []
    last_line = "no output"
    begun = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", **process_options
    )
    assert process.stdout is not None
    try:
        reached = False
        for line in process.stdout:
            seconds = round(time.monotonic() - begun, 3)
            last_line = line.strip() or last_line
            for evaluation in evaluations_after(line):
                seen.append(evaluation | {"seconds": seconds})
                reached = reached or evaluation["loss"] <= target
            if reached:
                break
        else:
            process.wait()
            seconds = round(time.monotonic() - begun, 3)
    finally:
        process.kill()
        process.communicate()
    if not reached and (process.returncode or not seen):
        raise RunError(f"{shown}: exit status {process.returncode}, {len(seen)} evaluations: {last_line}")
    return TimedRun(who, shown, seconds, reached, min(e["loss"] for e in seen), seen)


def follow(workdir: Path) -> EvaluationsAfter:
    """For `watch`: a line of train.py's output says that something happened, its metrics.jsonl says what."""
    n_seen = 0

    def evaluations_after(line: str) -> list[Evaluation]:
        nonlocal n_seen
        records = [record for record in read_metrics(workdir / "metrics.jsonl") if "val_loss" in record]
        new, n_seen = records[n_seen:], len(records)
        return [
            {"step": r["step"], "loss": r["val_loss"], "seconds_by_its_own_clock": r["seconds"]} for r in new
        ]

    return evaluations_after


def time_ours(
    config: Path, settings: Sequence[str], target: float, workdir: Path, environment: Mapping[str, str]
) -> TimedRun:
    """Run train.py."""
    program, arguments = REPOSITORY / "train.py", [f"--config={config}", f"--workdir={workdir}", *settings]
    shown = f"python train.py --config={_short(config)} {shlex.join(settings)}".rstrip()
    return watch(
        "gpt_jax", [sys.executable, str(program), *arguments], target, follow(workdir), shown, env=environment
    )


def nanogpt_evaluations(line: str) -> list[Evaluation]:
    """The evaluation in a line that nanoGPT prints, if it is one."""
    found = re.match(r"step (\d+): train loss (\S+), val loss (\S+)", line)
    return [{"step": int(found[1]), "loss": float(found[3])}] if found else []


def absolute_program(name: str) -> str:
    """A program that can be started from any folder; a link stays one, as a virtual environment's is."""
    return os.path.abspath(shutil.which(name) or name)


def prepare_nanogpt(checkout: Path, python: str, copy: Path) -> list[str]:
    """Copy a checkout, put our text in its place, and give the recipe for a CPU that its README has.

    Raises:
        UserError: this is no checkout of nanoGPT.
        RunError: its data cannot be prepared.
    """
    readme = checkout / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    recipe = re.search(r"^python (train\.py .*--device=cpu .*)$", text, flags=re.MULTILINE)
    if recipe is None:
        raise UserError(f"nanogpt = {checkout} has no README.md with a recipe for a CPU: name a checkout")
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "*.ipynb", "assets"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(ARTIFACTS / "input.txt", data)
    # It imports requests to download a text that is there: an empty one will do, and cannot download.
    (data / "requests.py").touch()
    done = subprocess.run([python, data / "prepare.py"], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RunError(f"{data / 'prepare.py'}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return shlex.split(recipe[1])


def time_nanogpt(
    checkout: Path, arguments: Sequence[str], python: str, target: float, environment: Mapping[str, str]
) -> TimedRun:
    """Run nanoGPT's train.py in its prepared copy."""
    with tempfile.TemporaryDirectory() as out:
        command = [python, *arguments, f"--out_dir={out}"]
        shown = shlex.join(["python", *arguments])
        return watch("nanoGPT", command, target, nanogpt_evaluations, shown, cwd=checkout, env=environment)


def summarize(runs: Sequence[TimedRun]) -> dict[str, Any]:
    """Medians, and their ratio: a lower bound where nanoGPT missed the target, None where ours did."""
    medians, not_reached, lowest = {}, {}, {}
    for who in sorted({run.who for run in runs}):
        of_who = [run for run in runs if run.who == who]
        medians[who] = statistics.median(run.seconds for run in of_who)
        not_reached[who] = sum(not run.reached for run in of_who)
        lowest[who] = min(run.lowest for run in of_who)
    ratio = None
    if "nanoGPT" in medians and not not_reached["gpt_jax"]:
        ratio = round(medians["nanoGPT"] / medians["gpt_jax"], 2)
    return {
        "median_seconds": medians,
        "not_reached": not_reached,
        "lowest": lowest,
        "nanogpt_over_gpt_jax": ratio,
    }


def describe(runs: Sequence[TimedRun], target: float) -> str:
    """The summary for a person."""
    summary = summarize(runs)
    lines = []
    for who, median in summary["median_seconds"].items():
        of_who = [run for run in runs if run.who == who]
        values = ", ".join(f"{run.seconds:.1f}" for run in of_who)
        lines.append(f"{who}: median {median:.1f} s to {target:g} ({values})")
        if n := summary["not_reached"][who]:
            lines[-1] += (
                f"; not reached in {n} of {len(of_who)} runs, whose time is to their end; "
                f"lowest {summary['lowest'][who]:.4f}"
            )
    if summary["nanogpt_over_gpt_jax"] is not None:
        bound = "at least " if summary["not_reached"]["nanoGPT"] else ""
        lines.append(f"ratio: gpt_jax is {bound}{summary['nanogpt_over_gpt_jax']:.2f} times sooner")
    return "\n".join(lines)


def main() -> int:
    """Time both in turn; print and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    flag = parser.add_argument
    flag("--target", type=float, default=1.88, help="nats per character (%(default)s)")
    flag("--config", type=Path, default=REPOSITORY / "configs" / "shakespeare_quick.py", help="our recipe")
    flag("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, to run in turn")
    flag(
        "--nanogpt_python",
        type=absolute_program,
        default=sys.executable,
        metavar="PYTHON",
        help="a Python that has torch",
    )
    flag("--repeats", type=int, default=3, help="runs of each (%(default)s)")
    flag("--json", type=Path, metavar="FILE", help="write everything here")
    flags, settings = parser.parse_known_args()
    if strange := [setting for setting in settings if not setting.startswith("--config.")]:
        raise UserError(f"unexpected argument {strange[0]!r}")
    if flags.repeats < 1:
        raise UserError(f"repeats = {flags.repeats} must be 1 or above")

    # A cache of compiled programs would hide what a first run takes; unbuffered, lines come when printed.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONUNBUFFERED": "1"}
    report: dict[str, Any] = {
        "target": flags.target,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"gpt_jax": versions(sys.executable, *OURS)},
    }
    if flags.json:
        check_writable("json", flags.json)
    if report["machine"]["load"] > report["machine"]["cores"] / 2:
        print(f"WARNING: this machine is busy (load {report['machine']['load']})", file=sys.stderr)
    runs: list[TimedRun] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        copy = folder / "nanoGPT"
        recipe: list[str] = []
        if flags.nanogpt:
            recipe = prepare_nanogpt(flags.nanogpt, flags.nanogpt_python, copy)
            report["versions"]["nanoGPT"] = versions(flags.nanogpt_python, "torch", "numpy")
        for i in range(flags.repeats):
            workdir = folder / f"run{i}"
            runs.append(time_ours(flags.config.resolve(), settings, flags.target, workdir, environment))
            print(_describe_run(runs[-1]), flush=True)
            if flags.nanogpt:
                runs.append(time_nanogpt(copy, recipe, flags.nanogpt_python, flags.target, environment))
                print(_describe_run(runs[-1]), flush=True)
            if flags.json:  # after each pair: hours of runs are not lost with the last one
                report |= summarize(runs) | {"runs": [asdict(run) for run in runs]}
                flags.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(describe(runs, flags.target))
    return int(summarize(runs)["not_reached"]["gpt_jax"] > 0)


def _describe_run(run: TimedRun) -> str:
    came = "reached" if run.reached else "not reached"
    last = run.evaluations[-1]
    return f"{run.who}: {came} after {run.seconds:.1f} s, step {last['step']:,}; lowest {run.lowest:.4f}"


def _short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path.name)


if __name__ == "__main__":
    sys.exit(run_main(main))
