"""train.py, sample.py and evaluate as a user runs them: as processes, from another folder.

Most of what is only an error runs in this process, by the `main` that the program calls.
"""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest

from gpt_jax.commands import sample, train
from gpt_jax.paths import ROOT as REPOSITORY

SMOKE = ("--config", str(REPOSITORY / "configs" / "smoke.py"))


def environment():
    """The user's own: without what conftest.py sets for the tests."""
    return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}


def run(*command, cwd):
    program, *arguments = command
    program = ["-m"] if program == "-m" else [str(REPOSITORY / program)]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        cwd=cwd, env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository without any run, so that default paths can be tried."""
    copy = tmp_path_factory.mktemp("repository")
    for name in ("train.py", "sample.py", "gpt_jax", "configs"):
        (shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy)(REPOSITORY / name, copy / name)
    (copy / "artifacts").mkdir()
    shutil.copy(REPOSITORY / "artifacts" / "input.txt", copy / "artifacts")
    return copy


@pytest.fixture(scope="module")
def workdir(repository, tmp_path_factory):
    """A finished smoke run at its default place, made from another folder; before it there was none."""
    folder = tmp_path_factory.mktemp("elsewhere")
    done = run(repository / "sample.py", cwd=folder)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: no trained run in .*artifacts: train one with python train.py --config "
        r"configs/shakespeare_cpu.py, or name one with --workdir\n", done.stderr,
    )  # fmt: skip
    command = ("--config", repository / "configs" / "smoke.py", "--minutes", "30")
    done = run(repository / "train.py", *command, cwd=folder)
    assert list(folder.iterdir()) == []
    assert done.returncode == 0, done.stderr
    for text in (
        "device ", "parameters: 1 layers, 2 heads, width 32, context 32",
        "1,003,854 training tokens, 111,540 validation tokens, vocabulary of 65", "run     ",
        "step 40: training batches",
        "steps   all 40 steps fit into 30 min: ", "whole validation split ", "gap ", "done in ",
        "To sample: python sample.py\n",
    ):  # fmt: skip
        assert text in done.stdout, text
    return repository / "artifacts" / "smoke"


@pytest.mark.slow
def test_sample_without_flags_takes_the_newest_run(workdir, repository, tmp_path):
    older = repository / "artifacts" / "older"
    shutil.copytree(workdir, older)
    os.utime(older / "checkpoints", (1, 1))
    done = run(repository / "sample.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{workdir}, best checkpoint, step " in done.stderr
    text = (repository / "artifacts" / "output.txt").read_text(encoding="utf-8")
    assert len(text) == 10_000 and done.stdout == text[:500] + " ...\n"


def test_train_then_sample_then_evaluate(workdir, run_here, tmp_path):
    out = tmp_path / "deep" / "text.txt"
    done = run("sample.py", "--workdir", str(workdir), "--out", str(out), "--length", "900", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert len(text) == 900
    assert done.stdout == text[:500] + " ...\n"

    done = run_here(
        sample.main, "--workdir", str(workdir), "--out", str(out), "--length", "70", "--num_samples", "3",
        "--prompt", "ROMEO:", "--top_k", "9", "--seed", "3", "--which", "last", "--window", "exact",
        cwd=tmp_path,
    )  # fmt: skip
    samples = out.read_text(encoding="utf-8").split("\n" + "-" * 20 + "\n")
    assert len(samples) == 3 and len(set(samples)) == 3
    assert all(s.startswith("ROMEO:") and len(s) == 76 for s in samples)
    assert done.stdout == samples[0] + "\n"

    done = run("-m", "gpt_jax", "evaluate", "--workdir", str(workdir), "--which", "last", cwd=tmp_path)
    records = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    val_loss = json.loads(records[-1])["val_loss"]
    assert f"loss       {val_loss:.4f} nats per token" in done.stdout
    assert "111,539 tokens predicted" in done.stdout


@pytest.mark.slow
def test_a_second_training_says_it_is_finished(workdir):
    done = run("train.py", *SMOKE, "--workdir", str(workdir), cwd=workdir)
    assert done.returncode == 0
    assert "this run is finished: 40 of 40 steps are done" in done.stdout


@pytest.mark.slow
def test_overrides_reach_the_run(tmp_path):
    (tmp_path / "my.txt").write_text("to be or not to be, " * 100, encoding="utf-8")
    done = run(
        "train.py", *SMOKE, "--workdir=run", "--config.data.path=my.txt", "--config.model.n_layer=2",
        "--config.train.steps=8", "--config.train.grad_accum_steps=2", "--config.optimizer.learning_rate=1",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done_there = run("-m", "gpt_jax", "evaluate", "--workdir", tmp_path / "run", cwd="/")  # finds my.txt
    assert done_there.returncode == 0, done_there.stderr
    assert "2 layers" in done.stdout and "my.txt: 1,800 training tokens" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["train"]["grad_accum_steps"] == 2 and config["optimizer"]["learning_rate"] == 1.0


def test_an_error_is_one_line_and_status_2(tmp_path):
    done = run("train.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    *configs, error = done.stderr.splitlines()
    assert re.fullmatch(r"error: --config is missing: try --config configs/shakespeare_cpu\.py.*", error)
    # A line for each config file, none cut, on a terminal of 80 columns.
    assert [line.split()[0] for line in configs[1:]] == sorted(
        f.name for f in (REPOSITORY / "configs").glob("*.py")
    )
    assert not [line for line in configs if len(line) > 79 or line.endswith("...")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--config", "nowhere.py"), "nowhere.py"),
        (
            (*SMOKE, "--config.model.n_layers=3"),
            "unknown setting model.n_layers: did you mean --config.model.n_layer?",
        ),
        ((*SMOKE, "--config.model.n_layer=three"), "three"),
        ((*SMOKE, "--config.train.accumulate=2"), "it is now called train.grad_accum_steps"),
        ((*SMOKE, "--config.model.n_head=5"), "model.d_model = 32 cannot be divided"),
        (
            (*SMOKE, "--config.optimizer.learning_rate=-1"),
            "optimizer.learning_rate = -1.0 must be above 0",
        ),
        ((*SMOKE, "--config.data.path=nowhere.txt"), "/nowhere.txt does not exist: give the path of"),
        ((*SMOKE, "--wrokdir=x"), "wrokdir"),
        ((*SMOKE, "extra"), "unexpected argument 'extra'"),
    ],
)
def test_bad_training_input_is_one_line_and_status_2(run_here, arguments, message, tmp_path):
    done = run_here(
        train.main,
        *arguments,
        *(() if "--wrokdir=x" in arguments else ("--workdir=run",)),
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--prompt", "a€b"), "unknown characters: '€'"),
        (("--temperature", "nan"), "temperature = nan must be"),
        (("--length", "-1"), "length = -1 must be"),
        (("--prompt_file", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--out", "."), "out = . is a folder"),
    ],
)
def test_bad_sampling_input_is_one_line_and_status_2(run_here, tiny_run, arguments, message, tmp_path):
    out = tmp_path / "out.txt"
    done = run_here(sample.main, "--workdir", str(tiny_run), "--out", str(out), *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", done.stderr), done.stderr
    assert not out.exists() and done.stdout == ""


def test_no_trained_run_tells_how_to_train_one(run_here, tmp_path):
    done = run_here(sample.main, "--workdir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "name another folder, or train one" in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    command = ("train.py", *SMOKE, "--workdir=run", "--config.train.steps=20000")
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / command[0]), *command[1:]],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    output = ""
    with process.stdout:
        for line in process.stdout:
            output += line
            if line.startswith("step 20:"):
                process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    step = int(re.search(r"stopped by SIGINT; saved after step ([\d,]+)", output)[1].replace(",", ""))
    done = run(*command[:-1], f"--config.train.steps={step + 5}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resume  after step {step:,} of {step + 5:,}" in done.stdout


@pytest.mark.slow
def test_a_terminal_gets_a_progress_bar(tmp_path):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *SMOKE, "--workdir=run"],
        cwd=tmp_path, env=environment() | {"TERM": "xterm"}, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    output = b""
    try:
        while data := os.read(controller, 4096):
            output += data
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=60) == 0, output
    bar = output.decode().replace("\r", "\n")
    assert re.search(r"100%.*40/40.*loss=\d.*val=\d.*tok/s=", bar), bar


@pytest.mark.slow
def test_tensorboard_is_behind_an_extra(tmp_path):
    """With the package its events are there; without it one line names the extra."""
    done = run("train.py", *SMOKE, "--workdir=run", "--config.train.tensorboard=True", cwd=tmp_path)
    if done.returncode:
        assert done.returncode == 2 and "pip install -e '.[tensorboard]'" in done.stderr
        assert not (tmp_path / "run").exists()
    else:
        assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
