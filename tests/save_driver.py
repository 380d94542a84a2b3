"""Saves checkpoints in processes of their own, ends each at another file operation, looks at what is left.

    LD_PRELOAD=faults.so FAULT_ROOT=... FAULT_DO=kill python save_driver.py FOLDER FIRST LAST STRIDE

One line of JSON for each operation: its number, how the process ended, and what was wrong after it.
The libraries are imported once; each case is a fork made before JAX starts its threads.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import RunError
from gpt_jax.storage.checkpoints import Checkpoints

LOSSES = {10: 1.0, 20: 2.0, 30: 3.0, 40: 0.5}  # the best is the oldest, and then the newest


def items(step):
    return {"params": {"a": {"kernel": jnp.full((3, 5), step)}, "b": jnp.arange(7.0) * step}}


def save(checkpoints, step):
    checkpoints.save(step, items(step), {"val_loss": LOSSES[step], "step": step})


def prepare(folder):
    """Steps 10 (the best), 20 and 30, before the save of 40 that is struck."""
    checkpoints = Checkpoints(folder)
    for step in (10, 20, 30):
        save(checkpoints, step)
    checkpoints.close()
    assert checkpoints.steps() == [10, 20, 30]


def strike(folder, at):
    """Save step 40; 0: nothing happened, 1: an error was named, otherwise the signal."""
    checkpoints = Checkpoints(folder)
    ctypes.CDLL(None).fault_arm(at)
    try:
        save(checkpoints, 40)
        checkpoints.wait()
    except RunError as error:
        checkpoints.close()
        return 1 if str(folder) in str(error) and "of step 30 is kept" in str(error) else 3
    return 0


def look(folder):
    """What is wrong with what is left: names of it, in a list."""
    wrong = []
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()

    def whole(step):
        checkpoints.verify(step)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), items(step))
        restored = checkpoints.restore(step, target)
        jax.tree.map(np.testing.assert_array_equal, restored, items(step))
        return checkpoints.metadata(step)["step"] == step

    for step in steps:
        try:
            if not whole(step):
                wrong.append(f"{step} is another step")
        except Exception as error:
            wrong.append(f"{step}: {error}")
    if not set(steps) >= ({30, 40} if 40 in steps else {10, 20, 30}):
        wrong.append(f"deleted too early: {steps} are left")
    if checkpoints.best_first()[0] != (40 if 40 in steps else 10):
        wrong.append("the best is lost")
    checkpoints.prepare()
    leftovers = [path.name for path in folder.iterdir() if not path.name.isdecimal()]
    if leftovers:
        wrong.append(f"left over: {leftovers}")
    save(checkpoints, 40)
    checkpoints.wait()
    if not whole(40):
        wrong.append("40 cannot be saved again")
    checkpoints.close()
    return wrong


def in_a_fork(function):
    """The wait status of a process that runs `function`, and what it wrote."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 7
        try:
            result = function()
            os.write(writing, json.dumps(result).encode())
            code = result if isinstance(result, int) else 0
        finally:
            os._exit(code)
    os.close(writing)
    output = b""
    while data := os.read(reading, 4096):
        output += data
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.decode()


def main():
    folder, first, last, stride = Path(sys.argv[1]), *map(int, sys.argv[2:])
    prepared, struck = folder / "prepared", folder / "struck"
    os.environ["FAULT_ROOT"] = str(struck)
    assert in_a_fork(lambda: prepare(prepared))[0] == 0
    for at in range(first, last + 1, stride):
        shutil.rmtree(struck, ignore_errors=True)
        shutil.copytree(prepared, struck)
        status, _ = in_a_fork(lambda: strike(struck, at))  # noqa: B023
        looked, wrong = in_a_fork(lambda: look(struck))
        wrong = json.loads(wrong) if looked == 0 else [f"looking at it ended with {looked}"]
        print(json.dumps({"at": at, "status": status, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
