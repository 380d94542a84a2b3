import codecs
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import reference
from conftest import MODERN, VOCAB, init, make_gpt, make_params, small_model

import gpt_jax
from gpt_jax.config import Config
from gpt_jax.errors import UserError
from gpt_jax.interchange.evaluation import evaluate
from gpt_jax.model.loss import loss_of_tokens, window_losses
from gpt_jax.monitor.metrics import read_metrics
from gpt_jax.paths import text_file
from gpt_jax.plan import make_plan
from gpt_jax.sampling.rules import make_rules
from gpt_jax.storage.metadata import Metadata


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
        got = loss_of_tokens(make_gpt(config, VOCAB), params, tokens, batch_size)
        assert got == pytest.approx(total / (n - 1), rel=1e-5)


def test_the_loss_is_the_sum_of_its_batches_in_order():
    """In 64 bits, one after another: not one bit of the reported loss may depend on who sums."""
    config = small_model()
    model, params, total = make_gpt(config, VOCAB), make_params(config), np.float64(0)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 300 * config.context + 1)
    for start in range(0, len(tokens) - 1, config.context):
        windows = (tokens[None, start + i : start + i + config.context].astype(np.int32) for i in (0, 1))
        total += np.float64(window_losses(model, params, *windows, np.ones((1, config.context), bool))[0])
    assert loss_of_tokens(model, params, tokens, 1) == total / (len(tokens) - 1)


@pytest.fixture(scope="module")
def trained(fox_run):
    """The folder of a run and its text."""
    return fox_run.parent


def test_a_trained_model_reads_back(trained):
    run = gpt_jax.load(trained / "run")
    assert run.step in (60, 120)
    records = {r["step"]: r for r in read_metrics(trained / "run" / "metrics.jsonl")}
    # The average of the parameters, which the run kept, is what was evaluated, saved as best, and loaded.
    result = evaluate(run)
    assert result.n_tokens == result.n_characters == 264 - 1
    assert result.loss == pytest.approx(records[run.step]["val_loss"], rel=1e-5)
    assert result.bits_per_character == pytest.approx(records[run.step]["val_bpc"], rel=1e-5)
    assert result.text == f"validation split of {trained / 'text.txt'}"
    assert run.loss(run.tokenizer.encode("the quick")) == run.loss("the quick")


def test_any_copy_of_the_own_text_means_its_validation_split_and_another_text_all_of_it(trained, tmp_path):
    run, own = gpt_jax.load(trained / "run"), trained / "text.txt"
    copy = tmp_path / "copy.txt"
    copy.write_bytes(own.read_bytes())
    assert evaluate(run, own) == evaluate(run)
    assert evaluate(run, copy) == replace(evaluate(run), text=f"validation split of {copy}")

    copy.write_bytes(own.read_bytes() + b"the end")
    result = evaluate(run, copy)
    assert (result.text, result.n_tokens) == (str(copy), 2640 + 7 - 1)
    assert result.loss == run.loss(copy.read_text(encoding="utf-8"))


def test_a_text_that_has_moved_can_be_named(trained, tmp_path):
    run = gpt_jax.load(trained / "run")
    path = text_file(run.config.data)
    moved = path.rename(tmp_path / "moved.txt")
    try:
        with pytest.raises(UserError) as error:
            evaluate(run)
        assert str(error.value) == (
            f"text file {path} does not exist: say where it is now with --text FILE; its fingerprint will be "
            f"compared"
        )
        assert evaluate(run, moved).n_tokens == 264 - 1
    finally:
        moved.rename(path)
    with pytest.raises(UserError, match=r"nowhere.txt does not exist: give the path of a UTF-8 text file$"):
        evaluate(run, tmp_path / "nowhere.txt")


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
    assert run.metadata.versions.keys() == {"gpt_jax", "jax", "flax", "optax", "orbax-checkpoint"}


def test_attention_weights_by_hand(trained):
    """softmax(q k^T / sqrt(K)) of a GPT-2 of two layers, from its parameters in NumPy."""
    run = gpt_jax.load(trained / "run")
    text, params = "the quick brown", jax.tree.map(np.float64, run.params)
    weights = run.attention(text)
    n = len(text)
    assert weights.shape == (2, 2, n, n) and weights.dtype == np.float32

    ids = run.tokenizer.encode(text)
    x = params["token_embedding"]["embedding"][ids] + params["position_embedding"]["embedding"][:n]
    for layer in range(2):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        normed = reference.layer_norm(x, block["attention_norm"], None)
        qkv = np.einsum("td,dchk->cthk", normed, block["attention"]["qkv"]["kernel"])
        for head in range(2):
            scores = qkv[0, :, head] @ qkv[1, :, head].T / np.sqrt(16)
            scores[np.triu_indices(n, 1)] = -np.inf
            wanted = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            np.testing.assert_allclose(weights[layer, head], wanted, atol=1e-5)
            x = x + wanted @ qkv[2, :, head] @ block["attention"]["out"]["kernel"][head]
        hidden = np.einsum(
            "td,dgf->tgf", reference.layer_norm(x, block["mlp_norm"], None), block["mlp"]["up"]["kernel"]
        )
        x = x + reference.activate("gelu", hidden) @ block["mlp"]["down"]["kernel"]


def test_attention_does_not_depend_on_how_it_is_computed(trained):
    """Blocks of queries are for speed; what is recorded is the same."""
    run = gpt_jax.load(trained / "run")
    blocks = run.module.clone(config=replace(run.config.model, query_blocks=3, attention_dropout=0.5))
    np.testing.assert_array_equal(
        replace(run, module=blocks).attention("the quick"), run.attention("the quick")
    )


class ByteTokenizer:
    """Not ours: a token is a byte, so that one character may take several tokens."""

    vocab_size = 256
    start_id = 10

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids):
        return bytes(ids.tolist()).decode(errors="replace")

    def decoder(self):
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda ids, final=False: decoder.decode(bytes(ids.tolist()), final)

    def to_json(self):
        return json.dumps({"type": "byte"})


def test_any_tokenizer_will_do(tmp_path):
    """Tokens are counted, not characters; text comes out piece by piece, whole characters only."""
    config = small_model(n_layer=1)
    module, tokenizer = make_gpt(config, 256), ByteTokenizer()
    params = init(config, vocab_size=256)
    values = Metadata(Config(model=config), tokenizer, "", 0, None, [], {})
    plan = make_plan(values.config, devices=jax.devices()[:1])
    model = gpt_jax.TrainedModel(values, plan, module, params, "test", tmp_path)
    assert model.logits("éü").shape == (4, 256)
    assert model.attention("éü").shape == (1, 2, 4, 4)
    with pytest.raises(UserError, match="text of 10 tokens must have 1 to 8"):
        model.logits("éüéüé")
    with pytest.raises(UserError, match="text of 1 token"):
        model.loss("a")
    assert model.loss("é") > 0  # one character, two tokens
    decode = tokenizer.decoder()
    assert [decode(np.array([byte])) for byte in "éü".encode()] == ["", "é", "", "ü"]
    text = model.generate("é", length=40, seed=1)
    streamed = list(model.stream("é", 40, make_rules(), seed=1))
    assert "".join(piece[0] for piece in streamed) == text and len(streamed) > 1


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda run: run.generate("THE"),
            "unknown characters: 'E' .nearest known: 'e'., 'H' .nearest known: 'h'., 'T'",
        ),
        (lambda run: run.generate("the", length=-1), "length = -1 must be 0 or above"),
        (lambda run: run.generate("the", top_k=0), "top_k = 0 must be 1 or above"),
        (lambda run: run.generate("the", window="rolling"), "window = 'rolling' must be one of"),
        (lambda run: run.generate("the", seed=-1), "seed = -1 must lie in"),
        (lambda run: run.logits(""), "text of 0 tokens must have 1 to 16"),
        (lambda run: run.logits("t" * 17), "text of 17 tokens must have 1 to 16"),
        (lambda run: run.loss("t"), "must have 2 or more"),
        (lambda run: gpt_jax.load("nowhere"), "no trained model in nowhere: name another folder"),
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
    assert names == {
        "checkpoints", "config.json", "lock", "loss.png", "metrics.jsonl", "run.json", "samples.txt",
    }  # fmt: skip
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
    facts = json.loads((trained / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["parameters"] == sum(x.size for x in jax.tree.leaves(gpt_jax.load(trained / "run").params))
    assert facts["device"] == "1 x cpu (cpu)" and facts["dtype"] == "float32"
    assert facts["compile_seconds"]["training steps"] > 0 and facts["train_tokens"] == 2376
    samples = (trained / "run" / "samples.txt").read_text(encoding="utf-8")
    assert "--- step 60: training batches" in samples and "--- step 120: training batches" in samples


def test_evaluating_on_a_changed_text_is_refused(trained, tmp_path):
    run = gpt_jax.load(trained / "run")
    path = text_file(run.config.data)
    old = path.read_bytes()
    try:
        another = "is not the text that this run was trained on: fingerprint"
        for changed, message in ((old + b"more", another), (old[:9], another), (b"\xff", "is not UTF-8")):
            path.write_bytes(changed)
            with pytest.raises(UserError, match=message):
                evaluate(run)
    finally:
        path.write_bytes(old)
