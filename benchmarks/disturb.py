"""Start real training processes, disturb them, and compare what comes of it, bit for bit.

Used by the fault tests and by `benchmarks/soak.py`.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from facts import REPOSITORY

from gpt_jax.monitor.metrics import read_metrics
from gpt_jax.storage.checkpoints import Checkpoints

ITEMS = ("params", "opt_state")
TIMING = ("seconds", "tokens_per_second", "mfu")
# A model of seconds with all that must survive: dropout, micro-batches.
SETTINGS: dict[str, Any] = {
    "model.n_layer": 1, "model.d_model": 16, "model.n_head": 2, "model.context": 16, "model.dropout": 0.1,
    "optimizer.warmup_steps": 2,
    "train.steps": 40, "train.batch_size": 8, "train.grad_accum_steps": 2, "train.eval_every": 10,
    "train.log_every": 3, "train.sample_length": 10, "train.save_minutes": 1e-6,
}  # fmt: skip


def write_text(path: Path, length: int = 3000) -> Path:
    """A text of so many characters with something to learn in it."""
    words = ["to be ", "or not ", "that is ", "the question\n", "sleep, ", "perchance "]
    text = "".join(np.random.default_rng(0).choice(words, length // 6))
    assert len(text) >= length
    path.write_text(text[:length], encoding="utf-8")
    return path


class Training:
    """One process of train.py; its output can be waited for."""

    def __init__(
        self,
        workdir: Path,
        text: Path,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        program: Path = REPOSITORY / "train.py",
        flags: Sequence[str] = (),
        prefix: Sequence[str] = (),
        stdout: int | None = None,
    ):
        """Start it, on the cores that this process has; `prefix` is a command that starts commands.

        `stdout` is a file descriptor to write to instead of a pipe that `wait_for` and `wait` read.
        """
        settings = SETTINGS | dict(settings or {})
        config = REPOSITORY / "configs" / "smoke.py"
        drop = ("XLA_FLAGS", "PYTEST_CURRENT_TEST")
        kept = {key: value for key, value in os.environ.items() if key not in drop}
        self.output = ""
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(program), "--config", str(config), f"--config.data.path={text}",
             f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in settings.items()), *flags],
            env=kept | {"JAX_PLATFORMS": "cpu"} | dict(environment or {}),
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.STDOUT if stdout is None else stdout,
            text=True,
            encoding="utf-8",
        )  # fmt: skip

    def wait_for(self, beginning: str) -> bool:
        """Read until the output ends in something that begins like this; False: the process ended before.

        One that says nothing for five minutes is killed.
        """
        assert self.process.stdout is not None
        line = ""
        limit = threading.Timer(300, self.process.kill)
        limit.start()
        try:
            while character := self.process.stdout.read(1):
                self.output += character
                line = "" if character == "\n" else line + character
                if line.startswith(beginning):
                    return True
        finally:
            limit.cancel()
        return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, timeout: float = 300) -> int:
        """The exit status; -9 after a SIGKILL."""
        rest, _ = self.process.communicate(timeout=timeout)
        self.output += rest or ""
        return self.process.returncode

    def kill_after(self, seconds: float) -> int:
        """SIGKILL after so many seconds, unless it has ended before; the exit status."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
        return self.wait()


def steps_of(workdir: Path) -> list[int]:
    """The steps that have a checkpoint, by the names of the folders alone."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def result_of(workdir: Path) -> dict[str, Any]:
    """All that must be the same after any disturbance, by name: every array, every line, every sample.

    The arrays are read with Orbax alone, without gpt_jax's own code.
    """
    found: dict[str, Any] = {}
    step = steps_of(workdir)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ITEMS:
            folder = workdir / "checkpoints" / str(step) / item
            if not folder.exists():
                continue
            for path, leaf in jax.tree_util.tree_leaves_with_path(checkpointer.restore(folder)):
                found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    checkpoints = Checkpoints(workdir / "checkpoints")
    best = checkpoints.best_first()[0]
    metadata = checkpoints.metadata(best)
    found["best"] = [best, metadata["val_loss"], metadata["val_loss_part"]]
    checkpoints.close()
    records = read_metrics(workdir / "metrics.jsonl")
    found["steps"] = [record["step"] for record in records]
    for record in records:
        found[f"line {record['step']}"] = {k: v for k, v in record.items() if k not in TIMING}
    samples = (workdir / "samples.txt").read_text(encoding="utf-8")
    # The heading of a sample ends in the time that it was.
    found["samples"] = re.sub(r"^(--- step .*),[^,]*$", r"\1", samples, flags=re.MULTILINE)
    return found


def differences(got: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What is not the same in two results, to the bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return bool(a == b)

    names = got.keys() | wanted.keys()
    return sorted(n for n in names if n not in got or n not in wanted or not same(got[n], wanted[n]))


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def spoil(path: Path, how: str, place: int = 0) -> None:
    """Damage a file: "delete" it, "truncate" it to half, or "flip" the lowest bit of the byte at `place`."""
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)


def spoil_something(folder: Path, chance: random.Random) -> str:
    """Damage one file of a folder at random; what was done."""
    path = chance.choice([path for path in files_of(folder) if path.stat().st_size])
    how = chance.choice(["delete", "truncate", "flip", "flip"])
    place = chance.randrange(path.stat().st_size)
    spoil(path, how, place)
    return f"{how} {path.relative_to(folder)}" + (f" byte {place}" if how == "flip" else "")


def undisturbed(workdir: Path, text: Path, settings: Mapping[str, Any] | None = None) -> float:
    """Train without any disturbance; the seconds that it took."""
    begun = time.monotonic()
    training = Training(workdir, text, settings)
    if training.wait() != 0:
        raise RuntimeError(training.output)
    return time.monotonic() - begun
