"""Train for a given time while something kills, signals and corrupts at random; nothing may be lost.

    taskset -c 0 python benchmarks/soak.py --minutes 60

One run after another is trained to its end by `train.py`, each disturbed at random instants: SIGKILL,
SIGTERM or Ctrl-C (often twice), and between two processes now and then a damaged file in the newest
checkpoint. Half of the runs have long evaluations, and most of their faults come in the four seconds after
the first one begins. A quarter reads its batches from token files. At its end a run must equal the
undisturbed one bit for bit: parameters, optimizer state, metrics, samples, and the losses of its best
checkpoint. Prints a line for each run, and the counts at the end; exit status 1 if anything differs.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from disturb import Training, differences, result_of, spoil_something, steps_of, undisturbed, write_text

from gpt_jax.data.documents import find_documents
from gpt_jax.data.prepare import prepare
from gpt_jax.storage.checkpoints import Checkpoints

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXPECTED = {signal.SIGKILL: {-9, 0}, signal.SIGTERM: {143, 0}, signal.SIGINT: {130, 0}}

TOKEN_FILES = "token files"
# Settings besides those of `disturb.SETTINGS`, and the length of the text. A tenth of it is for validation.
RECIPES: dict[str, tuple[dict[str, Any], int]] = {
    "short evaluations": ({}, 3_000),
    "long evaluations": ({}, 600_000),
    "a part, then all": ({"train.eval_tokens": 15_000}, 600_000),
    TOKEN_FILES: ({"data.batches": "host"}, 30_000),
}
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def disturbed_run(
    workdir: Path,
    text: Path,
    settings: dict[str, Any],
    evaluates_long: bool,
    chance: random.Random,
    cache: dict[str, str],
    counts: collections.Counter[str],
) -> list[str]:
    """Train one run to its end, disturbing it; what went wrong."""
    problems = []
    for _ in range(chance.randrange(1, 6)):  # processes before the one that is left in peace
        cached = chance.random() < 0.8
        unfinished = unfinished_step(workdir)
        training = Training(workdir, text, settings, environment=cache if cached else UNCACHED)
        number = chance.choice(SIGNALS)
        # Most of a process is imports and compilation: three quarters of the faults come after those begin.
        if evaluates_long and chance.random() < 0.75:
            training.wait_for("compile evaluation")
            time.sleep(chance.uniform(0, 4))
        else:
            if chance.random() < 0.75:
                training.wait_for("compile")
            time.sleep(chance.uniform(0, 5 if cached else 15))
        alive = training.process.poll() is None
        training.send(number)
        twice = number != signal.SIGKILL and chance.random() < 0.3
        if twice:
            time.sleep(chance.uniform(0, 0.5))
            training.send(number)
            counts["second signals"] += alive
        counts["kills" if number == signal.SIGKILL else "signals"] += alive
        status = training.wait()
        early = "compile" not in training.output  # before its handlers are installed, a signal kills it
        late = "done in" in training.output  # and so does one that comes after they are removed
        allowed = (
            EXPECTED[number]
            | ({-number} if early or late or twice else set())
            | ({1, 130} if early else set())
        )
        if status not in allowed:
            problems.append(f"status {status} after {number.name}: {training.output[-2000:]}")
        counts["signals in evaluations"] += unfinished_step(workdir) not in (None, unfinished)
        steps = steps_of(workdir)
        if len(steps) >= 2 and chance.random() < 0.35:
            what = spoil_something(workdir / "checkpoints" / str(steps[-1]), chance)
            counts["corruptions"] += 1
            training = Training(workdir, text, settings, environment=cache)
            if training.wait() != 0 or f"checkpoints/{steps[-1]} is damaged" not in training.output:
                problems.append(f"{what} in {steps[-1]} went unnoticed: {training.output[-2000:]}")
    training = Training(workdir, text, settings, environment=cache)
    if training.wait() != 0:
        problems.append(f"lost: {training.output[-2000:]}")
    return problems


def unfinished_step(workdir: Path) -> int | None:
    """The newest step, if a signal interrupted its evaluation, sample or plot; else None."""
    steps = steps_of(workdir)
    if not steps:
        return None
    checkpoints = Checkpoints(workdir / "checkpoints")
    metadata = checkpoints.metadata(steps[-1])
    checkpoints.close()
    return None if metadata["unfinished"] is None else steps[-1]


def main() -> int:
    """Soak, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here, too")
    flags = parser.parse_args()
    os.environ |= UNCACHED
    # Bits are promised on one thread only.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    chance = random.Random(flags.seed)
    counts: collections.Counter[str] = collections.Counter()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        cache = {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(base / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        texts, wanted = {}, {}
        for name in flags.recipes:
            settings, length = RECIPES[name]
            texts[name] = write_text(base / f"{name}.txt", length)
            if name == TOKEN_FILES:
                prepare(find_documents(texts[name]), "bpe:280", base / "tokens", 0.9)
                texts[name] = base / "tokens"
            undisturbed(base / name, texts[name], settings)
            wanted[name] = result_of(base / name)
        while time.monotonic() - begun < 60 * flags.minutes:
            workdir = base / f"disturbed{counts['runs']}" / "run"
            name = chance.choice(flags.recipes)
            settings, length = RECIPES[name]
            problems = disturbed_run(
                workdir, texts[name], settings, length > 100_000, chance, cache, counts
            )  # fmt: skip
            counts["runs"] += 1
            if problems:
                counts["runs lost"] += 1
            else:
                problems = [f"{what} differs" for what in differences(result_of(workdir), wanted[name])]
                counts["runs that differ"] += bool(problems)
            for problem in problems:
                print(f"{name}: {problem}", flush=True)
            print(f"{(time.monotonic() - begun) / 60:5.1f} min  {dict(counts)}", flush=True)
            if not problems:
                shutil.rmtree(workdir.parent)
    names = (
        "runs", "kills", "signals", "second signals", "signals in evaluations", "corruptions", "runs lost",
        "runs that differ",
    )  # fmt: skip
    result = {name: counts[name] for name in names} | {"minutes": round((time.monotonic() - begun) / 60, 1)}
    print(json.dumps(result))
    if flags.json:
        flags.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return int(counts["runs lost"] + counts["runs that differ"] > 0)


if __name__ == "__main__":
    sys.exit(main())
