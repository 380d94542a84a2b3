"""Texts as people sample them: unequal prompts side by side, stop strings, end of text, log probabilities."""

import codecs
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODELS, VOCAB, apply, make_gpt, make_params, small_model, some

import gpt_jax
from gpt_jax.commands import sample
from gpt_jax.data.bpe import BYTES, BPETokenizer
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model.cache import Cache
from gpt_jax.model.cpu import FEW_ROWS, linear_product, min_rows
from gpt_jax.model.params import unstack_layers
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.sampling.decode import prefill
from gpt_jax.sampling.generate import generate_pieces
from gpt_jax.sampling.rules import make_rules, penalize
from gpt_jax.sampling.texts import GrowingText, Piece, Token

T = 8
KEY = jax.random.key(5)


def make_model(name):
    config = small_model(context=T, **MODELS[name])
    return make_gpt(config, VOCAB), make_params(config)


def random_prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length, np.int32) for length in lengths]


def generate(model, params, prompts, length, rules, window="half"):
    """Tokens and log probabilities, [B, length] each."""
    pieces = list(generate_pieces(model, params, prompts, length, rules, KEY, window))
    return [np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True)]


@pytest.mark.parametrize("name", some("gpt2", "modern", "convolution_past_the_context", quick=2))
def test_rows_of_unequal_lengths_have_the_logits_of_each_alone(name):
    """Through the cache, up to the context of the longest; a row of no token is empty."""
    model, params = make_model(name)
    params = unstack_layers(params)
    lengths_B = np.array([3, 1, 5, 0], np.int32)
    tokens_BxT = np.random.default_rng(1).integers(0, VOCAB, (4, T), np.int32)
    alone_BxTxV, _ = apply(model, params, tokens_BxT)
    padded_BxT = np.where(np.arange(T) < lengths_B[:, None], tokens_BxT, VOCAB - 1)  # leaves no trace
    cache = jax.jit(Cache.align)(prefill(model, params, padded_BxT, lengths_B), lengths_B)
    for step in range(T - lengths_B.max()):
        at_B = lengths_B + step
        next_Bx1 = np.take_along_axis(tokens_BxT, at_B[:, None], axis=1)
        logits_Bx1xV, cache = apply(model, params, next_Bx1, cache)
        np.testing.assert_allclose(logits_Bx1xV[:, 0], alone_BxTxV[np.arange(4), at_B], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", ["half", "exact"])
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_texts_of_unequal_prompts_are_those_of_each_alone_past_the_context(name, window):
    model, params = make_model(name)
    prompts = random_prompts(1, 3, T - 1, T + 1, 2 * T + 3)
    rules = make_rules(greedy=True, logprobs=True)
    tokens_BxN, logprobs_BxN = generate(model, params, prompts, 3 * T + 1, rules, window)
    for row, prompt in enumerate(prompts):
        alone = generate(model, params, prompt[None], 3 * T + 1, rules, window)
        np.testing.assert_array_equal(tokens_BxN[row], alone[0][0])
        np.testing.assert_allclose(logprobs_BxN[row], alone[1][0], atol=1e-5)


@pytest.mark.parametrize("window", ["half", "exact"])
def test_a_row_has_the_keys_of_its_own_tokens(window):
    """So the first of unequal prompts, drawn at random, is what it is alone."""
    model, params = make_model("gpt2")
    prompts, rules = random_prompts(4, 9), make_rules(temperature=2.0, logprobs=True)
    tokens_BxN, _ = generate(model, params, prompts, 20, rules, window)
    alone_1xN, _ = generate(model, params, prompts[:1], 20, rules, window)
    np.testing.assert_array_equal(tokens_BxN[0], alone_1xN[0])


def test_the_log_probability_is_that_before_all_rules():
    model, params = make_model("gpt2")
    prompt = random_prompts(3)[0]
    rules = make_rules(temperature=0.3, top_k=3, repetition_penalty=2.0, logprobs=True)
    tokens_1xN, logprobs_1xN = generate(model, params, prompt[None], T - 3, rules)
    text = np.append(prompt, tokens_1xN[0])
    logprobs_TxV = jax.nn.log_softmax(apply(model, params, text[None])[0][0])
    wanted = logprobs_TxV[np.arange(2, T - 1), tokens_1xN[0]]
    np.testing.assert_allclose(logprobs_1xN[0], wanted, atol=1e-5)


def penalized(logits_V, text, penalty):
    """As Hugging Face's RepetitionPenaltyLogitsProcessor does it."""
    logits_V = logits_V.copy()
    for token in set(text):
        logits_V[token] = logits_V[token] * penalty if logits_V[token] < 0 else logits_V[token] / penalty
    return logits_V


def test_a_repetition_penalty_follows_its_definition():
    logits_V = np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)
    seen_V = np.isin(np.arange(VOCAB), [1, 4, 5])
    got = penalize(jnp.array(logits_V[None]), seen_V[None], 1.7)[0]
    np.testing.assert_allclose(got, penalized(logits_V, [1, 4, 5, 4], 1.7), rtol=1e-6)


@pytest.mark.parametrize("window", ["half", "exact"])
def test_a_repetition_penalty_sees_the_whole_text(window):
    """Of each row: its prompt, also before the window, and what was drawn, over several windows."""
    model, params = make_model("gpt2")
    prompts, length = [np.arange(T + 3, dtype=np.int32) % 4, random_prompts(3)[0]], 2 * T
    rules = make_rules(greedy=True, repetition_penalty=5.0, logprobs=True)
    tokens_BxN, _ = generate(model, params, prompts, length, rules, window)
    plain_BxN, _ = generate(model, params, prompts, length, make_rules(greedy=True, logprobs=True), window)
    assert (tokens_BxN != plain_BxN).any(axis=1).all()
    if window == "exact":  # its windows are simple to follow
        for prompt, drawn in zip(prompts, tokens_BxN, strict=True):
            text = prompt.tolist()
            for token in drawn.tolist():
                seen = text[-T:]
                padded = np.array(seen + [0] * (T - len(seen)), np.int32)
                logits_V = np.asarray(apply(model, params, padded[None])[0][0, len(seen) - 1])
                assert token == penalized(logits_V, text, 5.0).argmax()
                text.append(token)


@pytest.mark.skipif(min_rows() > 1, reason="JAX 0.9 multiplies single rows slowly")
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_a_few_rows_are_multiplied_one_by_one(rows):
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((rows, 1, 5), (5, 2, 3)))
    dimensions = (((2,), (0,)), ((), ()))
    program = jax.jit(lambda *a: linear_product(*a, dimensions)).lower(x, kernel)
    n_products = 1 if rows > FEW_ROWS else rows
    assert program.as_text().count("dot_general") == n_products
    np.testing.assert_allclose(program.compile()(x, kernel), np.einsum("btd,dgf->btgf", x, kernel), atol=1e-5)


# The text, by single characters, is cut where the first stop string is complete.
STOPPED = [
    ("to be or not", ["or"], "to be ", "stop"),
    ("to be or not", ["t", "or"], "", "stop"),
    ("to be or not", ["not to"], "to be or not", "length"),
    ("xabcd", ["abcd", "b"], "xa", "stop"),
    ("aab", ["aab"], "", "stop"),
    ("aaab", ["aab"], "a", "stop"),
    ("abab|x", ["ababc", "|"], "abab", "stop"),
    ("one two", ["one two three"], "one two", "length"),
    ("é日!", ["日"], "é", "stop"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("text, stops, wanted, ended", STOPPED)
def test_a_stop_string_over_the_borders_of_tokens_and_pieces(text, stops, wanted, ended, size):
    """A token is a byte here, or one of three characters; pieces have `size` tokens."""
    byte_decoder = codecs.getincrementaldecoder("utf-8")()
    threes = [text[i : i + 3] for i in range(0, len(text), 3)]
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    for ids, decode in (
        (data, lambda ids, final=False: byte_decoder.decode(bytes(ids.tolist()), final)),
        (np.arange(len(threes)), lambda ids, final=False: "".join(threes[i] for i in ids)),
    ):
        growing, pieces = GrowingText(decode, stops, None), []
        for begin in range(0, len(ids), size):
            pieces.append(growing.add(ids[begin : begin + size], None, begin + size >= len(ids)))
            given = "".join(pieces)
            assert wanted.startswith(given)  # what was given out is never taken back
        assert (given, growing.ended, pieces[-1].ended) == (wanted, ended, ended)
        assert ["".join(token.text for token in piece.tokens) for piece in pieces] == pieces
        byte_decoder.reset()


@pytest.mark.parametrize("size", [1, 2, 50])
def test_a_text_ends_within_a_character(size):
    """What there is of it is shown as U+FFFD, before the end of text and at the length."""
    tokenizer = BPETokenizer((*BYTES, b"a\xe2"))
    for ids, wanted, ended in (
        ([98, 256, 257], "ba\ufffd", "end_of_text"),
        ([98, 256], "ba\ufffd", "length"),
        ([97, 0xC3, 257, 98], "a\ufffd", "end_of_text"),
        ([97, 0xC3], "a\ufffd", "length"),
        ([0xF0, 0x9F, 0x98], "\ufffd", "length"),
        ([0xC3, 0xA9, 257], "é", "end_of_text"),
    ):
        growing, ids_N = GrowingText(tokenizer.decoder(), [], tokenizer.end_id), np.array(ids, np.int32)
        parts = [ids_N[begin : begin + size] for begin in range(0, len(ids), size)]
        pieces = [growing.add(part, None, part is parts[-1]) for part in parts]
        assert ("".join(pieces), growing.ended) == (wanted, ended)


def test_text_that_cannot_be_in_a_stop_string_comes_at_once():
    growing = GrowingText(lambda ids, final=False: "".join(map(chr, ids)), ["\n\n"], None)
    add = lambda text: growing.add(np.array([*map(ord, text)]), None, False)  # noqa: E731
    assert [add("ab\n"), add("c"), add("\n"), add("\nx"), add("more")] == ["ab", "\nc", "", "", ""]
    assert growing.ended == "stop"


class EndingTokenizer(CharTokenizer):
    """Characters, of which the space stands for the end of a text."""

    @property
    def end_id(self):
        return self.characters.index(" ")


def test_end_of_text_ends_each_text_by_itself(fox_run):
    """It is no part of the text; when all have ended, no more is generated."""
    model = gpt_jax.load(fox_run)
    metadata = replace(model.metadata, tokenizer=EndingTokenizer(model.tokenizer.characters))
    ending = replace(model, metadata=metadata)
    prompts, rules = ["the qu", "bro", "jumps over t"], make_rules(greedy=True)
    whole = model.generate(prompts, 12, greedy=True)
    assert ending.generate(prompts, 12, greedy=True) == [text.partition(" ")[0] for text in whole]
    assert whole == [model.generate(prompt, 12, greedy=True) for prompt in prompts]  # it knows its text
    pieces = list(ending.stream(prompts, 10_000, rules))
    assert len(pieces) < 5 and [piece.ended for piece in pieces[-1]] == ["end_of_text"] * 3


def test_python_has_stop_strings_several_prompts_and_log_probabilities(fox_run):
    model = gpt_jax.load(fox_run)
    assert model.generate("the q", 30, greedy=True, stop=["fox", "zzz"]) == "uick brown "
    pieces = list(model.stream("the q", 8, make_rules(logprobs=True), stop=" "))
    tokens = [token for (piece,) in pieces for token in piece.tokens]
    text = "".join(token.text for token in tokens)
    logprobs_TxV = jax.nn.log_softmax(model.logits("the q" + text))
    wanted = [logprobs_TxV[4 + n, token.id] for n, token in enumerate(tokens)]
    np.testing.assert_allclose([token.logprob for token in tokens], wanted, atol=1e-5)
    assert "".join(piece[0] for piece in pieces) == text
    for arguments, message in (
        ({"stop": ""}, "stop = '' must have"), ({"stop": ["a", ""]}, "stop = '' must have"),
        ({"prompt": []}, r"prompt = \[\] must have"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 must be a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty = nan must be"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            model.generate(**{"prompt": "the"} | arguments)


def test_a_file_of_prompts_json_and_log_probabilities(fox_run, run_here, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "the q\nlazy d\n\nover the lazy dog\r\n", encoding="utf-8", newline=""
    )
    done = run_here(
        sample.main, "--workdir", fox_run, "--prompts_file=prompts.txt", "--length=9", "--greedy", "--json",
        "--stop= b", "--out=o.txt", "--logprobs=l.jsonl", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    prompts, texts = zip(*((text["prompt"], text["text"]) for text in made["texts"]), strict=True)
    assert prompts == ("the q", "lazy d", "", "over the lazy dog") and texts[:2] == ("uick", "og\nthe qu")
    assert [text["ended"] for text in made["texts"]] == ["stop", "length", "length", "length"]
    assert made["greedy"] and made["seed"] == 0 and made["stop"] == [" b"] and made["step"] > 0
    written = (tmp_path / "o.txt").read_text(encoding="utf-8").split(sample.SEPARATOR)
    assert written == [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text(encoding="utf-8").splitlines()]
    model = gpt_jax.load(fox_run)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        tokens = [line for line in lines if line["sample"] == number]
        assert "".join(token["text"] for token in tokens) == text
        if 0 < len(prompt + text) <= 16 and prompt:
            logprobs_TxV = jax.nn.log_softmax(model.logits(prompt + text))
            wanted = [logprobs_TxV[len(prompt) - 1 + n, t["id"]] for n, t in enumerate(tokens)]
            np.testing.assert_allclose([token["logprob"] for token in tokens], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--prompts_file=empty",), "prompts_file = empty has 0 prompts: give 1 to 4,096 texts"),
        (("--prompts_file=many",), "prompts_file = many has 5,000 prompts: give 1 to"),
        (("--prompts_file=two", "--num_samples=3000"), "2 prompts of 3,000 texts each: give 1 to"),
        (("--prompts_file=two",), "two, line 2: unknown characters: 'Q'"),
        (("--prompts_file=latin",), "latin is not UTF-8: byte 0xe9"),
        (("--prompts_file=none",), "none does not exist"),
        (("--prompts_file=two", "--prompt=a"), "--prompt and --prompts_file both say what to continue"),
        (("--interactive", "--json"), "--json and --interactive exclude each other"),
        (("--stop=",), "stop = '' must have a character or more"),
        (("--repetition_penalty=-1",), "repetition_penalty = -1.0 must be a number above 0; 1 is none"),
        (("--logprobs=o.txt",), "--out and --logprobs both name o.txt: name two files"),
        (("--prompts_file=two.JSONL",), "two.JSONL: each line must be a prompt, not JSON"),
        (("--logprobs=.",), "logprobs = . is a folder: name a file in it"),
    ],
)
def test_bad_input_is_one_line(fox_run, run_here, tmp_path, arguments, message):
    files = {
        "empty": b"",
        "many": b"a\n" * 5000,
        "two": b"the\nQ\n",
        "two.JSONL": b"{}\n",
        "latin": b"caf\xe9",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = run_here(sample.main, "--workdir", fox_run, "--out=o.txt", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", done.stderr), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


# Makes stdin the controlling terminal, whose Ctrl-C is then a signal.
CONTROL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def interactive(run, *flags, python=(), **streams):
    command = [sys.executable, *python, REPOSITORY / "sample.py", "--workdir", run, "--interactive", *flags]
    return subprocess.Popen([*map(str, command), "--greedy"], **streams)


def test_interactive_reads_lines_of_a_pipe(fox_run, tmp_path):
    process = interactive(
        fox_run, "--length=5", cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    shown, errors = process.communicate("the q\nZ\nlazy \n", timeout=120)
    assert process.returncode == 0 and shown == "uick \ndog\nt\n", errors
    assert "error: unknown characters: 'Z'" in errors
    assert list(tmp_path.iterdir()) == []


def read_until(controller, wanted, seconds=120):
    """What a terminal shows, until it shows this."""
    shown, end = b"", time.monotonic() + seconds
    while not re.search(wanted, shown):
        assert time.monotonic() < end and select.select([controller], [], [], seconds)[0], shown
        shown += os.read(controller, 4096)
    return shown


def test_interactive_on_a_terminal(fox_run):
    """Ctrl-C ends a text, and a line, but not the program; the arrow brings back a line; Ctrl-D ends it."""
    controller, terminal = pty.openpty()
    process = interactive(
        fox_run, "--length=1000000", python=("-c", CONTROL), stdin=terminal, stdout=terminal,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(terminal)
    try:
        read_until(controller, rb"> ")
        os.write(controller, b"the q\r")
        read_until(controller, rb"uick brown fox jumps over the lazy dog")
        os.write(controller, b"\x03")
        read_until(controller, rb"\n> ")
        # A signal before `input` waits for a key would be seen at the next key only: wait for the echo.
        os.write(controller, b"half a line")
        read_until(controller, rb"half a line")
        time.sleep(0.5)
        os.write(controller, b"\x03")
        read_until(controller, rb"\n> ")
        os.write(controller, b"\x1b[A\r")  # the line before
        shown = read_until(controller, rb"uick brown fox jumps over the lazy dog")
        assert b"the q\r\n" in shown
        os.write(controller, b"\x03")
        read_until(controller, rb"\n> ")
        os.write(controller, b"\x04")
        assert process.wait(timeout=60) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(controller)


def test_ctrl_c_in_a_callback_that_ignores_it_is_not_lost():
    """The garbage collector, for one, calls functions whose exceptions are ignored."""
    texts, made = [sample.Text("", [], [], "interrupted")], 0

    def pieces():
        nonlocal made
        for made in range(1, 10):
            if made == 3:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            yield [Piece([Token(0, "a", None)], None)]

    with pytest.raises(KeyboardInterrupt):
        sample._fill(texts, pieces(), 0)
    assert made == 3 and texts[0].pieces == ["a"] * 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_writes_what_there_is_as_json(fox_run, tmp_path):
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "sample.py", "--workdir", fox_run, "--out", tmp_path / "o.txt",
         "--length=100000000", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    while not re.search(r"\d s", process.stderr.readline()):  # compiled
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (text,) = json.loads(shown)["texts"]
    assert text["ended"] == "interrupted" and text["text"] == (tmp_path / "o.txt").read_text(encoding="utf-8")
