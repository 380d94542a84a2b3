"""The house: which package may import which, by rule, so that a new module needs no change here."""

import ast
import subprocess
import sys

import pytest
from conftest import draw

from gpt_jax.commands.main import COMMANDS
from gpt_jax.paths import ROOT as REPOSITORY

PACKAGE = REPOSITORY / "gpt_jax"
# Modules at the top, which import only each other.
BASE = {
    "checks",
    "config",
    "config_files",
    "errors",
    "files",
    "jax_settings",
    "paths",
    "records",
    "rng",
    "version",
}
MAY_IMPORT = {
    "data": set(),
    "parallel": set(),
    "costs": set(),
    "monitor": set(),
    "model": {"data", "parallel"},
    "sampling": {"model"},
    "storage": {"data"},
    "adapters": {"model"},
    "plan": {"parallel", "storage"},
    "interchange": {"adapters", "data", "model", "parallel", "plan", "sampling", "storage"},
    "training": {"adapters", "data", "model", "parallel", "plan", "storage"},
    "trainer": {
        "adapters", "costs", "data", "interchange", "model", "monitor", "parallel", "plan", "sampling",
        "storage", "training",
    },
    "commands": {
        "adapters", "costs", "data", "interchange", "model", "monitor", "parallel", "plan", "sampling",
        "storage", "trainer", "training",
    },
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    """("data", "corpus") of gpt_jax/data/corpus.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts


NAMES = {name_of(path) for path in MODULES}


def imports(path):
    """The modules of the package that a file imports, at any depth of its code, as tuples of names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("gpt_jax") for alias in node.names), path
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"a relative import in {path}"
            if node.module.split(".")[0] == "gpt_jax":
                module = tuple(node.module.split(".")[1:])
                inner = {(*module, alias.name) for alias in node.names}  # `from gpt_jax.model import cpu`
                found |= inner & NAMES or {module}
    return found


GRAPH = {name_of(path): imports(path) for path in MODULES}


def test_every_import_names_a_module():
    for name, found in GRAPH.items():
        assert found <= GRAPH.keys(), name


@pytest.mark.parametrize("name", [name for name in GRAPH if name[0] in MAY_IMPORT], ids=".".join)
def test_packages_import_only_what_they_may(name):
    package = name[0]
    allowed = BASE | MAY_IMPORT[package] | {package}
    assert {found[0] for found in GRAPH[name]} <= allowed


def test_the_base_imports_only_itself():
    for module in BASE:
        assert {found[0] for found in GRAPH[(module,)]} <= BASE, module


def test_at_the_top_are_the_base_the_plan_and_the_ways_in():
    """`python -m gpt_jax`, and the old forms such as `python -m gpt_jax.train`, only call `commands`."""
    top = {name[0] for name in GRAPH if len(name) == 1} - BASE - {"__init__", "adapters", "plan"}
    assert top <= {"__main__", *COMMANDS}
    for name in ((name,) for name in top):
        assert GRAPH[name] == {("commands", "main")}, name
        tree = ast.parse((PACKAGE / f"{name[0]}.py").read_text(encoding="utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)], name


def test_no_cycle():
    done, visiting = set(), []

    def visit(name):
        assert name not in visiting, visiting[visiting.index(name) :]
        if name not in done:
            visiting.append(name)
            for found in GRAPH[name]:
                visit(found)
            done.add(visiting.pop())

    for name in GRAPH:
        visit(name)


def strings(tree):
    """The string constants of a module without its docstrings."""
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, with_docstring) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_only_commands_and_paths_know_the_repository():
    for path in MODULES:
        if name_of(path)[0] not in ("commands", "paths"):
            text = path.read_text(encoding="utf-8")
            assert "__file__" not in text and "cwd()" not in text, path
            for string in strings(ast.parse(text)):
                assert not any(name in string for name in ("artifacts", "configs/", "train.py")), (
                    path,
                    string,
                )


def test_only_the_model_is_linen():
    """Elsewhere flax is for boxes and pytrees: no other package defines a module."""
    for path in MODULES:
        if "(nn.Module)" in path.read_text(encoding="utf-8"):
            assert name_of(path)[0] == "model", path


def test_the_face_imports_only_the_trained_model():
    """What trains is imported when it is used: see `test_a_model_is_read_and_sampled_without...`."""
    assert {found[0] for found in GRAPH[("__init__",)]} <= {"errors", "interchange", "trainer", "version"}


def test_only_the_storage_imports_orbax_and_only_training_optax():
    for path in MODULES:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        for library, package in (("orbax", "storage"), ("optax", "training")):
            assert library not in imported or name_of(path)[0] == package, path


IMPORTED = """
import sys
import gpt_jax
after_import = {name.split(".")[0] for name in sys.modules}
gpt_jax.load("tests/data/export_v2").generate(length=2)
used = {name.split(".")[0] for name in sys.modules}
unneeded = {"optax", "orbax", "tiktoken", "tokenizers"}
print(sorted(({"matplotlib", "tqdm"} | unneeded) & after_import), sorted(unneeded & used))
"""


def test_a_model_is_read_and_sampled_without_optimizer_and_checkpoints():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] []\n", done.stdout


def test_parts_of_the_tests_make_up_the_whole():
    """What CI draws in parts is every test once, and another seed has another order."""
    names = [f"test_{n}" for n in range(30)]
    parts = [draw(names, f"x:{part}") for part in ("0:7", "7:20", "20:1000")]
    assert [len(part) for part in parts] == [7, 13, 10]
    assert set().union(*parts) == set(names)
    assert draw(names, "y:0:7") != parts[0] == draw(names[::-1], "x:0:7")
