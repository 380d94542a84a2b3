"""Faults that strike a whole run: train.py as a real process, killed, signalled, starved, fooled."""

import fcntl
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from errno import EIO, ENOSPC, EROFS
from pathlib import Path

import numpy as np
import pytest
from disturb import (
    SETTINGS,
    Training,
    differences,
    files_of,
    result_of,
    spoil,
    spoil_something,
    steps_of,
    undisturbed,
    write_text,
)  # fmt: skip

from gpt_jax.monitor.metrics import read_metrics
from gpt_jax.paths import ROOT as REPOSITORY

pytestmark = [pytest.mark.faults, pytest.mark.slow]
DRIVER = REPOSITORY / "tests" / "driver.py"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def cache():
    """What lets a process read all its programs from the tests' cache instead of compiling them."""
    return {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}


@pytest.fixture(scope="session")
def whole(text, cache, tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    training = Training(workdir, text, environment=cache)
    assert training.wait() == 0, training.output
    return workdir


@pytest.fixture
def start(text, cache, tmp_path):
    """Starts train.py on `tmp_path / "run"`; kills what still runs at the end."""
    started = []

    def make(*, workdir=None, environment=None, settings=None, **options):
        training = Training(
            workdir or tmp_path / "run", text, settings, cache | dict(environment or {}), **options
        )
        started.append(training)
        return training

    yield make
    for training in started:
        training.send(signal.SIGKILL)
        training.wait()


def assert_ends_as(start, whole, workdir):
    """Left in peace, the run goes on to the very end of the undisturbed one."""
    training = start(workdir=workdir)
    assert training.wait() == 0, training.output
    assert differences(result_of(workdir), result_of(whole)) == []
    steps = [record["step"] for record in read_metrics(workdir / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    leftovers = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdecimal()]
    assert all(re.fullmatch(r"\d+\.(damaged\d|amended\.json)", name) for name in leftovers), leftovers


@pytest.mark.parametrize("seed", [*range(20)])
def test_killed_at_random_instants(start, whole, text, tmp_path, seed):
    """Three SIGKILLs for each seed: while it starts, compiles, steps, evaluates, saves."""
    chance = random.Random(seed)
    kills, number = 0, 0
    while kills < 3:
        workdir = tmp_path / f"run{number}"
        compiles = chance.random() < 0.25
        training = start(
            workdir=workdir, environment={"JAX_ENABLE_COMPILATION_CACHE": "0"} if compiles else {}
        )
        if chance.random() < 0.85:
            training.wait_for("compile")
        status = training.kill_after(chance.uniform(0, 12 if compiles else 3))
        assert status in (-9, 0), training.output
        kills += status == -9
        if status == 0:  # too late: the next one strikes another run
            assert differences(result_of(workdir), result_of(whole)) == []
            number += 1
    assert_ends_as(start, whole, tmp_path / f"run{number}")


@pytest.mark.parametrize("where", ["save", "compile", "step", "evaluation"])
def test_killed_in_every_phase(start, whole, tmp_path, where):
    training = start(program=DRIVER, environment={"DISTURBANCE": f"SIGKILL {where}"})
    assert training.wait() == -9 and "sending SIGKILL in " in training.output, training.output
    assert_ends_as(start, whole, tmp_path / "run")


@pytest.mark.parametrize(
    "what, where",
    [
        ("SIGTERM", "save"),
        *((what, where) for what in ("SIGTERM", "SIGINT", "SIGHUP")
          for where in ("compile", "step", "evaluation", "save") if (what, where) != ("SIGTERM", "save")),
    ],
)  # fmt: skip
def test_a_signal_saves_and_the_same_command_goes_on(start, whole, tmp_path, what, where):
    training = start(program=DRIVER, environment={"DISTURBANCE": f"{what} {where}"})
    assert training.wait() == 128 + signal.Signals[what], training.output
    before = training.output.partition(f"sending {what}")[0]
    stopped = re.search(
        rf"stopped by {what}; saved after step (\d+) of 40. The same command resumes it. "
        rf"To sample: python sample.py --workdir {re.escape(str(tmp_path / 'run'))}\n",
        training.output,
    )
    assert stopped, training.output
    step = int(stopped[1])
    assert steps_of(tmp_path / "run")[-1] == step
    # At most one call of the step function, which here ends at the next evaluation, came after it.
    evaluated = [int(n) for n in re.findall(r"^step (\d+): training batches", before, flags=re.MULTILINE)]
    assert step <= max(evaluated, default=0) + 10
    assert step == 0 if where == "compile" else step > 0
    assert_ends_as(start, whole, tmp_path / "run")


@pytest.mark.parametrize("what", ["SIGTERM2", "SIGINT2", "SIGHUP2"])
def test_a_second_signal_while_it_saves_leaves_the_old_or_the_new(start, whole, tmp_path, what):
    training = start(program=DRIVER, environment={"DISTURBANCE": f"{what} save"})
    number = signal.Signals[what[:-1]]
    assert training.wait() in (-number, 130, 128 + number), training.output
    assert steps_of(tmp_path / "run")
    assert_ends_as(start, whole, tmp_path / "run")


def test_ignored_signals_stay_ignored(start, whole, tmp_path):
    """As nohup and a shell's & have them."""
    training = start(prefix=["sh", "-c", 'trap "" HUP; exec "$@"', "sh"])
    assert training.wait_for("step 10:")
    training.send(signal.SIGHUP)
    assert training.wait() == 0, training.output
    assert differences(result_of(tmp_path / "run"), result_of(whole)) == []


def test_two_trainers_on_one_workdir(start, whole, tmp_path):
    first = start(settings={"train.steps": 1_000_000})
    assert first.wait_for("compile training steps ... ")
    second = start(settings={"train.steps": 1_000_000})
    assert second.wait() == 2
    assert f"run is in use by process {first.process.pid} on " in second.output
    assert second.output.count("\n") == 1 and second.output.startswith("error: workdir = ")
    assert first.process.poll() is None
    first.send(signal.SIGKILL)
    first.wait()
    third = start(settings={"train.steps": 1_000_000})
    assert third.wait_for("step "), third.output  # a killed process's lock does not block


@pytest.mark.parametrize("spoiled", ["nothing", "metadata.json", "SHA256SUMS", "params"])
@pytest.mark.parametrize("seed", [*range(3)])
def test_a_damaged_newest_checkpoint_is_stepped_around(start, whole, tmp_path, spoiled, seed):
    """Bits, bytes or files gone: the older one is used, loudly, to the same end."""
    workdir = tmp_path / "run"
    training = start(workdir=workdir)
    assert training.wait_for("step 30:")
    training.send(signal.SIGKILL)
    training.wait()
    newest = workdir / "checkpoints" / str(steps_of(workdir)[-1])
    if spoiled == "nothing":
        name = spoil_something(newest, random.Random(seed)).split()[1]
    else:
        path = newest / spoiled if spoiled != "params" else files_of(newest / "params")[seed]
        spoil(path, ("delete", "truncate", "flip")[seed % 3])
        name = str(path.relative_to(newest))
    training = start(workdir=workdir)
    assert training.wait() == 0, training.output
    assert re.search(
        rf"WARNING: checkpoint \S+/{newest.name} is damaged: \S*{re.escape(name)}:? .*Trying an older one.",
        training.output,
    ), training.output
    assert f"WARNING: the damaged checkpoint is kept as {newest}.damaged1" in training.output
    assert "resume  after step" in training.output
    assert differences(result_of(workdir), result_of(whole)) == []


def test_when_all_checkpoints_are_bad_nothing_is_touched(start, whole, tmp_path):
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(workdir)], check=True)
    for step in steps_of(workdir):
        spoil_something(workdir / "checkpoints" / str(step), random.Random(0))
    before = {path: path.read_bytes() for path in files_of(workdir) if path.name != "lock"}
    training = start(workdir=workdir)
    assert training.wait() == 1
    assert re.search(
        r"^error: all checkpoints in \S+/checkpoints are damaged \(40, 30\); nothing was changed there. "
        r"Restore a copy, or start another run with another --workdir$",
        training.output, flags=re.MULTILINE,
    ), training.output  # fmt: skip
    sample = subprocess.run(
        [sys.executable, str(REPOSITORY / "sample.py"), "--workdir", workdir, "--out", tmp_path / "o"],
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert sample.returncode == 1 and "are damaged (40, 30)" in sample.stderr, sample.stderr
    assert not (tmp_path / "o").exists()
    assert {path: path.read_bytes() for path in files_of(workdir) if path.name != "lock"} == before


def test_lost_checkpoints_are_not_passed_over_in_silence(start, whole, tmp_path):
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(workdir)], check=True)
    subprocess.run(["rm", "-r", str(workdir / "checkpoints")], check=True)
    training = start(workdir=workdir)
    assert training.wait() == 0
    assert "has metrics but no checkpoint: training starts from step 0" in training.output
    assert differences(result_of(workdir), result_of(whole)) == []


@pytest.mark.parametrize(
    "where, shown",
    [
        ("nan:12", r"the loss is nan, and the gradient norm is \S+"),
        ("inf:12", r"the loss is inf, and the gradient norm is \S+"),
        (
            "gradient:12",
            r"the loss is \d\.\d+, and the gradient norm is not finite for blocks.mlp.up.kernel nan",
        ),
        ("nan:0", r"the loss is nan, and the gradient norm is \S+"),
        ("nan:30", r"the loss is nan, and the gradient norm is \S+"),
    ],
)
def test_a_nan_stops_the_run_and_is_never_saved(start, text, cache, tmp_path, where, shown):
    """The state before it is what a run that ends there has, to the bit, however it is tried again."""
    last = int(where.partition(":")[2])  # updates before the bad one
    settings = {"train.grad_accum_steps": 1, "optimizer.schedule": "constant"}
    program = {"program": DRIVER, "environment": {"DISTURBANCE": f"x {where}"}}
    for _ in range(2):
        training = start(settings=settings, **program)
        assert training.wait() == 1, training.output
        wanted = rf"^error: step {last + 1}: {shown}\. The state before it, after step {last}, is saved"
        assert re.search(wanted, training.output, flags=re.MULTILINE), training.output
        assert steps_of(tmp_path / "run")[-1] == last
    if last:
        start(workdir=tmp_path / "short", settings=settings | {"train.steps": last}).wait()
        got, wanted = result_of(tmp_path / "run"), result_of(tmp_path / "short")
        arrays = [name for name in wanted if "[" in name]
        assert not set(differences(got, wanted)) & set(arrays)


def test_an_update_that_overflows_is_left_out(start, tmp_path):
    """In the middle of a call, with lines of metrics due just before it."""
    overflow = {"DISTURBANCE": "x overflow:15"}
    settings = {"train.save_minutes": 9}
    training = start(settings=settings, program=DRIVER, environment=overflow)
    assert training.wait() == 1, training.output
    assert re.search(
        r"error: step 16: the loss is [\d.]+, and the gradient norm is [\d.]+, and the update would make "
        r"blocks.attention.out.kernel, .* not finite. The state before it, after step 15, is saved.",
        training.output,
    ), training.output
    assert steps_of(tmp_path / "run")[-1] == 15
    result = result_of(tmp_path / "run")
    assert all(np.isfinite(array).all() for array in result.values() if isinstance(array, np.ndarray))
    assert result["steps"] == [3, 6, 9, 10, 12, 15]


def test_a_spike_is_shown(start, tmp_path):
    settings = {"train.grad_accum_steps": 1, "train.log_every": 10}
    training = start(settings=settings, program=DRIVER, environment={"DISTURBANCE": "x spike:24"})
    assert training.wait() == 0, training.output
    spike = r"^step 25: loss \d\S+ is far above the mean \S+ of the \d+ before it"
    assert re.search(spike, training.output, flags=re.MULTILINE), training.output


def test_deterministic_is_one_thread(start, tmp_path):
    """With all cores at hand, the bits are those of one core (test_backend counts the threads)."""
    settings = {"model.d_model": 128, "model.context": 64, "train.steps": 4, "train.batch_size": 16,
                "train.grad_accum_steps": 1, "train.eval_every": 4}  # fmt: skip
    use_all = (
        "import os, sys; os.sched_setaffinity(0, range(os.cpu_count())); os.execv(sys.argv[1], sys.argv[1:])"
    )
    all_cores = {"prefix": [sys.executable, "-c", use_all]}
    runs = {"one": {}, "deterministic": all_cores | {"flags": ["--deterministic"]}}
    for name, options in runs.items():
        training = start(workdir=tmp_path / name, settings=settings, **options)
        assert training.wait() == 0, training.output
    results = {name: result_of(tmp_path / name) for name in runs}
    assert differences(results["deterministic"], results["one"]) == []


# What surrounds the process.


def test_a_clock_that_goes_back(start, whole, faults_library, tmp_path):
    begun = time.monotonic()
    training = start(environment={"LD_PRELOAD": str(faults_library), "FAULT_CLOCK": "1"})
    assert training.wait() == 0, training.output
    elapsed = time.monotonic() - begun
    assert differences(result_of(tmp_path / "run"), result_of(whole)) == []
    seconds = [record["seconds"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[0] <= seconds[-1] <= elapsed


def test_the_locale_is_c_and_the_text_is_not(start, tmp_path):
    text = tmp_path / "näive.txt"
    text.write_text("naïve — 日本語 \U0001f600\n" * 200, encoding="utf-8")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    training = start(environment=environment, settings={"data.path": text, "train.sample_length": 100})
    assert training.wait() == 0, training.output
    assert "日" in (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    sample = subprocess.run(
        [sys.executable, str(REPOSITORY / "sample.py"), "--workdir", str(tmp_path / "run"), "--out",
         str(tmp_path / "out.txt"), "--length", "50", "--prompt", "日本"],
        env=os.environ | environment, capture_output=True,
    )  # fmt: skip
    assert sample.returncode == 0, sample.stderr
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").startswith("日本")
    assert rb"\u65e5\u672c" in sample.stdout


@pytest.mark.parametrize("stream", ["closed", "left"])
def test_nobody_reads_the_output(start, whole, tmp_path, stream):
    """stdout and stderr are closed, or a pipe whose reader has left."""
    reading, writing = os.pipe()
    os.close(reading)
    prefix = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"] if stream == "closed" else []
    training = start(prefix=prefix, stdout=writing)
    os.close(writing)
    assert training.process.wait(timeout=200) == 0
    assert differences(result_of(tmp_path / "run"), result_of(whole)) == []


def test_sampling_for_a_reader_who_leaves(whole, tmp_path):
    """`sample.py | head -1`: the file is written all the same."""
    sample = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "sample.py"), "--workdir", str(whole), "--length", "2000", "--show",
         "2000", "--out", str(tmp_path / "out.txt")],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    sample.stdout.close()
    assert sample.wait(timeout=120) == 0
    assert len((tmp_path / "out.txt").read_text(encoding="utf-8")) == 2000


@pytest.mark.parametrize("columns", [20, 1, 0])
def test_a_narrow_terminal(start, whole, tmp_path, columns):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    training = start(stdout=terminal, environment={"TERM": "xterm"})
    os.close(terminal)
    output = []

    def read():
        try:
            while data := os.read(controller, 4096):
                output.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    assert training.process.wait(timeout=200) == 0, b"".join(output)
    reader.join()
    os.close(controller)
    assert differences(result_of(tmp_path / "run"), result_of(whole)) == []


# What the disk does.


def place(operation, total):
    """The number of an operation from its part of the whole."""
    return max(1, round(operation * total))


@pytest.fixture(scope="session")
def operations(text, cache, faults_library, tmp_path_factory):
    """The file operations of an undisturbed run in its workdir: what, path, other path."""
    workdir = tmp_path_factory.mktemp("counted") / "run"
    log = workdir.parent / "log"
    environment = {"LD_PRELOAD": str(faults_library), "FAULT_ROOT": str(workdir), "FAULT_LOG": str(log)}
    training = Training(workdir, text, environment=cache | environment)
    assert training.wait() == 0, training.output
    return [line.split("\t") for line in log.read_text(encoding="utf-8").splitlines()]


def test_metrics_are_on_the_disk_before_the_checkpoint_that_covers_them(operations):
    """A power cut after the checkpoint's rename must not find lines of its steps missing."""
    begun = [n for n, (what, path, _) in enumerate(operations) if what == "mkdir" and re.search(
        r"/checkpoints/\d+\.unfinished[^/]*$", path)]  # fmt: skip
    assert len(begun) >= 5
    for save in begun:
        of_metrics = [what for what, path, _ in operations[:save] if path.endswith("/metrics.jsonl")]
        assert of_metrics[-1] == "fsync"


@pytest.mark.parametrize(
    "error, part",
    [
        (ENOSPC, 0.5),
        *[(ENOSPC, n / 12) for n in range(1, 12) if n != 6],
        *[(EIO, n / 5) for n in range(1, 5)],
    ],
)
def test_a_disk_that_fails(start, whole, faults_library, operations, tmp_path, error, part):
    """From one operation on nothing can be written any more; when it can again, the run goes on."""
    total = len(operations)
    for number in range(4):
        workdir = tmp_path / f"run{number}"
        environment = {"LD_PRELOAD": str(faults_library), "FAULT_ROOT": str(workdir), "FAULT_DO": str(error),
                       "FAULT_AT": str(place(part, total))}  # fmt: skip
        training = start(workdir=workdir, environment=environment)
        if training.wait() != 0:
            break
        total = round(0.7 * total)  # a faster run saves less often: it was over before so many operations
    assert training.process.returncode in (1, 2), training.output
    last = training.output.splitlines()[-1]
    assert last.startswith("error: ") and str(workdir) in last, training.output
    assert "Traceback" not in training.output, training.output
    assert_ends_as(start, whole, workdir)


def test_a_full_disk_is_named_first(start, faults_library, tmp_path):
    unfinished = tmp_path / "run" / "checkpoints" / "30.unfinished"
    environment = {"LD_PRELOAD": str(faults_library), "FAULT_ROOT": str(unfinished), "FAULT_DO": str(ENOSPC),
                   "FAULT_AT": "6"}  # fmt: skip
    training = start(environment=environment)
    assert training.wait(timeout=120) == 1, training.output
    line = re.escape(f"error: no space left on device: the checkpoint of step 30 could not be saved in "
                     f"{tmp_path / 'run' / 'checkpoints'}, which takes ")  # fmt: skip
    last = training.output.splitlines()[-1]
    assert re.fullmatch(line + r"0\.\d MB; the one of step 20 is kept", last), training.output


@pytest.mark.parametrize("at", [3, 2, 4, 6, 8, 12])
def test_a_save_that_fails_early_ends_the_process(start, whole, faults_library, tmp_path, at):
    """Not ten minutes later: threads of Orbax wait that long for what a failed save never comes to."""
    unfinished = tmp_path / "run" / "checkpoints" / "30.unfinished"
    environment = {"LD_PRELOAD": str(faults_library), "FAULT_ROOT": str(unfinished), "FAULT_DO": str(EIO),
                   "FAULT_AT": str(at)}  # fmt: skip
    training = start(environment=environment)
    assert training.wait(timeout=120) == 1, training.output
    last = training.output.splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 30 could not be saved in "), training.output
    assert "Traceback" not in training.output, training.output
    assert_ends_as(start, whole, tmp_path / "run")


def test_a_workdir_that_cannot_be_written_is_noticed_at_once(start, faults_library, tmp_path):
    for error, words in ((EROFS, "Read-only file system"), (ENOSPC, "No space left on device")):
        training = start(
            environment={"LD_PRELOAD": str(faults_library), "FAULT_ROOT": str(tmp_path / "run"),
                         "FAULT_DO": str(error), "FAULT_AT": "1"},
        )  # fmt: skip
        assert training.wait() == 2
        assert (
            f"error: workdir = {tmp_path / 'run'} cannot be written ({words}): choose another"
            in training.output
        )
        assert "compile" not in training.output
        assert not (tmp_path / "run").exists()


def test_checkpoints_that_cannot_be_written_are_noticed_at_once(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("not a folder", encoding="utf-8")
    training = start()
    assert training.wait() == 1
    assert f"error: {tmp_path / 'run'} cannot be written: " in training.output
    assert "compile" not in training.output and "Traceback" not in training.output


def test_a_jax_that_computes_wrongly_does_not_train(start, tmp_path):
    training = start(program=DRIVER, environment={"DISTURBANCE": "x wrong"})
    assert training.wait() == 2
    assert re.fullmatch(
        r"error: jax \S+ gives wrong results on this cpu \(\d+ for 32768 squared\): install another version, "
        r"pip install 'jax\S+'\n", training.output,
    ), training.output  # fmt: skip
    assert not (tmp_path / "run").exists()


def in_a_namespace(script, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ro", "size=1200k"])
def test_a_real_small_or_read_only_file_system(text, cache, tmp_path, kind):
    """On a tmpfs, where this user may mount one."""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o {kind} none disk"
    if in_a_namespace(mount, tmp_path).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    settings = SETTINGS | {"model.d_model": 64, "data.path": text}
    flags = " ".join(f"--config.{key}={value}" for key, value in settings.items())
    train = (f"{sys.executable} {REPOSITORY}/train.py --config {REPOSITORY}/configs/smoke.py "
             f"--workdir disk/run {flags}")  # fmt: skip
    done = in_a_namespace(f"{mount} && {train}; echo status $?; ls disk/run/checkpoints; "
                          f"cd disk/run/checkpoints/1* && sha256sum -c --quiet SHA256SUMS && echo whole",
                          tmp_path)  # fmt: skip
    if kind == "ro":
        assert "status 2" in done.stdout and "compile" not in done.stdout, done
        assert "error: workdir = disk/run cannot be written (Read-only file system)" in done.stderr
    else:
        assert "status 1" in done.stdout and "whole" in done.stdout, done
        assert re.search(r"error: no space left on device: .*disk/run.*takes 0\.\d MB", done.stderr), (
            done.stderr
        )


def test_settings_of_another_run_are_refused_with_both_values(start, whole, tmp_path):
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(workdir)], check=True)
    training = start(workdir=workdir, settings={"optimizer.learning_rate": 0.5})
    assert training.wait() == 2
    assert "with optimizer.learning_rate = 0.01, not 0.5: keep it" in training.output
    longer = start(workdir=workdir, settings={"train.steps": 45, "train.eval_every": 15})
    assert longer.wait() == 0, longer.output
    assert steps_of(workdir)[-1] == 45
    assert Path(workdir / "checkpoints" / "45").is_dir()


def test_the_undisturbed_run_is_repeatable(text, whole, tmp_path):
    """What all comparisons here rest on, and from compiled programs to compiled ones."""
    undisturbed(tmp_path / "run", text)
    assert differences(result_of(tmp_path / "run"), result_of(whole)) == []
