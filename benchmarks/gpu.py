"""The steps of benchmarks/gpu.sh, which gives each its time.

    python benchmarks/gpu.py STEP --out DIR --work DIR

A step measures one thing and writes DIR/STEP.json, with "ok" and, where it failed or its time was over,
"error" beside what it had found by then. The last step, summary, puts them all into summary.json.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from disturb import differences, result_of
from facts import OURS, REPOSITORY, commit, machine, versions
from time_to_loss import absolute_program, prepare_nanogpt

import gpt_jax
from gpt_jax.errors import RunError, UserError
from gpt_jax.monitor.metrics import read_metrics
from gpt_jax.parallel.devices import describe_devices

Result = dict[str, Any]

SMALL, BEST, FAITHFUL = "shakespeare_cpu", "shakespeare_best", "shakespeare"
# Evaluations are not counted in the time to a target, and a line for each step makes that time exact.
OFTEN = ("--config.train.eval_every=50", "--config.train.log_every=1")
# Of a dry run, after all other settings: a model of seconds.
TINY = (
    "--config.model.n_layer=1", "--config.model.n_head=2", "--config.model.d_model=16",
    "--config.model.d_mlp=0", "--config.model.context=16", "--config.train.steps=20",
    "--config.train.batch_size=8", "--config.train.grad_accum_steps=1", "--config.train.eval_every=10",
    "--config.optimizer.warmup_steps=2",
)  # fmt: skip
TINY_NANOGPT = (
    "--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
    "--max_iters=20",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where a step works, and on what."""

    out: Path
    work: Path
    dry: bool
    nanogpt: Path | None
    nanogpt_python: str

    @property
    def environment(self) -> dict[str, str]:
        """For all processes: the device that is to be measured, and nothing compiled before."""
        kept = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        if self.dry:
            return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        return kept | {"JAX_PLATFORMS": "cuda,cpu"}

    def training(self, config: str, workdir: Path, *settings: str) -> list[str]:
        """The command that trains a config of ours."""
        file = REPOSITORY / "configs" / f"{config}.py"
        if not file.is_file():
            raise UserError(f"configs/{config}.py is missing")
        # Text at each evaluation would have to be compiled, and proves nothing here.
        settings = ("--config.train.sample_length=0", *settings, *(TINY if self.dry else ()))
        program = str(REPOSITORY / "train.py")
        return [sys.executable, program, f"--config={file}", f"--workdir={workdir}", *settings]

    def run(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> str:
        """Run a command to its end; its output."""
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment | dict(environment or {}),
                cwd=folder,
            ).returncode
        text = log.read_text(encoding="utf-8", errors="replace")
        if status:
            raise RunError(f"exit status {status}: {(text.strip() or 'no output').splitlines()[-1]}")
        return text


def facts(bench: Bench, result: Result) -> None:
    """The machine and the versions."""
    result["machine"] = machine()
    plugins = ("jax-cuda12-plugin", "jax-cuda13-plugin")
    result["versions"] = versions(sys.executable, *OURS, "optax", "orbax-checkpoint", *plugins)
    result["nanogpt_versions"] = versions(bench.nanogpt_python, "torch", "triton", "numpy")
    result["nvidia_smi"] = None if bench.dry else nvidia_smi()
    result["devices"] = describe_devices()
    if not bench.dry and "(gpu)" not in result["devices"]:
        raise UserError(f"JAX does not see the GPU: {result['devices']}")


def nvidia_smi() -> list[str]:
    """Name, driver and memory of each GPU.

    Raises:
        UserError: there is none. JAX would say nothing, and take the CPU.
    """
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        raise UserError("nvidia-smi finds no GPU here: --dry tries the steps on a CPU") from None


def record_4(bench: Bench, result: Result) -> None:
    """The time to 1.4697, by the recipe of five minutes on a CPU: its 1,000 steps reach 1.460 or less."""
    train(bench, SMALL, "record_4", result, "--config.train.steps=1000", *OFTEN, target=1.4697)


def record_3(bench: Bench, result: Result) -> None:
    """The lowest loss, and the time to 1.39."""
    train(bench, BEST, "record_3", result, *OFTEN, target=1.39)


def record_5(bench: Bench, result: Result) -> None:
    """The loss of the faithful baseline, and how fast its steps are."""
    train(bench, FAITHFUL, "record_5", result)


def train(
    bench: Bench, config: str, name: str, result: Result, *settings: str, target: float | None = None
) -> None:
    """Train a config to its end and describe the run, and when it came to a target, if it did."""
    workdir, log = bench.work / name, bench.work / f"{name}.log"
    command = bench.training(config, workdir, *settings)
    try:
        bench.run(command, log)
    finally:
        describe(workdir, result)
        if target is not None:
            if bench.dry:
                target = 9.0  # any model is better
            reached = next((e for e in result["evaluations"] if e["loss"] <= target), None)
            result |= {"target": target, "reached": reached}


def describe(workdir: Path, result: Result) -> None:
    """The results of a run, complete or not: its losses, when they were reached, and how fast it was.

    Of each evaluation, `train_seconds` are those of the steps alone, `wall_seconds` count from the first step
    on, evaluating and saving included, and `process_seconds` from the start of the process, compilation
    included.
    """
    if (workdir / "run.json").exists():
        facts = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
        result |= {name: facts[name] for name in ("device", "dtype", "parameters")}
        if seconds := facts["compile_seconds"].get("training steps"):
            result["compile_seconds"] = seconds
    evaluations: list[Result] = []
    result["evaluations"] = evaluations
    records = read_metrics(workdir / "metrics.jsonl")
    if not records:
        return
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    tokens_per_step = config["train"]["batch_size"] * config["model"]["context"]
    step, train_seconds, begun = 0.0, 0.0, 0.0
    for record in records:
        took = (record["step"] - step) * tokens_per_step / record["tokens_per_second"]
        begun = begun or record["seconds"] - took
        step, train_seconds = record["step"], train_seconds + took
        if "val_loss" in record:
            evaluations.append(
                {
                    "step": int(step),
                    "loss": record["val_loss"],
                    "train_seconds": round(train_seconds, 3),
                    "wall_seconds": round(record["seconds"] - begun, 3),
                    "process_seconds": record["seconds"],
                }
            )
    result["steps"], result["steps_wanted"] = int(step), config["train"]["steps"]
    if evaluations:
        result["final_loss"] = evaluations[-1]["loss"]
        result["best_loss"] = min(evaluation["loss"] for evaluation in evaluations)
    # The later half: the first calls of a program are slower.
    rates = [record["tokens_per_second"] for record in records[len(records) // 2 :]]
    result["tokens_per_second"] = statistics.median(rates)
    result["step_milliseconds"] = round(1000 * tokens_per_step / statistics.median(rates), 3)


def sampling(bench: Bench, result: Result) -> None:
    """Characters a second of 10,000 generated ones, with compilation, and once more without."""
    model = gpt_jax.load(bench.work / "record_5")
    for name in ("with_compilation", "compiled_before"):
        begun = time.monotonic()
        text = model.generate(length=10_000, temperature=0.8)
        result[f"characters_per_second_{name}"] = round(len(text) / (time.monotonic() - begun))


def determinism(bench: Bench, result: Result) -> None:
    """Are two runs of 20 steps the same to the bit, with and without --deterministic?

    All four run at once: to save time, and because what depends on timing shows best on a busy device.
    """
    # No process, this one included, may take most of the memory for itself; and nothing is read from a
    # cache of compiled programs, as two compilations may choose different kernels.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    settings = (
        "--config.train.steps=20", "--config.train.eval_every=20", "--config.optimizer.warmup_steps=2",
    )  # fmt: skip
    kinds = {"default": (), "deterministic": ("--deterministic",)}
    processes = {}
    try:
        for kind, flags in kinds.items():
            for i in range(2):
                workdir = bench.work / f"{kind}_{i}"
                with (bench.work / f"{kind}_{i}.log").open("w", encoding="utf-8") as log:
                    processes[workdir] = subprocess.Popen(
                        [*bench.training(FAITHFUL, workdir, *settings), *flags],
                        stdout=log, stderr=subprocess.STDOUT, env=bench.environment,
                    )  # fmt: skip
        failed = {workdir.name: status for workdir, p in processes.items() if (status := p.wait())}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    if failed:
        last = (bench.work / f"{next(iter(failed))}.log").read_text(encoding="utf-8").strip()
        raise RunError(f"exit statuses {failed}: {(last or 'no output').splitlines()[-1]}")
    for kind in kinds:
        first, second = (result_of(bench.work / f"{kind}_{i}") for i in range(2))
        different = differences(first, second)
        result[kind] = {
            "equal": not different,
            "sha256": [_sha256(first), _sha256(second)],
            "different": len(different),
            "of": len(first),
            "examples": different[:5],
        }


def _sha256(run: Result) -> str:
    """Of all arrays of a run, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(run):
        if isinstance(run[name], np.ndarray):
            digest.update(name.encode())
            digest.update(run[name].tobytes())
    return digest.hexdigest()


def nanogpt_eager(bench: Bench, result: Result) -> None:
    """The time of a step of nanoGPT, its recipe for Shakespeare's characters, not compiled."""
    _nanogpt(bench, result, compiled=False)


def nanogpt_compiled(bench: Bench, result: Result) -> None:
    """The same with torch.compile."""
    _nanogpt(bench, result, compiled=True)


def _nanogpt(bench: Bench, result: Result, compiled: bool) -> None:
    if bench.nanogpt is None:
        result["skipped"] = "no NANOGPT=DIR was given"
        return
    copy = bench.work / "nanoGPT"
    shutil.rmtree(copy, ignore_errors=True)
    prepare_nanogpt(bench.nanogpt, bench.nanogpt_python, copy)
    arguments = [
        "config/train_shakespeare_char.py", f"--compile={compiled}", "--max_iters=200", "--log_interval=1",
        "--eval_iters=1", *(TINY_NANOGPT if bench.dry else ()),
    ]  # fmt: skip
    program = [bench.nanogpt_python, "train.py", *arguments, f"--out_dir={bench.work / 'out'}"]
    text = bench.run(program, bench.work / "nanogpt.log", folder=copy)
    times = [float(found) for found in re.findall(r"^iter \d+: .* time ([\d.]+)ms", text, re.MULTILINE)]
    result["command"] = " ".join(["python", "train.py", *arguments])
    result["step_milliseconds"] = statistics.median(times[len(times) // 2 :])


STEPS: dict[str, Callable[[Bench, Result], None]] = {
    step.__name__: step
    for step in (
        facts, record_4, record_3, record_5, sampling, determinism, nanogpt_eager, nanogpt_compiled,
    )
}  # fmt: skip


def summary(bench: Bench) -> int:
    """Put all results into one file, and say which there are; 1 where one is missing or failed."""
    results = {}
    for name in STEPS:
        file = bench.out / f"{name}.json"
        missing = {"ok": False, "error": "left no result: killed, or not started"}
        results[name] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else missing
    failed = [name for name, result in results.items() if not result["ok"]]
    _write(bench.out / "summary.json", {"ok": not failed, "dry": bench.dry, "failed": failed, **results})
    print(f"{bench.out / 'summary.json'}: " + (f"failed: {', '.join(failed)}" if failed else "complete"))
    return int(bool(failed))


def _write(file: Path, result: Result) -> None:
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _over(number: int, frame: Any) -> NoReturn:
    raise TimeoutError("timed out")


def main() -> int:
    """Carry out one step."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("step", choices=(*STEPS, "summary"))
    flag("--out", type=Path, required=True, help="where the results go")
    flag("--work", type=Path, required=True, help="a folder for runs, the same for all steps")
    flag("--dry", action="store_true", help="a tiny model on the CPU")
    flag("--nanogpt", type=Path, help="a checkout of nanoGPT")
    flag("--nanogpt_python", type=absolute_program, default=sys.executable, help="a Python that has torch")
    flags = vars(parser.parse_args())
    step = flags.pop("step")
    bench = Bench(**flags)
    if step == "summary":
        return summary(bench)
    os.environ["JAX_PLATFORMS"] = bench.environment["JAX_PLATFORMS"]  # some steps use JAX in this process
    signal.signal(signal.SIGTERM, _over)
    result: Result = {"ok": False, "dry": bench.dry, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    begun = time.monotonic()
    try:
        if not bench.dry:
            nvidia_smi()
        STEPS[step](bench, result)
        result["ok"] = True
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["seconds"] = round(time.monotonic() - begun, 1)
    _write(bench.out / f"{step}.json", result)
    shown = {name: value for name, value in result.items() if name not in ("evaluations", "commit", "date")}
    print(f"{step}: {json.dumps(shown)}", flush=True)
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
