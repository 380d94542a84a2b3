"""Weights & Biases, the real one: its files hold what metrics.jsonl holds, whatever happens to a run."""

import json
import os
import struct
import subprocess
import sys
import time

import pytest
from conftest import need

from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.records import read_metrics

# Trains settings of a file, and does something after step 13; the newest checkpoint is that of step 10.
TRAIN = """
import os, signal, subprocess, sys
import gpt_jax

def after_13(info):
    if info.step == 13:
        {action}

gpt_jax.train(sys.argv[1], sys.argv[2], callbacks=[gpt_jax.Callback(after_13, every=13)])
"""
KILL_WANDB = """
        listing = subprocess.run(["ps", "-o", "pid,comm", "--ppid", str(os.getpid())], capture_output=True)
        (pid,) = [line.split()[0] for line in listing.stdout.splitlines() if b"wandb" in line]
        os.kill(int(pid), signal.SIGKILL)
"""


@pytest.fixture
def start(tiny_config, tmp_path):
    """Starts to train a tiny run with wandb, in a process of its own."""
    # The best step may not be the last one, and its line is amended at the end.
    config = tiny_config(train={"wandb": True, "eval_tokens": 200, "log_every": 1})
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    processes = []

    def start(action="pass", **variables):
        own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        own |= {"HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false"} | variables
        command = [sys.executable, "-c", TRAIN.replace("{action}", action), tmp_path / "config.json"]
        process = subprocess.Popen(
            [*command, tmp_path / "run"], cwd=REPOSITORY, env=own, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:  # what a failed test has left
        process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """The same to the end: its exit status, stdout and stderr."""

    def run(*arguments, **variables):
        process = start(*arguments, **variables)
        out, errors = process.communicate(timeout=200)
        return process.returncode, out, errors

    return run


def records_of(path):
    """The records of a .wandb file: blocks of 32 KiB of pieces, after a header of 7 bytes."""
    pb = need("wandb.proto.wandb_internal_pb2")
    data, at, piece = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind:  # 1: a whole record; 2, 3, 4: its beginning, middle, end
            piece += data[at + 7 : at + 7 + length]
            if kind in (1, 4):
                yield pb.Record.FromString(piece)
                piece = b""
        at += 7 + length
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768


def logged(workdir):
    """Of each process, in order: the id of its run, its settings, and the numbers that it has logged."""
    processes = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name):
        identity, config, rows = None, {}, []
        for record in records_of(path):
            if record.HasField("run"):
                identity = record.run.run_id
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({name: value for name, value in row.items() if name[0] != "_"})
        processes.append((identity, config, rows))
    return processes


def merged(rows):
    """The numbers by step, the newest of each."""
    records = {}
    for row in rows:
        records[row["step"]] = records.get(row["step"], {}) | row
    return [records[step] for step in sorted(records)]


def test_a_killed_run_goes_on_in_the_same_wandb_run(start, run, tmp_path):
    need("wandb")
    metrics = tmp_path / "run" / "metrics.jsonl"
    # By default wandb writes to the disk every 15 s, and a kill loses the numbers since then.
    process = start("signal.pause()", WANDB_MODE="offline", WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="0.1")
    deadline = time.monotonic() + 120
    while not (runs := logged(tmp_path / "run")) or [row["step"] for row in runs[0][2]][-1:] != [13]:
        assert process.poll() is None and time.monotonic() < deadline, runs
        time.sleep(0.5)
    process.kill()
    process.communicate()
    assert merged(runs[0][2]) == read_metrics(metrics)
    status, out, errors = run(WANDB_MODE="offline")
    assert (status, errors) == (0, "")
    assert "resume  after step 10 of 20" in out and "wandb" not in out
    (first, config, first_rows), (second, _, second_rows) = logged(tmp_path / "run")
    assert first == second == (tmp_path / "run" / "wandb" / "id").read_text(encoding="utf-8")
    assert config["train"]["steps"] == 20 and config["model"]["n_layer"] == 1
    assert second_rows[0]["step"] == 11  # which the first process had logged too
    assert merged(first_rows + second_rows) == read_metrics(metrics)


def test_no_login_is_one_line(run, tmp_path):
    need("wandb")
    _, _, errors = run()
    assert "UserError: train.wandb = True needs a login: `wandb login`, or set WANDB_MODE=off" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_package_is_one_line(run, tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError", encoding="utf-8")
    _, _, errors = run(PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}")
    assert "UserError: train.wandb = True needs a missing package: pip install -e '.[wandb]'" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_a_network_the_numbers_are_kept(run, tmp_path):
    need("wandb")
    status, out, errors = run(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    assert (status, errors) == (0, "")
    assert "WARNING: wandb: " in out and f"`wandb sync {tmp_path}/run/wandb/offline-run-*`" in out
    ((_, _, rows),) = logged(tmp_path / "run")
    assert merged(rows) == read_metrics(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_outlives_the_process_of_wandb(run, tmp_path):
    need("wandb")
    status, out, errors = run(KILL_WANDB, WANDB_MODE="offline")
    assert status == 0, errors
    assert "WARNING: wandb: " in out and "its numbers are incomplete" in out
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 20
