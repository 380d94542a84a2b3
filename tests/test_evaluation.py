import jax
import numpy as np
import pytest
import reference
from conftest import MODERN, VOCAB, make_params, small_model

import gpt_jax
from gpt_jax import trainer
from gpt_jax.config import Config
from gpt_jax.errors import UserError
from gpt_jax.evaluate import evaluate
from gpt_jax.loss import make_loss_of_tokens
from gpt_jax.metrics import read_metrics
from gpt_jax.model import GPT


@pytest.mark.parametrize("n", [2, 9, 8 * 5 + 1, 8 * 5 + 4])
def test_headline_loss_against_its_definition(n):
    """Non-overlapping windows, a short last one, every token but the first predicted once."""
    config = small_model(**MODERN)
    params = make_params(config)
    tokens = np.random.default_rng(n).integers(0, VOCAB, n)
    params64 = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    total = 0.0
    for start in range(0, n - 1, config.context):
        inputs = tokens[start : min(start + config.context, n - 1)]
        targets = tokens[start + 1 : start + 1 + len(inputs)]
        total += reference.loss(params64, config, [inputs], [targets]) * len(inputs)
    for batch_size in (1, 4):
        got = make_loss_of_tokens(GPT(config, VOCAB), batch_size)(params, tokens)
        assert got == pytest.approx(total / (n - 1), rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of some seconds on a text of its own."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60, encoding="utf-8")
    config = Config.from_dict({
        "model": {"n_layer": 1, "n_head": 2, "d_model": 32, "context": 16},
        "data": {"path": str(text)},
        "optimizer": {"warmup_steps": 5, "learning_rate": 1e-2, "ema_decay": 0.8},
        "train": {"steps": 120, "batch_size": 8, "eval_every": 60, "sample_length": 20},
        "mesh": {"data": 1},
    })  # fmt: skip
    assert trainer.train(config, folder / "run") == 0
    return folder


def test_a_trained_model_reads_back(trained):
    run = gpt_jax.load(trained / "run")
    assert run.step in (60, 120)
    records = {r["step"]: r for r in read_metrics(trained / "run" / "metrics.jsonl")}
    # The average of the parameters, which the run kept, is what was evaluated, saved as best, and loaded.
    loss, count = evaluate(run)
    assert count == 264 - 1
    assert loss == pytest.approx(records[run.step]["val_loss"], rel=1e-5)

    assert evaluate(run, trained / "text.txt")[1] == 2640 - 1


def test_the_python_face(trained):
    run = gpt_jax.load(trained / "run", which="last")
    assert run.step == 120
    text = run.generate("the quick", length=50, temperature=0.8, seed=0)
    assert len(text) == 50
    assert text == run.generate("the quick", length=50, temperature=0.8, seed=0)
    # It knows its text by heart: only when it is hot do two seeds differ.
    assert len({run.generate("the quick", length=50, temperature=2.0, seed=seed) for seed in (0, 1)}) == 2
    assert len(run.generate("", length=5)) == 5
    assert run.generate("a" * 100, length=3) != ""
    assert run.generate("the", length=0) == ""
    logits = run.logits("the quick")
    assert logits.shape == (9, 28) and logits.dtype == np.float32
    assert run.tokenizer.characters[logits[-1].argmax()] == run.generate("the quick", 1, greedy=True)
    assert run.loss("the quick brown fox") < run.loss("xof nworb kciuq eht")
    assert run.metadata.step == 120 and run.metadata.config == run.config
    assert run.metadata.versions.keys() == {"jax", "flax", "optax", "orbax-checkpoint"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda run: run.generate("THE"), "never seen: 'E' 'H' 'T'"),
        (lambda run: run.generate("the", length=-1), "length = -1 must be 0 or above"),
        (lambda run: run.generate("the", top_k=0), "top_k = 0 must be 1 or above"),
        (lambda run: run.generate("the", window="rolling"), "window = 'rolling' must be one of"),
        (lambda run: run.generate("the", seed=-1), "seed = -1 must lie in"),
        (lambda run: run.logits(""), "text of 0 characters must have 1 to 16"),
        (lambda run: run.logits("t" * 17), "text of 17 characters must have 1 to 16"),
        (lambda run: run.loss("t"), "must have 2 or more"),
        (lambda run: gpt_jax.load("nowhere"), "no trained run in nowhere: train one with"),
        (
            lambda run: gpt_jax.load("nowhere", which="first"),
            "which = 'first' must be 'best' or 'last'",
        ),
    ],
)
def test_bad_arguments_are_named(trained, call, message):
    with pytest.raises(UserError, match=message):
        call(gpt_jax.load(trained / "run"))


def test_what_a_run_leaves(trained):
    names = {path.name for path in (trained / "run").iterdir()}
    assert names == {"checkpoints", "config.json", "lock", "loss.png", "metrics.jsonl", "samples.txt"}
    assert (trained / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(trained / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(10, 121, 10))
    for record in records:
        assert record.keys() >= {
            "step", "seconds", "train_loss", "learning_rate", "grad_norm", "tokens_per_second",
        }  # fmt: skip
        assert ("val_loss" in record) == (record["step"] % 60 == 0)
        if "val_loss" in record:
            assert record["val_bpc"] == pytest.approx(record["val_loss"] / np.log(2))
    samples = (trained / "run" / "samples.txt").read_text(encoding="utf-8")
    assert "--- step 60: training batches" in samples and "--- step 120: training batches" in samples


def test_evaluating_on_a_changed_text_is_refused(trained, tmp_path):
    run = gpt_jax.load(trained / "run")
    path = run.config.data.file
    old = path.read_bytes()
    try:
        path.write_bytes(old + b"more")
        with pytest.raises(UserError, match="is not the text that this run was trained on"):
            evaluate(run)
    finally:
        path.write_bytes(old)
