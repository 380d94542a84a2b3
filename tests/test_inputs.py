"""What people put in: texts to train on, prompts and rules to sample by. docs/faults.md has a table of it."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import some

import gpt_jax
from gpt_jax.commands.sample import SEPARATOR
from gpt_jax.commands.sample import main as sample_command
from gpt_jax.config import Config
from gpt_jax.data.corpus import load_corpus, read_text
from gpt_jax.errors import UserError
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.sampling.rules import make_rules
from gpt_jax.trainer.run import train

pytestmark = pytest.mark.faults
LINE = "to be or not to be, that is the question\n"


@pytest.mark.parametrize(
    "data, characters",
    some(
        ("\U0001f600éñ\U0001f601".encode() * 155, "éñ\U0001f600\U0001f601"),
        (b"\xef\xbb\xbf" + LINE.encode() * 50, "".join(sorted(set(LINE)))),  # BOM: no part of the text
        (LINE.replace("\n", "\r\n").encode() * 50, "".join(sorted(set(LINE + "\r")))),  # CRLF: two characters
        (b"a\x00b\x00" * 200, "\x00ab"),  # NUL: a character like others
        (b"a" * 400, "a"),  # one character repeated: nothing to learn, and no fault
    ),
    ids=["beyond ascii", "bom", "crlf", "nul", "one character"],
)
def test_unusual_texts_train_and_sample(tiny_config, text_file, tmp_path, data, characters):
    text_file.write_bytes(data)
    assert load_corpus(text_file, 16, 0.9).tokenizer.characters == characters
    muon = {"name": "muon"} if characters == "a" else {}  # zero gradients must not become NaN
    # The first text has the size, and this model the width, of a test in test_training.py: one program.
    config = tiny_config(
        model={"d_model": 64}, train={"steps": 4, "eval_every": 2, "sample_length": 5}, optimizer=muon
    )
    assert train(config, tmp_path / "run") == 0
    text = gpt_jax.load(tmp_path / "run").generate("", length=20)
    assert len(text) == 20 and set(text) <= set(characters)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "has 0 characters: its training split of 0 tokens is shorter than one window"),
        (b"\xef\xbb\xbf", "has 0 characters"),
        (
            b"a" * 100,
            "its validation split of 10 tokens is shorter than one window of model.context . 1 = 17",
        ),
        (b"a" * 18, "its training split of 16 tokens is shorter"),
        (LINE.encode("utf-16") * 20, "is not UTF-8: byte 0xff at offset 0; save it as UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9" * 90, "is not UTF-8: byte 0xe9 at offset 6"),
    ],
    ids=["empty", "only a bom", "short validation", "short training", "utf-16", "latin-1 after a bom"],
)
def test_texts_that_are_refused(text_file, data, message):
    text_file.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(text_file, 16, 0.9)
    assert "\n" not in str(error.value) and str(text_file) in str(error.value)


def test_folders_and_pipes_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="is not a regular file"):
            read_text(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_text_without_permission_as_another_user(tmp_path):
    text = tmp_path / "secret.txt"
    text.write_text(LINE * 50, encoding="utf-8")
    text.chmod(0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            read_text(text)
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def run(tiny_run):
    """A model of seconds that knows the characters of `LINE`, with a context of 16."""
    return tiny_run


def sample(run, out, **arguments):
    """By the way of sample.py; what it wrote."""
    flags = {"workdir": run, "which": "last", "length": 40, "show": 0, "out": out} | arguments
    sample_command([f"--{name}={value}" for name, value in flags.items()])
    return out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": ""}, {"prompt": "to be"}, {"prompt": LINE[:-1] * 9}, {"length": 0}, {"temperature": 0},
        {"temperature": 1e-40}, {"temperature": 1e30}, {"top_k": 1}, {"top_k": 10**12}, {"top_p": 1e-9},
        {"top_p": 1}, {"min_p": 0}, {"min_p": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_can_be_sampled_and_both_ways_agree(run, tmp_path, arguments):
    text = sample(run, tmp_path / "out.txt", **arguments)
    prompt, length = arguments.get("prompt", ""), arguments.get("length", 40)
    assert text.startswith(prompt) and len(text) == len(prompt) + length
    defaults = {"prompt": "", "length": 40, "temperature": 0.8}  # those of sample.py
    generated = gpt_jax.load(run, "last").generate(**defaults | arguments)
    assert prompt + generated == text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": "gifé"}, "unknown characters: 'f', 'g', 'é' .nearest known: 'e'.; the vocabulary"),
        ({"length": -1}, "length = -1 must be 0 or above"),
        ({"temperature": -0.5}, "temperature = -0.5 must be a number of 0"),
        ({"temperature": float("nan")}, "temperature = nan must be"),
        ({"temperature": float("inf")}, "temperature = inf must be"),
        ({"top_k": 0}, "top_k = 0 must be 1 or above"),
        ({"top_k": -3}, "top_k = -3 must be 1 or above"),
        *(({"top_p": p}, f"top_p = {p} must lie in") for p in (0.0, -0.1, 1.1, float("nan"))),
        *(({"min_p": p}, f"min_p = {p} must lie in") for p in (-0.1, 1.1, float("nan"))),
        ({"seed": 2**32}, "seed = 4294967296 must lie in"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_sampled_and_both_ways_say_the_same(run, tmp_path, arguments, message):
    out = tmp_path / "out.txt"
    with pytest.raises(UserError, match=message) as by_program:
        sample(run, out, **arguments)
    with pytest.raises(UserError, match=message) as by_python:
        gpt_jax.load(run, "last").generate(**{"length": 40} | arguments)
    assert str(by_program.value) == str(by_python.value)
    assert not out.exists()


def test_a_prompt_that_is_not_utf_8(run, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"to be \xff")
    with pytest.raises(UserError, match="is not UTF-8: byte 0xff at offset 6"):
        sample(run, tmp_path / "out.txt", prompt_file=tmp_path / "prompt.txt")
    command = [sys.executable, str(REPOSITORY / "sample.py"), "--workdir", str(run), "--prompt"]
    done = subprocess.run([*map(os.fsencode, command), b"to be \xff"], capture_output=True)
    assert done.returncode == 2
    assert done.stderr == (
        b"error: prompt = 'to be \\udcff' is not UTF-8: give the text in a file, --prompt_file\n"
    )


def test_ten_million_characters_can_be_asked_for_and_stopped(run, tmp_path):
    """Ctrl-C writes what there is."""
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "sample.py"), "--workdir", run, "--out", tmp_path / "out.txt",
         "--length", "10000000", "--show", "10000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    try:
        shown = process.stdout.read(2000)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    text = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert 2000 <= len(text) < 10_000_000 and text.startswith(shown)


def test_memory_of_many_characters_is_bounded(run):
    """They come in pieces, and nothing but the text grows."""
    pieces = gpt_jax.load(run).stream("", 10_000_000, make_rules())
    assert sum(len(next(pieces)[0]) for _ in range(20)) < 1000
    assert np.all([len(next(pieces)[0]) <= 32 for _ in range(20)])


def test_memory_of_a_long_prompt_does_not_grow_with_the_samples(run, tmp_path):
    out = tmp_path / "out.txt"
    arguments = {"length": 5, "num_samples": 30, "show": 0}
    sample(run, out, prompt=LINE, **arguments)  # compiles
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(LINE * 25_000, encoding="utf-8")
    tracemalloc.start()
    sample_command([
        f"--workdir={run}", "--which=last", f"--prompt_file={prompt}", "--length=5", "--num_samples=30",
        "--show=0", f"--out={out}",
    ])  # fmt: skip
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    n = 25_000 * len(LINE)
    assert peak < 12 * n  # a copy for each sample would take 30, its ids four times as much
    assert out.stat().st_size == 30 * (n + 5) + 29 * len(SEPARATOR)


@pytest.mark.parametrize(
    "show, shown",
    [
        (0, ""),
        (3, "... ion{new:.3} ...\n"),
        (20, "to be, that question{new:.20}\n"),
        (500, "{prompt}{new}\n"),
    ],
)
def test_what_is_shown_of_prompt_and_text(run, tmp_path, capsys, show, shown):
    prompt = "to be, that question" if show else LINE * 1000
    text = sample(run, tmp_path / "out.txt", prompt=prompt, length=20, show=show)
    new = text.removeprefix(prompt)
    assert capsys.readouterr().out == shown.format(prompt=prompt, new=new)


@pytest.mark.parametrize("prompt", [r"to be\n", r"\tto", r"to\r\nbe"])
def test_an_escape_in_a_prompt_is_explained(run, tmp_path, prompt):
    with pytest.raises(UserError, match=r"for a line feed write --prompt \$'ROMEO:\\n', or .* --prompt_file"):
        sample(run, tmp_path / "out.txt", prompt=prompt)
    with pytest.raises(UserError, match="unknown characters"):
        sample(run, tmp_path / "out.txt", prompt="to\\be")


def start_sampling(run, out, stdout, *flags):
    command = [sys.executable, str(REPOSITORY / "sample.py"), "--workdir", run, "--out", out, *flags]
    return subprocess.Popen(list(map(str, command)), stdout=stdout, stderr=subprocess.PIPE)


def wait_until_full(reading, process):
    """Until text waits in the pipe, and no more comes."""
    before, now = 0, 0
    while not now or now != before:
        assert process.poll() is None
        time.sleep(0.5)
        before, now = now, struct.unpack("i", fcntl.ioctl(reading, termios.FIONREAD, b"\0" * 4))[0]


@pytest.fixture
def small_pipe():
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    os.close(reading)


@pytest.mark.slow
def test_a_reader_who_sleeps_gets_the_whole_text(run, tmp_path, small_pipe):
    reading, writing = small_pipe
    process = start_sampling(run, tmp_path / "out.txt", writing, "--length", 9000, "--show", 9000)
    os.close(writing)
    wait_until_full(reading, process)
    shown = b""
    while data := os.read(reading, 4096):
        shown += data
    assert process.wait(timeout=60) == 0, process.stderr.read()
    process.stderr.close()
    assert shown == (tmp_path / "out.txt").read_bytes() + b"\n" and len(shown) == 9001


def test_ctrl_c_ends_the_wait_for_a_reader_and_writes_what_there_is(run, tmp_path, small_pipe):
    reading, writing = small_pipe
    process = start_sampling(run, tmp_path / "out.txt", writing, "--length", 900_000, "--show", 900_000)
    os.close(writing)
    wait_until_full(reading, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    text = (tmp_path / "out.txt").read_bytes()
    assert text.startswith(os.read(reading, 4096)) and 0 < len(text) < 900_000


@pytest.mark.slow
def test_a_terminal_is_not_commanded_by_a_text(tmp_path):
    """The model knows control characters; a pipe and the file get them, a terminal does not."""
    (tmp_path / "text.txt").write_text("\x1b[31m\x07ab\n" * 200, encoding="utf-8", newline="")
    config = {
        "model": {"n_layer": 1, "n_head": 2, "d_model": 16, "context": 16},
        "data": {"path": str(tmp_path / "text.txt")},
        "train": {"steps": 4, "batch_size": 8, "sample_length": 0},
        "optimizer": {"warmup_steps": 1},
        "mesh": {"data": 1},
    }
    assert train(Config.from_dict(config), tmp_path / "run") == 0
    controller, terminal = pty.openpty()
    flags = ("--prompt", "\x1b[31m\x07a", "--length", 100)
    process = start_sampling(tmp_path / "run", tmp_path / "out.txt", terminal, *flags)
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(controller, 4096):
            shown += data
    except OSError:  # the other end is closed
        pass
    os.close(controller)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    text = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert text.startswith("\x1b[31m\x07a") and len(text) == 107
    escaped = text.replace("\x1b", r"\x1b").replace("\x07", r"\x07")
    assert shown.decode().replace("\r\n", "\n") == escaped + "\n"
    assert re.search(rf"{tmp_path}/run, best checkpoint", error.decode())
