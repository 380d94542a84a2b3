"""The text, its ids, and the windows cut from them."""

import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.commands.paths import ARTIFACTS
from gpt_jax.config import TrainConfig
from gpt_jax.data.batches import eval_windows, micro_batch_size, shuffled, train_batch
from gpt_jax.data.corpus import load_corpus
from gpt_jax.data.tokenizers import CharTokenizer, tokenizer_from_json
from gpt_jax.errors import UserError

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_tiny_shakespeare_is_the_one_everybody_uses():
    data = (ARTIFACTS / "input.txt").read_bytes()
    assert len(data) == 1_115_394
    assert hashlib.sha256(data).hexdigest() == SHA256
    assert SHA256 in (ARTIFACTS / "README.md").read_text(encoding="utf-8")


def test_split_of_tiny_shakespeare():
    corpus = load_corpus(ARTIFACTS / "input.txt", context=256, train_fraction=0.9)
    assert (len(corpus.train), len(corpus.val)) == (1_003_854, 111_540)
    assert corpus.tokenizer.vocab_size == 65
    assert corpus.train.dtype == np.uint8
    text = (ARTIFACTS / "input.txt").read_text(encoding="utf-8")
    decoded = corpus.tokenizer.decode(corpus.train) + corpus.tokenizer.decode(corpus.val)
    assert decoded == text


def test_fingerprint_follows_the_bytes(tmp_path):
    prints = set()
    for text in ("abc" * 50, "abd" * 50, "abc" * 50):
        path = tmp_path / "text.txt"
        path.write_text(text, encoding="utf-8")
        prints.add(load_corpus(path, 4, 0.9).fingerprint)
    assert len(prints) == 2


def test_line_ends_and_every_plane_of_unicode_survive(tmp_path):
    text = "naïve — 日本語\r\n\U0001f600\tzero\x00" * 20
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    corpus = load_corpus(path, 4, 0.9)
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "has 0 characters"),
        (b"short", "has 5 characters: its training split of 4 tokens is shorter than one window"),
        (b"a" * 60, "validation split of 6 tokens is shorter"),
        (b"caf\xe9 " * 50, "is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus(path, context=8, train_fraction=0.9)


def test_a_folder_is_not_a_text(tmp_path):
    with pytest.raises(UserError, match="is not a regular file"):
        load_corpus(tmp_path, context=8, train_fraction=0.9)


def test_tokenizer_there_and_back():
    tokenizer = CharTokenizer.from_text("hello, wörld 😀")
    assert tokenizer.characters == "".join(sorted(set("hello, wörld 😀")))
    ids = tokenizer.encode("world😀".replace("o", "ö"))
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == "wörld😀"
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer
    assert tokenizer.encode("").shape == (0,)


def test_unknown_characters_are_listed():
    with pytest.raises(UserError, match=re.escape(r"unknown characters: '\n' 'x' '€'; the vocab")):
        CharTokenizer.from_text("abc").encode("abx\n€x")


def test_a_batch_is_a_pure_function_of_key_and_step():
    tokens = jnp.arange(1000, dtype=jnp.uint16)
    batch = jax.jit(train_batch, static_argnums=(3, 4))
    key = jax.random.key(0)
    inputs, targets = batch(key, 5, tokens, 16, 8)
    assert inputs.shape == targets.shape == (16, 8)
    assert inputs.dtype == jnp.int32
    assert (targets == inputs + 1).all()  # tokens count up: the target is the next one
    assert (jnp.diff(inputs, axis=1) == 1).all()  # windows are contiguous
    again, _ = batch(key, 5, tokens, 16, 8)
    assert (inputs == again).all()
    assert (inputs != batch(key, 6, tokens, 16, 8)[0]).any()
    assert (inputs != batch(jax.random.key(1), 5, tokens, 16, 8)[0]).any()


@pytest.mark.parametrize(
    "batch_size, grad_accum_steps, context, n_shards, wanted",
    [(64, 0, 256, 1, 4), (8, 0, 256, 1, 4), (8, 0, 32, 1, 8), (6, 0, 256, 1, 3), (64, 16, 64, 1, 4),
     (8, 0, 4096, 1, 1), (64, 0, 256, 8, 32), (24, 0, 1024, 4, 4), (7, 0, 256, 1, 1)],
)  # fmt: skip
def test_micro_batches_on_a_cpu(batch_size, grad_accum_steps, context, n_shards, wanted):
    train = TrainConfig(batch_size=batch_size, grad_accum_steps=grad_accum_steps)
    assert micro_batch_size(train, context, n_shards, "cpu") == wanted


def test_a_batch_that_devices_cannot_share_is_named():
    with pytest.raises(UserError, match="leaves 6 windows, which 8 devices cannot share equally"):
        micro_batch_size(TrainConfig(batch_size=6), 16, 8, "cpu")


@pytest.mark.parametrize("n_tokens, batch_size", [(1000, 16), (100, 7), (26, 50), (10, 3), (9, 8)])
def test_an_epoch_takes_every_window_once(n_tokens, batch_size):
    """Also where a batch spans epochs, and where the text hardly holds a window."""
    context, n_steps = 8, 40
    tokens = jnp.arange(n_tokens)
    batch = jax.jit(train_batch, static_argnums=(3, 4))
    inputs = [batch(jax.random.key(0), step, tokens, batch_size, context)[0] for step in range(n_steps)]
    starts = np.concatenate(inputs)[:, 0]
    n_windows = max(n_tokens // context - 1, 1)
    epochs = [starts[i : i + n_windows] for i in range(0, len(starts) - n_windows + 1, n_windows)]
    for epoch in epochs:
        offset = epoch.min()
        assert sorted(epoch) == [offset + context * i for i in range(n_windows)]
        assert epoch.max() + context + 1 <= n_tokens
    if len(epochs) > 20 and n_tokens > context + 1:
        assert len({epoch.min() for epoch in epochs}) > 1
    if n_windows > 10:
        assert (epochs[0] - epochs[0].min() != epochs[1] - epochs[1].min()).any()


def test_training_windows_reach_both_ends():
    tokens = jnp.arange(19)
    batch = jax.jit(train_batch, static_argnums=(3, 4))
    inputs = np.concatenate([batch(jax.random.key(0), step, tokens, 8, 4)[0] for step in range(40)])
    assert set(inputs[:, 0]) == set(range(15))  # 14 + 4 = 18: the last target is the last token


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_shuffled_is_a_permutation(n):
    orders = [
        np.asarray(jax.vmap(lambda i, key=key: shuffled(key, i, n))(jnp.arange(n)))
        for key in jax.random.split(jax.random.key(1), 3)
    ]
    for order in orders:
        assert sorted(order) == list(range(n))
    if n >= 1000:
        assert (orders[0] != orders[1]).mean() > 0.9
        # Neighbours are strangers: as far apart as two random numbers, n / 3 in the mean.
        assert abs(np.abs(np.diff(orders[2])).mean() / n - 1 / 3) < 0.05


@pytest.mark.parametrize("n", [2, 8, 9, 10, 33, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_counts_every_token_but_the_first_once(n, batch_size):
    tokens = np.arange(n) + 1
    inputs, targets, mask = eval_windows(tokens, 8, batch_size)
    assert inputs.shape == targets.shape == mask.shape
    assert inputs.shape[1:] == (batch_size, 8)
    assert targets[mask].tolist() == tokens[1:].tolist()
    assert (targets[mask] == inputs[mask] + 1).all()
    starts = inputs[:, :, 0][mask[:, :, 0]]
    assert starts.tolist() == list(range(1, n, 8))  # non-overlapping
