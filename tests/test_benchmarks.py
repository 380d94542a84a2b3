"""The benchmarks measure what they say, on models and targets of seconds. No time is asserted."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import contest
import facts
import gpu
import pytest
import startup
from conftest import some
from shapes import SHAPES
from time_to_loss import TimedRun, nanogpt_evaluations, summarize

from gpt_jax.config import ModelConfig
from gpt_jax.model.params import flops_per_token
from gpt_jax.paths import ROOT as REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
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
        [*map(str, command)], env=environment, capture_output=True, text=True, encoding="utf-8", timeout=600
    )


def time_to_loss(*arguments):
    return run(sys.executable, BENCHMARKS / "time_to_loss.py", *arguments)


@pytest.fixture
def stand_in(tmp_path):
    """A checkout of something that behaves like nanoGPT."""
    checkout = tmp_path / "checkout"
    (checkout / "data" / "shakespeare_char").mkdir(parents=True)
    (checkout / "README.md").write_text("Try\n\npython train.py config/x.py --device=cpu --max_iters=9\n")
    (checkout / "train.py").write_text(STAND_IN)
    (checkout / "data" / "shakespeare_char" / "prepare.py").write_text(PREPARE)
    return checkout


@pytest.mark.slow
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


@pytest.mark.slow
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
    some(
        (("--nanogpt", "."), 2, "nanogpt = . has no README.md with a recipe for a CPU"),
        (
            ("--config", SMOKE, "--config.model.n_head=5"),
            1,
            "n_head=5: exit status 2, 0 evaluations: error: ",
        ),
        (("--tarrget=3",), 2, "unexpected argument '--tarrget=3'"),
        (("--repeats=0",), 2, "repeats = 0 must be 1 or above"),
        (("--json=no/folder/x.json",), 2, "json = no/folder/x.json cannot be written: No such file"),
    ),
)
def test_what_cannot_be_timed_is_one_line(arguments, status, message):
    done = time_to_loss(*arguments)
    assert done.returncode == status
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_startup_is_measured_cold_and_warm(tmp_path):
    file = tmp_path / "startup.json"
    model = REPOSITORY / "tests" / "data" / "export_v2"
    command = (BENCHMARKS / "startup.py", f"--config={SMOKE}", f"--workdir={model}", "--repeats=1")
    done = run(sys.executable, *command, f"--json={file}", "--length=50")
    assert done.returncode == 0, done.stderr
    table = json.loads(file.read_text())["tables"]
    both = [f"first {what}, {state}" for state in ("cold", "warm") for what in ("character", "step")]
    whole = ["50 characters, warm: the first", "50 characters, warm"]
    assert list(table) == ["import jax, read the model", *both, *whole]
    cached = {}
    for name in (*both, whole[0]):
        (seconds,) = table[name]
        total, cached[name] = seconds.pop("total"), seconds.pop("cached")
        assert sum(seconds.values()) == pytest.approx(total)
        assert all(part > 0 for part in seconds.values()), name
    assert table["50 characters, warm"][0]["total"] > total
    assert 0 == cached["first character, cold"] < cached["first character, warm"]
    assert cached["first step, cold"] < cached["first step, warm"]
    done = run(sys.executable, BENCHMARKS / "startup.py", f"--workdir={tmp_path}", "--repeats=1")
    assert done.returncode == 1 and "no trained model in" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path):
    file, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    flags = ("--shape=smoke", "--by=context", "--repeats=1", f"--json={file}", f"--plot={picture}")
    done = run(sys.executable, BENCHMARKS / "growth.py", *flags)
    assert done.returncode == 0, done.stderr
    tables = json.loads(file.read_text())["tables"]
    assert list(tables) == ["step, context", "token, context"]
    assert [row["name"] for row in tables["step, context"]] == ["8", "16", "32", "64"]
    assert [row["units"] for row in tables["token, context"]] == [7, 15, 31, 63]
    assert all(row["median"] > 0 for rows in tables.values() for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_is_planned_and_measured(tmp_path):
    file, picture = tmp_path / "memory.json", tmp_path / "memory.png"
    flags = ("--shape=smoke", "--by=context", f"--json={file}", f"--plot={picture}")
    done = run(sys.executable, BENCHMARKS / "memory.py", *flags)
    assert done.returncode == 0, done.stderr
    tables = json.loads(file.read_text())["tables"]
    assert list(tables) == ["context"]
    nothing = [row for row in tables["context"] if row["remat"] == "nothing"]
    assert [row["amount"] for row in nothing] == [8, 16, 32, 64]
    planned = [row["planned"] - row["arguments"] for row in nothing]
    assert planned == sorted(planned) and planned[-1] > 2 * planned[0]
    assert any(row["measured"] > row["arguments"] for row in nothing)  # one may reuse freed memory
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_time_within_other_time_counts_once():
    assert startup.covered([(1.0, 4.0), (2.0, 3.0), (3.5, 5.0), (7.0, 9.0)], 1.5, 8.0) == 4.5
    assert startup.covered([], 1.0, 8.0) == startup.covered([(0.0, 1.0), (8.0, 9.0)], 1.0, 8.0) == 0


LLAMA2C = """
#include <stdio.h>
int main(int argc, char **argv) { fprintf(stderr, "achieved tok/s: 1000.0\\n"); return argc != 8; }
"""


@pytest.fixture
def peers(tmp_path):
    """Stand-ins for checkouts of nanoGPT, which no test runs, and llama2.c, which any C compiler makes."""
    for name in ("run.c", "runq.c", "model.py"):
        (tmp_path / "peers").mkdir(exist_ok=True)
        (tmp_path / "peers" / name).write_text(LLAMA2C)
    return tmp_path / "peers"


@pytest.mark.slow
def test_steps_are_timed_beside_the_ceiling(tmp_path):
    file = tmp_path / "result.json"
    done = run(sys.executable, BENCHMARKS / "train_step.py", "--shapes=smoke", "--repeats=2", "--json", file)
    assert done.returncode == 0, done.stderr
    header, ours = done.stdout.splitlines()[-2:]
    assert header.split()[:2] == ["ms,", "median"] and ours.startswith("gpt_jax ") and ours.endswith("%")
    table = {row["name"]: row for row in json.loads(file.read_text())["tables"]["smoke"]}
    assert list(table) == ["gpt_jax", "matrix product", "copy"]
    assert all(len(row["seconds"]) == 2 and 0 < row["min"] <= row["median"] for row in table.values())
    facts = table["gpt_jax"]["facts"]
    assert facts["compile_seconds"] > 0
    shape = SHAPES["smoke"]
    config = ModelConfig(shape.n_layer, shape.n_head, shape.d_model, shape.context)
    assert shape.flops_per_token == flops_per_token(config, shape.vocab_size)
    assert table["gpt_jax"]["flops"] == table["gpt_jax"]["units"] * 4 * 16 * shape.flops_per_token


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
def test_sampling_is_timed_beside_llama2c(peers, tmp_path):
    file = tmp_path / "result.json"
    arguments = ("--shape=smoke", "--batches=1,2", "--length=40", "--repeats=1", "--llama2c", peers)
    done = run(sys.executable, BENCHMARKS / "sampling.py", *arguments, "--json", file)
    assert done.returncode == 0, done.stderr
    table = {row["name"]: row for row in json.loads(file.read_text())["tables"]["smoke"]}
    assert {"gpt_jax, batch 2", "bare products, batch 2", "matrix product", "copy"} < set(table)
    assert table["gpt_jax, batch 2"]["units"] == 2 * 15
    assert table["gpt_jax, a text of 40"]["units"] == 40
    theirs = [row for name, row in table.items() if name.startswith("llama2.c")]
    assert len(theirs) in (2, 3) and all(row["seconds"] == [15 / 1000] for row in theirs)  # by its own clock


@pytest.mark.parametrize(
    "program, arguments, message",
    some(
        ("train_step.py", ("--shapes=0.8M,9M",), "shapes = 0.8M,9M: '9M' is none of smoke, 0.8M"),
        ("train_step.py", ("--nanogpt", "."), "nanogpt = . has no model.py: name a checkout"),
        ("sampling.py", ("--batches=1,x",), "batches = 1,x must be numbers, such as 1,8,64"),
        ("sampling.py", ("--batches=8,8",), "batches = 8,8 must be different numbers of 1 or above"),
        ("sampling.py", ("--llama2c", "."), "llama2c = . has no run.c: name a checkout"),
        ("growth.py", ("--plot=a.txt",), "plot = a.txt must end in .png"),
        ("memory.py", ("--plot=no/folder/a.png",), "plot = no/folder/a.png cannot be written: No such file"),
        ("growth.py", ("--by=size",), "by = size must be one of weights, context, batch, length"),
        ("startup.py", ("--length=0",), "length = 0 must be 1 or above"),
    ),
)
def test_a_contest_that_cannot_be(program, arguments, message):
    done = run(sys.executable, BENCHMARKS / program, *arguments)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


WORKER = """
import json, sys
name, log = json.loads(sys.argv[1])
print("a library says hello")
print(json.dumps({"name": name}), flush=True)
for seconds, _ in enumerate(sys.stdin):
    open(log, "a").write(name)
    print("a warning", file=sys.stderr, flush=True)
    print(seconds, flush=True)
open(log, "a").write("!")
"""


def test_contenders_work_in_turn_and_the_first_round_does_not_count(tmp_path):
    worker, log = tmp_path / "worker.py", tmp_path / "log"
    worker.write_text(WORKER)
    everyone = [contest.Contender(name, str(worker), [name, str(log)]) for name in "AB"]
    results = contest.compete(everyone, repeats=3)
    assert log.read_text() == "AB" * 4 + "!!"  # each ended by itself
    for name, result in results.items():
        assert result.facts == {"name": name} and result.seconds == [1, 2, 3]
        assert (result.median, result.fastest) == (2, 1)


@pytest.mark.slow
def test_a_contender_that_fails_says_why(peers):
    """This model.py is C, not Python; or torch is missing."""
    flags = ("--nanogpt", peers, "--nanogpt_python", sys.executable)
    done = run(sys.executable, BENCHMARKS / "train_step.py", "--shapes=smoke", "--repeats=1", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: nanoGPT eager failed: exit status 1: \w+Error: ", done.stderr)


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


def gpu_step(step, folder):
    """The command of one step, dry."""
    return (
        sys.executable, BENCHMARKS / "gpu.py", step, "--out", folder, "--work", folder, "--dry",
    )  # fmt: skip


def test_the_gpu_steps_have_their_time_and_it_is_nine_minutes():
    script = (BENCHMARKS / "gpu.sh").read_text(encoding="utf-8")
    limits = dict(re.findall(r"^step (\w+) (\d+)", script, flags=re.MULTILINE))
    assert set(limits) == {*gpu.STEPS, "summary"} and list(limits)[-1] == "summary"
    grace = 3  # seconds until what does not end is killed
    assert f"timeout -k {grace} " in script
    assert sum(int(limit) + grace for limit in limits.values()) < 9 * 60


@pytest.mark.slow
def test_gpu_steps_that_fail_say_why_and_the_summary_says_which(tmp_path):
    assert run(*gpu_step("facts", tmp_path)).returncode == 0
    assert run(*gpu_step("nanogpt_eager", tmp_path)).returncode == 0  # there is nothing to do
    done = run(*gpu_step("sampling", tmp_path))  # no model was trained before
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert run(*gpu_step("summary", tmp_path)).returncode == 1

    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["facts"]["ok"] and summary["facts"]["devices"].endswith("(cpu)")
    assert summary["facts"]["versions"]["jax"] and summary["facts"]["machine"]["cores"] >= 1
    assert "no trained model in" in summary["sampling"]["error"]
    assert summary["record_5"] == {"ok": False, "error": "left no result: killed, or not started"}
    failed = ["record_4", "record_3", "record_5", "sampling", "determinism", "nanogpt_compiled"]
    assert not summary["ok"] and summary["failed"] == failed


@pytest.mark.slow
def test_a_gpu_step_whose_time_is_over_leaves_what_it_has(tmp_path):
    step = subprocess.Popen([*map(str, gpu_step("record_5", tmp_path))], stdout=subprocess.PIPE)
    run_facts = tmp_path / "record_5" / "run.json"
    deadline = time.monotonic() + 100
    while not run_facts.exists():
        assert step.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    step.terminate()  # as `timeout` does
    step.communicate(timeout=60)
    assert step.returncode == 1
    result = json.loads((tmp_path / "record_5.json").read_text(encoding="utf-8"))
    assert not result["ok"] and result["error"] == "TimeoutError: timed out"
    assert result["parameters"] > 1000 and result["evaluations"] == []


def test_training_time_is_that_of_the_steps_alone(tmp_path):
    run_facts = {"device": "1 x cpu (cpu)", "dtype": "float32", "parameters": 15_488}
    run_facts |= {"compile_seconds": {"initial state": 1.0, "training steps": 12.5}, "mesh": {}}
    (tmp_path / "run.json").write_text(json.dumps(run_facts))
    (tmp_path / "config.json").write_text(
        json.dumps({"train": {"batch_size": 4, "steps": 9}, "model": {"context": 25}})
    )
    records = [  # of 100 tokens a step: one step of 2 s, one of 0.5 s, two of 0.25 s
        {"step": 1, "seconds": 22.0, "train_loss": 3.0, "tokens_per_second": 50.0},
        {"step": 2, "seconds": 25.5, "train_loss": 3.0, "tokens_per_second": 200.0, "val_loss": 2.0},
        {"step": 4, "seconds": 31.0, "train_loss": 3.0, "tokens_per_second": 400.0, "val_loss": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = {}
    gpu.describe(tmp_path, result)
    assert result == {
        "device": "1 x cpu (cpu)",
        "dtype": "float32",
        "parameters": 15_488,
        "compile_seconds": 12.5,
        "evaluations": [
            {"step": 2, "loss": 2.0, "train_seconds": 2.5, "wall_seconds": 5.5, "process_seconds": 25.5},
            {"step": 4, "loss": 2.5, "train_seconds": 3.0, "wall_seconds": 11.0, "process_seconds": 31.0},
        ],
        "steps": 4,
        "steps_wanted": 9,
        "final_loss": 2.5,
        "best_loss": 2.0,
        "tokens_per_second": 300.0,
        "step_milliseconds": 333.333,
    }


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    *command, dry = gpu_step("record_5", tmp_path)
    assert dry == "--dry" and run(*command).returncode == 1
    result = json.loads((tmp_path / "record_5.json").read_text(encoding="utf-8"))
    assert result["error"].startswith("UserError: nvidia-smi finds no GPU here")


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_results_do_not_mark_the_commit_as_changed(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(facts, "REPOSITORY", tmp_path)
    assert facts.commit() is None
    git("init")
    git("commit", "--allow-empty", "--message=a")
    assert re.fullmatch("[0-9a-f]{40}", facts.commit())
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "facts.json").touch()
    assert re.fullmatch("[0-9a-f]{40}", facts.commit())
    (tmp_path / "train.py").touch()
    assert re.fullmatch("[0-9a-f]{40}[+]changes", facts.commit())


@pytest.mark.slow
def test_all_gpu_steps_on_a_cpu(tmp_path):
    done = run("env", f"PYTHON={sys.executable}", "bash", BENCHMARKS / "gpu.sh", "--dry", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["failed"] == [] and done.returncode == 0, done.stdout
    for name in ("record_4", "record_3"):
        assert summary[name]["best_loss"] < 9 and summary[name]["compile_seconds"] > 0
        reached, first = summary[name]["reached"], summary[name]["evaluations"][0]
        assert summary[name]["target"] == 9 and reached == first and reached["train_seconds"] > 0
    assert summary["record_5"]["final_loss"] < 9 and summary["record_5"]["step_milliseconds"] > 0
    assert summary["sampling"]["characters_per_second_compiled_before"] > 0
    assert summary["determinism"]["deterministic"]["equal"] and summary["determinism"]["default"]["of"] > 10
    assert {path.stem for path in tmp_path.glob("*.json")} == {*gpu.STEPS, "summary"}
