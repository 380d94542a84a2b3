"""The cache of compiled programs: used by default, skipped when it cannot be used."""

import errno
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from disturb import Training, differences, result_of, write_text
from test_commands import environment

from gpt_jax.data.batches import TokenWindows
from gpt_jax.data.corpus import load_corpus
from gpt_jax.model.loss import next_token_loss
from gpt_jax.model.transformer import GPT
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.paths import text_file
from gpt_jax.plan import make_plan
from gpt_jax.storage import compilation_cache as compilation
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.state import abstract_state
from gpt_jax.training.step import make_train_steps

MODEL = REPOSITORY / "tests" / "data" / "export_v2"
CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
cpu MHz\t\t: 2445.404
flags\t\t: fpu sse4_2 avx2
bogomips\t: 4890.80

processor\t: 1
flags\t\t: fpu sse4_2 avx2
"""


def set_cache(patch, folder):
    """For programs: a cache of their own, not the one that the tests share, nor what JAX has set here."""
    shared = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for name in (*shared, "TF_CPP_MIN_LOG_LEVEL"):
        patch.delenv(name, raising=False)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture(autouse=True)
def as_a_user(monkeypatch, tmp_path):
    set_cache(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def first_sample(tmp_path_factory):
    """The text of a sample without a cache, what it says, and the folder of the cache that it makes."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        set_cache(patch, folder)
        return *sample(folder), folder / "cache"


@pytest.fixture
def sampled(first_sample, tmp_path):
    """As if the first sample had been this test's: its text, and what it said."""
    text, stderr, cache = first_sample
    shutil.copytree(cache, tmp_path / "cache")
    return text, stderr


def sample(tmp_path, *flags, **more):
    """Run sample.py; the text and what it says on stderr."""
    out = tmp_path / "output.txt"
    done = subprocess.run(
        [sys.executable, REPOSITORY / "sample.py", "--workdir", MODEL, "--length=40", "--out", out, *flags],
        env=environment() | more, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out.read_text(encoding="utf-8"), done.stderr


def was_read(stderr):
    """Whether the programs were read from the cache."""
    found = re.search(r"^compile sampling \.\.\. [\d.]+ s( \(read from the cache\))?$", stderr, re.MULTILINE)
    assert found, stderr
    return found[1] is not None


def programs(tmp_path):
    return sorted((tmp_path / "cache" / "gpt_jax").glob("*/*-cache"))


def test_the_second_sample_reads_its_programs(sampled, tmp_path):
    text, stderr = sampled
    assert not was_read(stderr)
    again, stderr = sample(tmp_path)
    assert again == text and was_read(stderr)
    names = [path.name.split("-")[0] for path in programs(tmp_path)]
    assert {"jit_decode", "jit_prefill"} <= set(names)


@pytest.mark.slow
def test_what_is_compiled_later_is_kept_too(tmp_path):
    """The text before goes beyond half a context: a second program reads it when the context is full."""
    for _ in range(2):
        sample(tmp_path, "--prompt=to be to be to")
        times = {path.name: path.stat().st_mtime_ns for path in programs(tmp_path)}
        assert sum(name.startswith("jit_prefill") for name in times) == 2
    sample(tmp_path, "--prompt=to be to be to")
    assert times == {path.name: path.stat().st_mtime_ns for path in programs(tmp_path)}


def test_an_error_ends_the_line():
    written = []
    with pytest.raises(ZeroDivisionError), compilation.compiling("x", lambda *a, **k: written.append((a, k))):
        raise ZeroDivisionError
    assert written == [(("compile x ...",), {"end": ""}), (("",), {})]


@pytest.mark.slow
def test_the_cache_stays_within_its_size(tmp_path):
    program = """
import jax, jax.numpy as jnp
from pathlib import Path
from gpt_jax.storage import compilation_cache as compilation
compilation.MAX_BYTES = 20_000
compilation.use_compilation_cache()
folder = Path(jax.config.jax_compilation_cache_dir)
made = set()
for n in range(2, 12):
    with compilation.compiling(f"{n}"):
        jax.jit(lambda x: jnp.linalg.norm(jnp.sin(x) @ x))(jnp.ones((n, n)))
    made |= {path.name for path in folder.glob("*-cache")}
left = list(folder.glob("*-cache"))
print(len(made), len(left), sum(path.stat().st_size for path in left))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True,
        timeout=120, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made, left, size = map(int, done.stdout.splitlines()[-1].split())
    assert 0 < left < made and size <= 20_000


@pytest.mark.slow
def test_the_cache_can_be_turned_off(tmp_path):
    _, stderr = sample(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not was_read(stderr) and not (tmp_path / "cache").exists()


def test_without_the_cache_platformdirs_is_not_needed():
    """Machines that are lent for benchmarks may lack it."""
    code = (
        "import sys; sys.modules['platformdirs'] = None; import gpt_jax.commands.train; "
        "from gpt_jax.storage import compilation_cache as cache; cache.use_compilation_cache()"
    )
    cacheless = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, "-c", code], env=cacheless, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_another_folder_is_left_to_jax(tmp_path):
    """Named by JAX's own variable, it is used instead of ours."""
    folder = tmp_path / "jax"
    sample(tmp_path, JAX_COMPILATION_CACHE_DIR=str(folder), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert list(folder.glob("*-cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    _, stderr = sample(tmp_path)
    assert re.search(
        r"^note: no compilation cache: .* cannot be used \(Not a directory\)$", stderr, re.MULTILINE
    )
    assert not was_read(stderr) and "warning" not in stderr.lower()


@pytest.mark.slow
def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path, faults_library):
    """The first program cannot be written whole; what is left of it is never read as one."""
    fault = {
        "LD_PRELOAD": str(faults_library), "FAULT_ROOT": str(tmp_path / "cache"),
        "FAULT_DO": str(errno.ENOSPC), "FAULT_LOG": str(tmp_path / "log"),
    }  # fmt: skip
    text, _ = sample(tmp_path, **fault)
    log = tmp_path / "log"
    operations = log.read_text(encoding="utf-8").splitlines()
    write = next(n for n, line in enumerate(operations) if re.match(r"write\t.*-cache\t", line))
    shutil.rmtree(tmp_path / "cache")
    log.unlink()
    again, stderr = sample(tmp_path, FAULT_AT=str(write + 1), **fault)
    assert log.read_text(encoding="utf-8").splitlines()[write] == operations[write]
    assert again == text and not was_read(stderr)
    assert "warning" not in stderr.lower() and "Traceback" not in stderr
    assert sample(tmp_path)[0] == text
    assert was_read(sample(tmp_path)[1])


@pytest.mark.slow
def test_training_comes_to_the_same_bits_with_and_without_the_cache(tmp_path):
    text = write_text(tmp_path / "text.txt")
    names = ("off", "cold", "warm")
    for name in names:
        off = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if name == "off" else {}
        training = Training(tmp_path / name, text, {"train.steps": 20}, off)
        assert training.wait() == 0, training.output
        read = re.search(r"^compile training steps \.\.\. [\d.]+ s \(read", training.output, re.MULTILINE)
        assert bool(read) == (name == "warm"), training.output
        for what in ("evaluation", "sampling"):
            assert len(re.findall(rf"^compile {what} \.\.\. [\d.]+ s", training.output, re.MULTILINE)) == 1
    assert any(path.name.startswith("jit_train_steps") for path in programs(tmp_path))
    assert differences(result_of(tmp_path / "cold"), result_of(tmp_path / "off")) == []
    assert differences(result_of(tmp_path / "warm"), result_of(tmp_path / "off")) == []


def test_one_program_serves_every_seed_and_length(tiny_config):
    """Seed and steps are arguments, not constants: another run finds the program in the cache."""

    def program(seed, steps):
        config = replace(tiny_config(model={"dropout": 0.1}, train={"steps": steps}), seed=seed)
        corpus = load_corpus(text_file(config.data), config.model.context, config.data.train_fraction)
        plan = make_plan(config)
        model = GPT(plan.config.model, corpus.tokenizer.vocab_size, plan.execution)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = abstract_state(model, optimizer, plan.mesh)
        train_steps = make_train_steps(plan, model, next_token_loss, state, 10)
        source = TokenWindows(corpus.train, config.train.batch_size, config.model.context)
        return train_steps.lower(state, source, np.uint32(seed), np.int32(1), np.int32(steps)).as_text()

    assert program(1337, 20) == program(2**32 - 1, 30)


def test_the_folder_is_that_of_the_kind_of_cpu():
    key = compilation.machine_key(CPUINFO, 2)
    assert re.fullmatch("[0-9a-f]{16}", key)
    assert key == compilation.machine_key(CPUINFO.replace("2445.404", "3000.000").replace("4890", "9"), 2)
    others = [
        compilation.machine_key(CPUINFO, 1),
        compilation.machine_key(CPUINFO.replace("avx2", "avx2 avx512f"), 2),
        compilation.machine_key(CPUINFO.replace("AMD EPYC", "AMD EPYC 9354"), 2),
        compilation.machine_key("arm64 Apple M3", 2),
        compilation.machine_key("arm64 Apple M4", 2),
    ]
    assert len({key, *others}) == 6


def test_a_program_that_was_not_written_completely_is_deleted(sampled, tmp_path):
    """JAX writes the time of use last. It would not write such a program again, and JAX 0.9 no other one."""
    whole = programs(tmp_path)
    torn, kept = whole[0], {path: path.stat().st_mtime_ns for path in whole[1:]}
    torn.write_bytes(torn.read_bytes()[:100])
    torn.with_name(torn.name.removesuffix("-cache") + "-atime").unlink()
    sample(tmp_path)
    assert was_read(sample(tmp_path)[1])
    assert programs(tmp_path) == whole and torn.stat().st_size > 100
    assert kept == {path: path.stat().st_mtime_ns for path in whole[1:]}


GLOBAL_STATE = """
import logging, sys, warnings
from pathlib import Path
import flax, jax, numpy, optax, orbax.checkpoint
from jax._src import monitoring

def state():
    absl = logging.getLogger("absl")
    return (
        list(monitoring.get_event_listeners()), list(monitoring.get_event_duration_listeners()),
        sys.excepthook, sys.unraisablehook, warnings.showwarning, list(warnings.filters),
        list(absl.filters), absl.level, jax.config.jax_compilation_cache_dir, sys.stdout, sys.stderr,
    )

before = state()
import gpt_jax, gpt_jax.commands.train
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.compilation_cache import compiling, use_compilation_cache
Checkpoints(Path("none")).close()
assert state() == before, (state(), before)
with compiling("x"):
    jax.jit(lambda x: x + 1)(1)
assert state() == before
for _ in range(2):
    use_compilation_cache()
assert len(state()[0]) == len(before[0]) + 1
warnings.warn("Error reading persistent compilation cache entry for 'x'", stacklevel=1)
warnings.warn("something else", stacklevel=1)
"""


def test_only_the_commands_change_what_the_process_shares():
    """An import, `compiling` or a `Checkpoints` leaves no hook, listener or filter behind."""
    done = subprocess.run(
        [sys.executable, "-c", GLOBAL_STATE],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"compile x \.\.\. [\d.]+ s\n", done.stdout)
    assert "something else" in done.stderr and "persistent" not in done.stderr
