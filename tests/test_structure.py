"""The house: a module imports only modules above it in this list, which goes from input to output."""

import ast

import pytest
from conftest import draw

from gpt_jax.config import REPOSITORY

ORDER = [
    "output", "errors", "config", "chips", "backend", "tokenizer", "corpus", "batches", "sharding",
    "dropout", "model", "params", "rng", "loss", "optimizer", "hlo", "train_state", "train_step",
    "integrity", "compilation", "lock", "metrics", "checkpoint", "metadata", "exported", "sampling",
    "sampler", "run", "signals", "report", "resume", "trainer", "command_line", "topologies", "compile",
    "evaluate", "export", "write_samples",
]  # fmt: skip
PACKAGE = REPOSITORY / "gpt_jax"


def imports(path):
    """The modules of the package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("gpt_jax") for alias in node.names), path
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"a relative import in {path}"
            if node.module.startswith("gpt_jax."):
                found.add(node.module.split(".")[1])
            elif node.module == "gpt_jax":
                found.update(alias.name for alias in node.names)
    return found


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


def test_reading_a_model_imports_no_training():
    """A model is loaded, evaluated and sampled without the optimizer and the training step."""
    needed, new = set(), {"run"}
    while new:
        needed |= new
        new = set().union(*(imports(PACKAGE / f"{module}.py") for module in new)) - needed
        new &= set(ORDER)
    assert needed >= {"model", "sampler", "checkpoint", "exported"}
    assert not needed & {"optimizer", "train_state", "train_step", "trainer"}


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module):
    above = set(ORDER[: ORDER.index(module)])
    assert imports(PACKAGE / f"{module}.py") <= above


def test_only_the_model_is_linen():
    """Elsewhere flax is for boxes and pytrees: no other file defines a module."""
    for path in PACKAGE.glob("*.py"):
        defines = "(nn.Module)" in path.read_text(encoding="utf-8")
        assert defines == (path.stem == "model"), path.name


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_programs_are_short(program):
    assert len((REPOSITORY / program).read_text(encoding="utf-8").splitlines()) < 60


def test_parts_of_the_tests_make_up_the_whole():
    """What CI draws in parts is every test once, and another seed has another order."""
    names = [f"test_{n}" for n in range(30)]
    parts = [draw(names, f"x:{part}") for part in ("0:7", "7:20", "20:1000")]
    assert [len(part) for part in parts] == [7, 13, 10]
    assert set().union(*parts) == set(names)
    assert draw(names, "y:0:7") != parts[0] == draw(names[::-1], "x:0:7")
