"""demo.ipynb: it is demo.py with outputs, it runs, and its assertions notice a broken model."""

import json
import os
import re
import subprocess
import sys

import pytest

from gpt_jax.paths import ROOT as REPOSITORY

jupytext = pytest.importorskip("jupytext")
NOTEBOOK, SOURCE = REPOSITORY / "demo.ipynb", REPOSITORY / "demo.py"
ENVIRONMENT = os.environ | {"DEMO_SECONDS": "3", "MPLBACKEND": "agg", "PYTHONPATH": str(REPOSITORY)}
ENVIRONMENT = {name: value for name, value in ENVIRONMENT.items() if name != "XLA_FLAGS"}


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebook_and_source_are_the_same(notebook):
    """`jupytext --sync demo.ipynb`, and then running it, makes them so."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(SOURCE).cells]


def test_it_was_run_from_top_to_bottom(notebook):
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert str(REPOSITORY) not in NOTEBOOK.read_text(encoding="utf-8")


def test_it_asserts_and_asks(notebook):
    asserting = [cell for cell in code_cells(notebook) if re.search(r"\bassert", "".join(cell["source"]))]
    assert len(asserting) >= 15
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    assert text.count("<b>Question:</b>") == text.count("</details>") >= len(re.findall("^## ", text, re.M))


@pytest.mark.slow
def test_it_runs_in_a_kernel(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in fresh.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(fresh, timeout=900, resources={"metadata": {"path": str(REPOSITORY)}})
    client.execute(env=ENVIRONMENT)
    assert any("this notebook took" in str(cell.get("outputs")) for cell in fresh.cells)


# What is broken, in which module, and in which section an assertion must notice.
BROKEN = {
    "the loss": ("model.loss", "token_losses", "lambda logits, targets: 1.01 * f(logits, targets)"),
    "the scale": ("model.attention", "attend", "lambda q, *rest, **k: f(2 * q, *rest, **k)"),
    "the mask": ("model.attention", "causal_mask", "lambda p, n: f(p, n) | True"),
    "the rotation": ("model.options", "rotate", "lambda x, p, base: f(x, p + p, base)"),
    "the norm": ("model.layers", "make_norm", "lambda *a: f(*a).clone(epsilon=0.1)"),
    "the decay": ("model.params", "is_matrix", "lambda params: jax.tree.map(lambda _: False, params)"),
    "the clipping": (
        "training.optimizer", "make_optimizer",
        "lambda c, steps: f(type(c)(**vars(c) | {'clip_norm': 10 * c.clip_norm}), steps)",
    ),
    "the schedule": ("training.optimizer", "make_schedule", "lambda c, n, peak: f(c, 2 * n, peak)"),
    "the batches": ("data.batches", "train_batch", "lambda *a, **k: f(*a, **k)[:1] * 2"),
    "the temperature": ("sampling.rules", "apply_rules", "lambda z, rules: f(z, rules) * 0.9"),
    "the cache": ("model.cache", "empty_cache", "lambda *a: f(*a).replace(length=jax.numpy.int32(1))"),
}  # fmt: skip
BREAK = """
import importlib, pkgutil, runpy, sys
import jax
import gpt_jax
module, name, change, source = sys.argv[1:]
walked = pkgutil.walk_packages(gpt_jax.__path__, "gpt_jax.")
modules = [importlib.import_module(found.name) for found in walked if found.name != "gpt_jax.train"]
f = getattr(importlib.import_module("gpt_jax." + module), name)
broken = eval(change)
for module in modules:  # in every module that has imported it
    if getattr(module, name, None) is f:
        setattr(module, name, broken)
runpy.run_path(source, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("module, name, change", BROKEN.values(), ids=BROKEN)
def test_its_assertions_notice_what_is_broken(module, name, change):
    done = subprocess.run(
        [sys.executable, "-c", BREAK, module, name, change, str(SOURCE)], env=ENVIRONMENT, cwd=REPOSITORY,
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 1 and "AssertionError" in done.stderr.splitlines()[-1] + done.stderr[-3000:], (
        done.stderr[-2000:]
    )
