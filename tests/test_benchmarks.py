"""The benchmarks measure what they say, on models and targets of seconds. No time is asserted."""

import json
import os
import subprocess
import sys

import pytest
from time_to_loss import TimedRun, nanogpt_evaluations, summarize

from gpt_jax.config import REPOSITORY

SMOKE = REPOSITORY / "configs" / "smoke.py"
# A program with the manners of nanoGPT's: it wants its data, and evaluates now and then.
STAND_IN = """
import pathlib, sys
assert pathlib.Path("data/shakespeare_char/length.txt").read_text() == "1115394"
assert any(argument.startswith("--out_dir=") for argument in sys.argv)
for step in range(0, 1001, 250):
    print(f"step {step}: train loss 1.9000, val loss {4 - step / 500:.4f}")
    print(f"iter {step}: loss 1.5000, time 8.00ms, mfu 1.00%")
"""
PREPARE = """
import pathlib, requests
folder = pathlib.Path(__file__).parent
(folder / "length.txt").write_text(str(len((folder / "input.txt").read_text())))
"""


def run(*command):
    """A benchmark as a user runs it, on one device; nothing here needs XLA to try hard."""
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def time_to_loss(*arguments):
    return run(sys.executable, REPOSITORY / "benchmarks" / "time_to_loss.py", *arguments)


@pytest.fixture
def stand_in(tmp_path):
    """A checkout of something that behaves like nanoGPT."""
    checkout = tmp_path / "checkout"
    (checkout / "data" / "shakespeare_char").mkdir(parents=True)
    (checkout / "README.md").write_text("Try\n\npython train.py config/x.py --device=cpu --max_iters=9\n")
    (checkout / "train.py").write_text(STAND_IN)
    (checkout / "data" / "shakespeare_char" / "prepare.py").write_text(PREPARE)
    return checkout


def test_time_to_loss_runs_both_in_turn(stand_in, tmp_path):
    file = tmp_path / "result.json"
    done = time_to_loss(
        "--target=3.9", "--config", SMOKE, "--config.train.eval_every=10", "--nanogpt", stand_in,
        "--repeats=2", "--json", file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ratio: gpt_jax is " in done.stdout and "at least" not in done.stdout

    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["target"] == 3.9 and len(result["commit"] or 40 * "0") >= 40
    assert result["machine"].keys() == {"cpu", "cores", "load"}
    assert result["versions"]["gpt_jax"].keys() == {"python", "jax", "jaxlib", "flax", "numpy"}
    assert result["versions"]["nanoGPT"].keys() == {"python", "torch", "numpy"}
    assert [run["who"] for run in result["runs"]] == ["gpt_jax", "nanoGPT"] * 2
    assert str(tmp_path) not in json.dumps(result)
    for timed in result["runs"]:
        *before, last = timed["evaluations"]
        assert timed["reached"] and last["loss"] == timed["lowest"] <= 3.9
        assert all(evaluation["loss"] > 3.9 for evaluation in before)  # ended at the first that is there
        assert timed["seconds"] == last["seconds"]
    ours, theirs = result["runs"][:2]
    assert ours["command"] == "python train.py --config=configs/smoke.py --config.train.eval_every=10"
    assert theirs["command"] == "python train.py config/x.py --device=cpu --max_iters=9"
    last = ours["evaluations"][-1]
    assert 0 < last["seconds_by_its_own_clock"] <= last["seconds"]
    assert not (stand_in / "data" / "shakespeare_char" / "input.txt").exists()  # it is left as it was


def test_a_target_that_is_not_reached_is_said(stand_in, tmp_path):
    file = tmp_path / "result.json"
    done = time_to_loss("--target=1", "--config", SMOKE, "--nanogpt", stand_in, "--repeats=1", "--json", file)
    assert done.returncode == 1
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["not_reached"] == {"gpt_jax": 1, "nanoGPT": 1} and result["nanogpt_over_gpt_jax"] is None
    assert "nanoGPT: median " in done.stdout and "not reached in 1 of 1 runs" in done.stdout
    assert "lowest 2.0000" in done.stdout and "ratio" not in done.stdout
    ours = result["runs"][0]
    assert [evaluation["step"] for evaluation in ours["evaluations"]] == [20, 40]
    assert ours["seconds"] >= ours["evaluations"][-1]["seconds"]  # the time to its end


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (
            ("--config", SMOKE, "--config.model.n_head=5"),
            1,
            "n_head=5: exit status 2, 0 evaluations: error: ",
        ),
        (("--nanogpt", "."), 2, "nanogpt = . has no README.md with a recipe for a CPU"),
        (("--tarrget=3",), 2, "unexpected argument '--tarrget=3'"),
        (("--repeats=0",), 2, "repeats = 0 must be 1 or above"),
    ],
)
def test_what_cannot_be_timed_is_one_line(arguments, status, message):
    done = time_to_loss(*arguments)
    assert done.returncode == status
    assert message in done.stderr.splitlines()[-1]


def test_nanogpt_lines():
    assert nanogpt_evaluations("step 250: train loss 1.9000, val loss 2.0312\n") == [
        {"step": 250, "loss": 2.0312}
    ]
    assert nanogpt_evaluations("iter 250: loss 2.0000, time 46.00ms, mfu 0.10%\n") == []
    assert nanogpt_evaluations("saving checkpoint to out\n") == []


def test_medians_and_their_ratio():
    def timed(who, seconds, reached=True):
        return TimedRun(who, "", seconds, reached, 1.9, [])

    ours = [timed("gpt_jax", seconds) for seconds in (10.0, 30.0, 11.0)]
    theirs = [timed("nanoGPT", 66.0), timed("nanoGPT", 77.0, reached=False), timed("nanoGPT", 65.0)]
    summary = summarize(ours + theirs)
    assert summary["median_seconds"] == {"gpt_jax": 11.0, "nanoGPT": 66.0}
    assert summary["nanogpt_over_gpt_jax"] == 6.0
    assert summary["not_reached"] == {"gpt_jax": 0, "nanoGPT": 1}
    assert summarize([timed("gpt_jax", 1.0, reached=False), *theirs])["nanogpt_over_gpt_jax"] is None
    assert summarize(ours)["nanogpt_over_gpt_jax"] is None
