"""Without what only Unix has: the package imports, trains, resumes and samples on a CPU.

Windows and macOS cannot be tested here. This hides, in a process of its own, what they lack.
"""

import json
import os
import subprocess
import sys

import pytest

from gpt_jax.paths import ROOT as REPOSITORY

HIDE = """
import os, select, signal, sys

sys.modules["fcntl"] = None
del signal.SIGHUP, os.O_NONBLOCK, os.O_NOCTTY, os.O_DIRECTORY, os.sched_getaffinity
open_file, sync_file = os.open, os.fsync

def open_no_folder(path, flags, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file", path)
    return open_file(path, flags, *rest, **options)

def sync_what_is_written(descriptor):
    import stat
    assert not stat.S_ISDIR(os.fstat(descriptor).st_mode)
    sync_file(descriptor)

def only_sockets(*descriptors):
    raise OSError(10038, "not a socket")

os.open, os.fsync, select.select = open_no_folder, sync_what_is_written, only_sockets

import runpy
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""
TINY = (
    "--config.model.d_model=16", "--config.model.context=16", "--config.train.eval_every=2",
    "--config.train.sample_length=5", "--config.optimizer.warmup_steps=1", "--config.mesh.data=1",
)  # fmt: skip


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", HIDE, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}, encoding="utf-8",
    )  # fmt: skip


@pytest.mark.slow
def test_training_resuming_and_sampling(text_file, tmp_path):
    command = [
        "gpt_jax", "train", "--config", REPOSITORY / "configs" / "smoke.py",
        f"--config.data.path={text_file}", *TINY, "--workdir=run",
    ]  # fmt: skip
    done = run(*command, "--config.train.steps=4", cwd=tmp_path)
    assert done.returncode == 0 and "done in" in done.stdout, done.stdout + done.stderr
    done = run(*command, "--config.train.steps=6", cwd=tmp_path)
    assert done.returncode == 0 and "resume  after step 4 of 6" in done.stdout, done.stdout + done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == 6
    done = run("gpt_jax", "sample", "--workdir=run", "--length=10", "--out=out.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.txt").read_text(encoding="utf-8")) == 10
