"""The text, its ids, and the windows cut from them."""

import hashlib
import io
import itertools
import json
import os
import pty
import re
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import some

from gpt_jax.config import TrainConfig
from gpt_jax.data.batches import eval_windows, shuffled, train_batch
from gpt_jax.data.corpus import fingerprint_of, load_corpus
from gpt_jax.data.documents import BLOCK
from gpt_jax.data.tokenizers import CharTokenizer, tokenizer_from_json
from gpt_jax.errors import UserError
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.paths import ARTIFACTS
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.plan import micro_batch_size

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


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["no bom", "bom"])
@pytest.mark.parametrize("character, n_bytes", [("x", 1), *(("é", n) for n in range(3)), ("日", 1), ("日", 2),
                                                *(("\U0001f600", n) for n in range(1, 4))])  # fmt: skip
def test_a_text_of_many_blocks_is_what_it_is_by_definition(tmp_path, bom, character, n_bytes):
    """Also where so many bytes of a character lie in one block, and the others in the next."""
    text = "a" * (BLOCK - n_bytes) + character + "\r\nnée — 日本\U0001f600" * 60_000
    data = (bom + text).encode()
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    corpus = load_corpus(path, 8, 0.7)

    characters = "".join(sorted(set(text)))
    index_of = {character: i for i, character in enumerate(characters)}
    ids, n_train = np.array([index_of[character] for character in text]), int(0.7 * len(text))
    np.testing.assert_array_equal(corpus.train, ids[:n_train])
    np.testing.assert_array_equal(corpus.val, ids[n_train:])
    assert (corpus.n_characters, corpus.n_val_characters) == (len(text), len(text) - n_train)
    tokenizer = json.dumps({"type": "char", "characters": characters})
    fingerprint = hashlib.sha256((hashlib.sha256(data).hexdigest() + tokenizer).encode()).hexdigest()
    assert corpus.fingerprint == fingerprint == fingerprint_of(path, corpus.tokenizer)


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("wrong", [b"\xff", b"\xe2\x82a", b"\x80" * 9, b"\xf0\x9f\x98"])
def test_bytes_that_are_not_utf_8_are_found_at_the_border_of_a_block(tmp_path, wrong, before):
    """Where Python finds them that decodes the whole."""
    path, data = tmp_path / "text.txt", b"a" * (BLOCK - before) + wrong
    for content in (data, data + b"b" * BLOCK):
        path.write_bytes(content)
        with pytest.raises(UnicodeDecodeError) as whole:
            content.decode()
        with pytest.raises(UserError, match=f"at offset {whole.value.start:,}; save it as UTF-8"):
            load_corpus(path, 8, 0.9)


def test_the_fingerprint_of_tiny_shakespeare_stays():
    """Or no older run could be resumed."""
    corpus = load_corpus(ARTIFACTS / "input.txt", context=256, train_fraction=0.9)
    assert corpus.fingerprint == "e88e7e3f1004cfcad629ec85f12984e63b37acbc155b50cd4590670bd16ee231"


def test_loading_tells_how_far_it_is(tmp_path):
    path, calls = tmp_path / "text.txt", []
    path.write_bytes(b"abcd" * BLOCK)
    load_corpus(path, 8, 0.9, lambda *numbers: calls.append(numbers))
    done = [done for done, _ in calls]
    assert {total for _, total in calls} == {4 * BLOCK} and done[-1] == 4 * BLOCK
    assert done == sorted(done) and len(set(done)) == 2 * 4  # two readings


def test_a_line_says_how_much_is_loaded_where_there_is_no_terminal():
    stream = io.StringIO()
    with LoadingBar(stream) as progress:
        progress(1, 3)
    assert stream.getvalue() == ""  # a small text
    with LoadingBar(stream, seconds_between_lines=0.0) as progress:
        progress(420, 1000)
        progress(1000, 1000)
    assert stream.getvalue() == "text    42% of 1,000 bytes read\ntext    100% of 1,000 bytes read\n"


def test_a_terminal_shows_a_bar_while_a_text_is_loaded():
    controller, terminal = pty.openpty()
    with open(terminal, "w", encoding="utf-8") as stream:
        with LoadingBar(stream) as progress:
            progress(10**6, 4 * 10**6)  # too early to show anything
            time.sleep(1.1)
            progress(3 * 10**6, 4 * 10**6)
        shown = os.read(controller, 10_000).decode()
    os.close(controller)
    assert "text:  75%" in shown and "3.00M/4.00M" in shown and "25%" not in shown
    assert shown.endswith("\r")  # nothing of it stays


def test_a_text_takes_little_more_memory_than_its_ids(tmp_path):
    text = (ARTIFACTS / "input.txt").read_text(encoding="utf-8") * 30
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    tracemalloc.start()
    try:
        corpus = load_corpus(path, 256, 0.9)
        assert tracemalloc.get_traced_memory()[1] < 2.6 * len(text)
        before = tracemalloc.get_traced_memory()[0]
        assert before < 1.1 * len(text)
        assert corpus.train.base is corpus.val.base is not None  # views of one array
        tracemalloc.reset_peak()
        ids = corpus.tokenizer.encode(text)
        assert tracemalloc.get_traced_memory()[1] - before - ids.nbytes < 0.5 * len(text)
    finally:
        tracemalloc.stop()


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_of_training_by_the_length_of_the_text(tmp_path):
    """At most three bytes for a character more, from loading to evaluation."""
    line = "to be or not to be, that is the question\n"
    peaks, sizes = {}, (10**6, 40 * 10**6)
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    # The first time compiles, whose memory would hide that of the text; the second reads from the cache.
    for size, run in itertools.product(sizes, ("first", "second")):
        text = tmp_path / f"{size}.txt"
        text.write_text((line * (size // len(line) + 1))[:size], encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", PEAK, sys.executable, REPOSITORY / "train.py",
             "--config", REPOSITORY / "configs" / "smoke.py", f"--config.data.path={text}",
             f"--workdir={tmp_path / f'{size} {run}'}", "--config.train.steps=2",
             "--config.train.eval_every=2", "--config.train.sample_length=0", "--config.train.batch_size=32",
             "--config.optimizer.warmup_steps=1"],
            env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[size] = 1024 * int(done.stdout)
    assert (peaks[sizes[1]] - peaks[sizes[0]]) / (sizes[1] - sizes[0]) < 3


def test_line_ends_and_every_plane_of_unicode_survive(tmp_path):
    text = "naïve — 日本語\r\n\U0001f600\tzero\x00" * 20
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    corpus = load_corpus(path, 4, 0.9)
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "text.txt does not exist: give the path of a UTF-8 text file with --config.data.path=FILE"),
        (b"", "has 0 characters"),
        (b"short", "has 5 characters: its training split of 4 tokens is shorter than one window"),
        (
            b"a" * 60,
            "validation split of 6 tokens is shorter .*; use a longer text, or --config.model.context=5$",
        ),
        (b"a" * 11, "validation split of 2 tokens .*; use a longer text, or --config.model.context=1$"),
        (b"a" * 10, "validation split of 1 token is .*; use a longer text$"),
        (b"caf\xe9 " * 50, "is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus(path, context=8, train_fraction=0.9)


def test_an_empty_folder_is_no_text(tmp_path):
    with pytest.raises(UserError, match="has no files: give the path of a UTF-8 text file"):
        load_corpus(tmp_path, context=8, train_fraction=0.9)


def test_tokenizer_there_and_back():
    tokenizer = CharTokenizer.from_text("hello, wörld 😀")
    assert tokenizer.characters == "".join(sorted(set("hello, wörld 😀")))
    ids = tokenizer.encode("world😀".replace("o", "ö"))
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == "wörld😀"
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer
    assert tokenizer.encode("").shape == (0,)


def test_a_shorter_context_that_is_named_fits(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab" * 1200)
    with pytest.raises(UserError, match="has 2,400 characters") as error:
        load_corpus(path, 256, 0.9)
    longest = int(str(error.value).rpartition("--config.model.context=")[2])
    assert len(load_corpus(path, longest, 0.9).val) == longest + 1


@pytest.mark.parametrize(
    "known, text, listed",
    [
        ("abc", "abx\n€x", r"'\n', 'x', '€'"),
        ("'ab", "a’b‘", """'‘' (nearest known: "'"), '’' (nearest known: "'")"""),
        ('"ab', "“a”", """'“' (nearest known: '"'), '”' (nearest known: '"')"""),
        ("ab", "“a”", "'“', '”'"),  # the nearest is not known either
        ("-ab", "a—b–", "'–' (nearest known: '-'), '—' (nearest known: '-')"),
        ("a—b", "a-b", "'-' (nearest known: '—')"),
        (".ab", "a…", "'…' (nearest known: '...')"),
        (" ab", "a\xa0b\tb\u2009b", r"'\t' (nearest known: ' '), '\xa0' (nearest known: ' '), "
         r"'\u2009' (nearest known: ' ')"),
        ("\nab", "a\r\nb", r"'\r' (the text has Windows line ends, CRLF; the model knows LF only)"),
        ("\nab", "a\rb", r"'\r' (nearest known: '\n')"),
        ("cef", "café", "'a', 'é' (nearest known: 'e')"),
        ("ae", "AÉ", "'A' (nearest known: 'a'), 'É' (nearest known: 'e')"),
        ("AE", "aé", "'a' (nearest known: 'A'), 'é' (nearest known: 'E')"),
        ("a", "".join(map(chr, range(0x400, 0x417))), ", ".join(map(repr, map(chr, range(0x400, 0x414))))
         + " and 3 more"),
    ],
)  # fmt: skip
def test_unknown_characters_are_listed_with_the_nearest(known, text, listed):
    tokenizer = CharTokenizer.from_text(known)
    with pytest.raises(UserError) as error:
        tokenizer.encode(text)
    assert str(error.value) == (
        f"unknown characters: {listed}; the vocabulary has the {len(known)} characters of the training text"
    )


def test_unknown_characters_far_in_a_text_are_found():
    with pytest.raises(UserError, match="unknown characters: 'x', 'y', '\U0001f600';"):
        CharTokenizer.from_text("ab").encode("y" + "ab" * 200_000 + "x" + "ab" * 200_000 + "\U0001f600")


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
    message = (
        "train.batch_size = 6 cannot be split equally over 8 devices: use a multiple of 8, or fewer devices "
        "with --config.mesh.data=1"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        micro_batch_size(TrainConfig(batch_size=6), 16, 8, "cpu")


@pytest.mark.parametrize(
    "batch_size, grad_accum_steps, message",
    [
        (6, 1, "train.batch_size = 6 cannot be split equally over 8 devices: use a multiple of 8, or fewer"),
        (12, 3, "a micro-batch of train.batch_size / train.grad_accum_steps = 12 / 3 = 4 cannot be split "
         "equally over 8 devices: use a multiple of 24 as train.batch_size, or fewer devices"),
        (48, 12, "12 = 4 cannot be split equally over 8 devices: use --config.train.grad_accum_steps=6, or"),
    ],
)  # fmt: skip
def test_what_is_named_makes_micro_batches_that_devices_can_share(batch_size, grad_accum_steps, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        micro_batch_size(TrainConfig(batch_size=batch_size, grad_accum_steps=grad_accum_steps), 16, 8, "gpu")
    if steps := re.search(r"grad_accum_steps=(\d+)", str(error.value)):
        grad_accum_steps = int(steps[1])
    else:
        batch_size = int(re.search(r"use a multiple of (\d+)", str(error.value))[1])
    train = TrainConfig(batch_size=batch_size, grad_accum_steps=grad_accum_steps)
    assert micro_batch_size(train, 16, 8, "gpu") % 8 == 0


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


@pytest.mark.parametrize("n", some(1, 2, 5, 17, 4097, 3, 4, 16, 1000, quick=5))
def test_shuffled_is_a_permutation(n):
    places = jnp.arange(n, dtype=jnp.uint32)
    orders = [
        np.asarray(jax.vmap(lambda i, keys=keys: shuffled(keys, i, n))(places)).astype(int)
        for keys in jax.random.bits(jax.random.key(1), (3, 4), jnp.uint32)
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
