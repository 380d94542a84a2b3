"""Several models on one text: `evaluate_side_by_side`, an ensemble, and the table of the command."""

import json
import re

import jax
import numpy as np
import pytest
from conftest import init, make_gpt, small_model

import gpt_jax
from gpt_jax.commands import evaluate as command
from gpt_jax.config import Config, DataConfig
from gpt_jax.data.bpe import ByteTokenizer
from gpt_jax.data.corpus import fingerprint_of
from gpt_jax.data.hugging_face import HuggingFaceTokenizer
from gpt_jax.data.tokenizer_json import to_tokenizer_json
from gpt_jax.data.tokenizers import CharTokenizer, make_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interchange.evaluation import ensemble, evaluate, evaluate_side_by_side
from gpt_jax.paths import ROOT
from gpt_jax.plan import make_plan
from gpt_jax.storage.metadata import Metadata
from gpt_jax.trainer.run import train

EXPORT = ROOT / "tests" / "data" / "export_v2"  # another vocabulary
TEXT = "To be, or not to be: that is the question. Naïve?\n" * 5


def make_model(tokenizer, folder, scale=1.0, path=None, **options):
    """A model that was not trained, as if on the text of a path. Those of other scales predict otherwise."""
    model = small_model(n_layer=1, **options)
    config = Config(model=model, data=DataConfig(path=str(path)) if path else DataConfig())
    params = jax.tree.map(lambda leaf: leaf * scale, init(model, tokenizer.vocab_size))
    fingerprint = fingerprint_of(path, tokenizer) if path else ""
    metadata = Metadata(config, tokenizer, fingerprint, 0, None, [], {})
    plan = make_plan(config, devices=jax.devices()[:1])
    module = make_gpt(model, tokenizer.vocab_size)
    return gpt_jax.TrainedModel(metadata, plan, module, params, "test", folder)


@pytest.fixture
def other_text(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By what their tokens are; `wide` and `byte` share a tokenizer, and have other contexts."""
    folder = tmp_path_factory.mktemp("models")
    byte, bpe = ByteTokenizer(), make_tokenizer("bpe:270", lambda: iter([TEXT]))
    return {
        "char": make_model(CharTokenizer.from_text(TEXT), folder / "char"),
        "byte": make_model(byte, folder / "byte"),
        "wide": make_model(byte, folder / "wide", 1.5, context=16),
        "bpe": make_model(bpe, folder / "bpe"),
    }


def test_each_model_has_the_evaluation_that_it_has_alone(models, other_text):
    together = evaluate_side_by_side(list(models.values()), other_text)
    assert together == [evaluate(model, other_text) for model in models.values()]
    n_tokens = {name: result.n_tokens for name, result in zip(models, together, strict=True)}
    assert n_tokens["bpe"] < n_tokens["char"] == len(TEXT) - 1 < n_tokens["byte"]
    for result in together:
        nats = result.loss * result.n_tokens
        assert result.bits_per_byte == pytest.approx(nats / np.log(2) / (len(TEXT.encode()) - 1))
        assert result.bits_per_character == pytest.approx(nats / np.log(2) / (len(TEXT) - 1))


def test_the_split_of_the_first_model_is_encoded_anew_for_the_others(models, tiny_run):
    first = gpt_jax.load(tiny_run)
    own, char, byte, wide = evaluate_side_by_side([first, first, models["byte"], models["wide"]])
    assert own == char == evaluate(first)
    val = (tiny_run.parent / "text.txt").read_text(encoding="utf-8")[2700:]
    ids = np.append(models["byte"].tokenizer.encode(val), 256)  # as the end of a file is for such a model
    assert byte.loss == models["byte"].loss(ids) and wide.loss == models["wide"].loss(ids)
    assert byte.text == wide.text == own.text and byte.n_tokens == len(val)
    assert byte.n_bytes == own.n_bytes == len(val) - 1


def test_documents_end_for_each_tokenizer(models, tmp_path):
    """Their ends are tokens, which must not be encoded as the text <|endoftext|>."""
    documents = [f"document {i}: <|endoftext|> or not?\n" for i in range(50)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join([json.dumps({"text": text}) + "\n" for text in documents]), encoding="utf-8")
    own, bpe = evaluate_side_by_side([make_model(ByteTokenizer(), tmp_path, path=path), models["bpe"]])
    tokenizer, documents = models["bpe"].tokenizer, documents[46:]
    ids = [np.append(tokenizer.encode(text), tokenizer.end_id) for text in documents]
    assert own.n_tokens == sum(map(len, documents)) + 4 - 1
    assert bpe.loss == models["bpe"].loss(np.concatenate(ids))
    assert (bpe.n_tokens, bpe.n_bytes) == (sum(map(len, ids)) - 1, own.n_bytes)


def test_the_size_of_token_files_is_known_by_their_text(models, tmp_path):
    path = tmp_path / "tokens.bin"
    np.frombuffer(TEXT.encode() * 9, np.uint8).astype("<u2").tofile(path)
    first = make_model(ByteTokenizer(), tmp_path, path=path)
    assert evaluate(first).bits_per_byte is None
    own, other = evaluate_side_by_side([first, models["bpe"]])
    assert own.n_bytes == other.n_bytes == own.n_tokens
    assert own.loss == evaluate(first).loss and own.bits_per_byte == pytest.approx(own.loss / np.log(2))


def log_probabilities(model, text):
    """Of each token of a text of bytes but the first, and of its end: from the logits of each window."""
    targets, context, found = [*text.encode()[1:], 256], model.config.model.context, []
    for start in range(0, len(text), context):
        logits_TxV = np.float64(model.logits(text[start : start + context]))
        log_p_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(axis=1, keepdims=True))
        found += [row[i] for row, i in zip(log_p_TxV, targets[start:], strict=False)]
    return np.array(found)


def test_an_ensemble_against_its_definition(models, tmp_path):
    text, path, pair = TEXT.replace("ï", "i")[:-3], tmp_path / "text.txt", [models["byte"], models["wide"]]
    path.write_text(text, encoding="utf-8")
    log_p_2xN = np.stack([log_probabilities(model, text) for model in pair])
    assert log_p_2xN.shape == (2, len(text)) and len(text) % 8
    for model, log_p_N in zip(pair, log_p_2xN, strict=True):
        losses_N = model.losses(np.append(model.tokenizer.encode(text), 256))
        assert losses_N.dtype == np.float32
        np.testing.assert_allclose(losses_N, -log_p_N, rtol=1e-4)
        assert evaluate(model, path).loss == pytest.approx(losses_N.mean(dtype=np.float64), rel=1e-6)
        np.testing.assert_array_equal(model.losses(text), losses_N[:-1])
    wanted = -np.log(np.exp(log_p_2xN).mean(axis=0)).mean()
    assert wanted < -log_p_2xN.mean() - 1e-3  # by Jensen's inequality: they are not alike
    *each, both = evaluate_side_by_side(pair, path, mean=True)
    assert both.loss == pytest.approx(wanted, rel=1e-5) and both == ensemble(pair, path)
    for result, model in zip(each, pair, strict=True):
        assert result.loss == pytest.approx(evaluate(model, path).loss, rel=1e-6)


def test_a_model_with_itself_is_that_model(models, other_text, tiny_run):
    for model, text in ((models["char"], other_text), (gpt_jax.load(tiny_run), None)):
        alone = evaluate(model, text)
        for n in (1, 2, 3):
            together = ensemble([model] * n, text)
            assert together.loss == pytest.approx(alone.loss, rel=1e-6)
            assert together.n_tokens == alone.n_tokens and together.text == alone.text


def test_an_ensemble_needs_equal_content_not_an_equal_form(models, other_text, tmp_path):
    file = json.loads(to_tokenizer_json(ByteTokenizer()))
    other = make_model(HuggingFaceTokenizer.from_dict({"file": file}), tmp_path / "json", 0.5)
    assert ensemble([models["byte"], other], other_text).n_tokens == len(TEXT.encode())
    with pytest.raises(UserError) as error:
        ensemble([models["byte"], other, models["bpe"], models["char"]], other_text)
    pair = f"{models['byte'].workdir} and {models['bpe'].workdir}"
    assert str(error.value).startswith(f"the tokenizers of {pair} differ, and an ensemble needs equal ones")


def test_a_model_that_cannot_encode_the_text_is_named(models, other_text, tiny_run):
    narrow = gpt_jax.load(tiny_run)
    for several in ([models["byte"], narrow], [narrow, models["byte"]]):
        with pytest.raises(UserError, match=f"^{tiny_run} cannot encode the text, .*other.txt: unknown char"):
            evaluate_side_by_side(several, other_text)
    lacks = make_model(CharTokenizer("ab"), tiny_run.parent / "lacks")
    message = f"^{lacks.workdir} cannot encode the text, validation split of .*text.txt: unknown characters: "
    with pytest.raises(UserError, match=message):
        evaluate_side_by_side([narrow, lacks])


def test_a_text_of_one_token_has_no_loss(models, tmp_path):
    (tmp_path / "one.txt").write_text("T", encoding="utf-8")
    for evaluate_it in (evaluate_side_by_side, ensemble):
        with pytest.raises(UserError, match=r"text of 1 token\(s\) must have 2 or more"):
            evaluate_it([models["char"]], tmp_path / "one.txt")


@pytest.fixture(scope="module")
def worse_run(tiny_run, tmp_path_factory):
    """The same settings and text, with two steps of training."""
    folder = tmp_path_factory.mktemp("worse")
    config = json.loads((tiny_run / "config.json").read_text(encoding="utf-8"))
    config["train"]["steps"] = 2
    assert train(Config.from_dict(config), folder / "run") == 0
    return folder / "run"


def rows_of(done):
    assert done.returncode == 0, done.stderr
    text, title, *rows = done.stdout.splitlines()
    assert re.fullmatch("nats/token +bits/character +bits/byte +parameters +model, best first", title)
    return text, [row.split(maxsplit=4) for row in rows]


def test_the_table_of_the_command(run_here, tiny_run, worse_run, tmp_path):
    done = run_here(command.main, "--workdir", worse_run, tiny_run, cwd=tmp_path)
    text, rows = rows_of(done)
    assert text == f"text  validation split of {tiny_run.parent / 'text.txt'}"
    for row, folder in zip(rows, (tiny_run, worse_run), strict=True):  # the better one first
        result = evaluate(gpt_jax.load(folder))
        numbers = (result.loss, result.bits_per_character, result.bits_per_byte)
        size = json.loads((folder / "run.json").read_text(encoding="utf-8"))["parameters"]
        assert row == [*(f"{number:.4f}" for number in numbers), f"{size:,}", str(folder)]
    done = run_here(command.main, "--workdir", worse_run, f"--workdir={tiny_run}", "--ensemble", cwd=tmp_path)
    _, with_ensemble = rows_of(done)
    (added,) = [row for row in with_ensemble if row not in rows]
    together = ensemble([gpt_jax.load(worse_run), gpt_jax.load(tiny_run)])
    assert added[0] == f"{together.loss:.4f}" and added[4] == "ensemble of 2"
    assert int(added[3].replace(",", "")) == 2 * int(rows[0][3].replace(",", ""))


def test_an_error_of_the_command_is_one_line(run_here, tiny_run, tmp_path):
    for arguments, message in (
        (["--workdir", tiny_run, EXPORT, "--ensemble"], "the tokenizers of .* and .* differ"),
        (["--workdir", tiny_run, EXPORT], "cannot encode the text, validation split of .*: unknown charac"),
        (["--workdir", tiny_run, "nowhere"], "no trained model in nowhere"),
        (["--workdir", "--text", "a.txt"], "--workdir: expected at least one argument"),
    ):
        done = run_here(command.main, *arguments, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert re.search(f"^error: .*{message}.*\n$", done.stderr, re.MULTILINE), done.stderr
