"""How long a user waits for the first character and for the first training step, cold and warm.

    python benchmarks/waiting.py [--config FILE] [--workdir MODEL] [--repeats 3] [--json FILE]

Each repeat begins with an empty cache of compiled programs (cold) and runs the same two commands again
(warm): sample.py until its first character, and train.py until its first step is done. Seconds count from the
start of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import OURS, REPOSITORY, check_writable, commit, machine, versions

from gpt_jax.commands.paths import ARTIFACTS
from gpt_jax.commands.run_main import run_main
from gpt_jax.errors import RunError, UserError
from gpt_jax.monitor.metrics import read_metrics

# Two steps, and little besides: no sample text, and a small validation split.
SHORT = (
    "--config.train.steps=2", "--config.train.eval_every=2", "--config.train.log_every=1",
    "--config.train.sample_length=0", "--config.optimizer.warmup_steps=1",
    "--config.data.train_fraction=0.999",
)  # fmt: skip


def main() -> int:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--config", type=Path, default=REPOSITORY / "configs" / "shakespeare_cpu.py", help="to train by")
    flag("--workdir", type=Path, default=ARTIFACTS / "pretrained", help="the model to sample from")
    flag("--repeats", type=int, default=3, help="(%(default)s)")
    flag("--json", type=Path, metavar="FILE", help="write everything here")
    flags = parser.parse_args()
    if flags.repeats < 1:
        raise UserError(f"repeats = {flags.repeats} must be 1 or above")
    if flags.json:
        check_writable("json", flags.json)
    seconds: dict[str, list[float]] = {}
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine(),
        "versions": versions(sys.executable, *OURS), "seconds": seconds,
    }  # fmt: skip
    for _ in range(flags.repeats):
        with tempfile.TemporaryDirectory() as place:
            environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": place}
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            for state in ("cold", "warm"):
                taken = {
                    "first character": first_character(flags.workdir, Path(place), environment),
                    "first step": first_step(flags.config, Path(place, f"run_{state}"), environment),
                }
                for what, took in taken.items():
                    seconds.setdefault(f"{what}, {state}", []).append(round(took, 2))
                    print(f"{what}, {state}: {took:.2f} s", flush=True)
    for name, values in sorted(seconds.items()):
        print(f"median of {len(values)}: {name} {statistics.median(values):.2f} s")
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def first_character(workdir: Path, place: Path, environment: dict[str, str]) -> float:
    """Seconds from the start of sample.py until it has written a character.

    Raises:
        RunError: it wrote none.
    """
    command = [
        sys.executable, str(REPOSITORY / "sample.py"), "--length=20", f"--workdir={workdir}",
        f"--out={place / 'output.txt'}",
    ]  # fmt: skip
    begun = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        character = process.stdout.read(1)
        took = time.monotonic() - begun
        _, errors = process.communicate()
    if not character or process.returncode:
        raise RunError(f"sample.py ended with exit status {process.returncode}: {errors.decode().strip()}")
    return took


def first_step(config: Path, workdir: Path, environment: dict[str, str]) -> float:
    """Seconds from the start of train.py until its first step is done.

    Raises:
        RunError: it failed.
    """
    command = [
        sys.executable, str(REPOSITORY / "train.py"), f"--config={config}", f"--workdir={workdir}", *SHORT,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RunError(f"train.py ended with exit status {done.returncode}: {done.stderr.strip()}")
    return read_metrics(workdir / "metrics.jsonl")[0]["seconds"]


if __name__ == "__main__":
    sys.exit(run_main(main))
