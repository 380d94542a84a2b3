"""What a model makes of a text: numbers, picture, page, and the command."""

import html.parser
import re

import jax
import numpy as np
import pytest
from conftest import MODELS, NAMES
from test_foreign import random_model

import gpt_jax
from gpt_jax.commands.explain import main
from gpt_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt_jax.errors import UserError
from gpt_jax.interchange.explanation import draw

TEXT = "To be, or not"


@pytest.mark.parametrize("name", NAMES)
def test_it_agrees_with_logits_and_attention(name):
    model = random_model(context=16, **MODELS[name])
    found, ids = model.explain(TEXT), model.tokenizer.encode(TEXT)
    assert "".join(found.tokens) == TEXT
    log_probs_TxV = jax.nn.log_softmax(model.logits(TEXT))
    np.testing.assert_allclose(found.surprise_T[1:], -log_probs_TxV[np.arange(12), ids[1:]], atol=1e-4)
    assert np.isnan(found.surprise_T[0]) and found.guesses[0] == []
    np.testing.assert_allclose(found.attention_LxHxTxT, model.attention(TEXT), atol=1e-5)
    # Guess t is made from the logits of token t - 1; the last one is of the token that would follow.
    assert len(found.guesses) == 14
    for t in (1, 13):
        probs_V = np.exp(log_probs_TxV[t - 1])
        best = np.argsort(-probs_V)[:5]
        assert [token for token, _ in found.guesses[t]] == [
            model.tokenizer.decode(best[i : i + 1]) for i in range(5)
        ]
        np.testing.assert_allclose([p for _, p in found.guesses[t]], probs_V[best], rtol=1e-3)
    # After the last layer, the logit lens shows the model itself.
    assert found.lens[-1][1:] == [guesses[0][0] for guesses in found.guesses[1:-1]]
    np.testing.assert_allclose(found.lens_LxT[-1, 1:], np.exp(-found.surprise_T[1:]), rtol=1e-3)


def test_the_lens_of_a_layer_is_the_model_without_those_after_it():
    model = random_model(context=16)
    cut = jax.tree.map(lambda leaf: leaf[:1], model.params["blocks"])
    config = model.config.model
    from dataclasses import replace

    module = model.module.clone(config=replace(config, n_layer=1))
    logits_TxV = module.apply({"params": model.params | {"blocks": cut}}, model.tokenizer.encode(TEXT)[None])[
        0
    ][0]
    expected = np.exp(jax.nn.log_softmax(logits_TxV))[np.arange(12), model.tokenizer.encode(TEXT)[1:]]
    np.testing.assert_allclose(model.explain(TEXT).lens_LxT[0, 1:], expected, rtol=1e-3)


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_a_hostile_text_is_only_shown():
    hostile = "</style><script>x\x1b[31m'\"&\n"
    parser = Tags()
    model = random_model(CharTokenizer.from_text(hostile), context=32)
    parser.feed(model.explain(hostile).to_html())
    assert "script" not in parser.tags and "\x1b" not in parser.text
    assert "src" in parser.text or "<" in parser.text  # shown as text


@pytest.mark.parametrize("text", ["a", "ab", "é ü\n", "x" * 100])
def test_texts_short_and_long_and_tokens_that_are_no_characters(text):
    explanation = random_model(ByteTokenizer()).explain(text)
    draw(explanation).draw_without_rendering()
    page = explanation._repr_html_()
    assert page.count("<span") == len(text.encode())
    assert not re.search(r"https?://", page)


def test_a_text_longer_than_the_context_is_an_error():
    with pytest.raises(UserError, match=r"text of 17 tokens must have 1 to 16 \(the context\)"):
        random_model(context=16).explain("To be, or not to ")


def test_the_command(tiny_run, tmp_path, capsys):
    for name in ("a.png", "a.html"):
        assert main(["--workdir", str(tiny_run), "--text", "to be", "--out", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.count(f"written    {tmp_path}") == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(UserError, match=r"--out a\.jpg must end in \.png or \.html"):
        main(["--workdir", str(tiny_run), "--text", "to be", "--out", "a.jpg"])


@pytest.mark.slow
def test_the_shipped_model_is_explained():
    found = gpt_jax.load(gpt_jax.interchange.trained_model.expand("artifacts/pretrained")).explain(
        "ROMEO:\nBut, soft!"
    )
    assert found.guesses[3][0][0] == "E"  # ROM-E-O
