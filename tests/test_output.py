"""What a command prints: nothing is lost on a slow reader, and no text commands a terminal."""

import fcntl
import os
import pty
import sys
import threading
import time
import unicodedata

from gpt_jax.commands.run_main import run_main
from gpt_jax.errors import UserError
from gpt_jax.monitor.output import SteadyOutput, raw, steady_output, visible
from gpt_jax.monitor.terminal import Terminal

EVIL = "a\x1b[31mb\x07\x00\r\x7f\x9b\tc\nd\x1b]0;title\x07é\u2028"
SHOWN = "a\\x1b[31mb\\x07\\x00\\x0d\\x7f\\x9b\tc\nd\\x1b]0;title\\x07é\u2028"


def test_visible_escapes_exactly_the_control_characters():
    assert visible(EVIL) == SHOWN
    for code in range(sys.maxunicode + 1):
        is_escaped = unicodedata.category(chr(code)) == "Cc" and chr(code) not in "\n\t"
        assert visible(chr(code)) == (f"\\x{code:02x}" if is_escaped else chr(code))


def printed(function, ends, monkeypatch):
    """What a function prints to a terminal or a pipe; little enough to wait there until it is read."""
    controller, other = ends
    received = b""
    with open(other, "w", encoding="utf-8", newline="") as stream:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            with steady_output():
                function()
        os.write(other, b"END")
        while not received.endswith(b"END"):
            received += os.read(controller, 4096)
    os.close(controller)
    return received.decode("utf-8").replace("\r\n", "\n").removesuffix("END")


def test_a_terminal_shows_control_characters_and_a_pipe_gets_them(monkeypatch):
    assert printed(lambda: print(EVIL), pty.openpty(), monkeypatch) == SHOWN + "\n"
    assert printed(lambda: print(EVIL), os.pipe(), monkeypatch) == EVIL + "\n"
    assert printed(lambda: raw(sys.stdout).write("\x1b[0m"), pty.openpty(), monkeypatch) == "\x1b[0m"


def test_the_bar_keeps_its_control_characters_and_text_above_it_loses_them(monkeypatch):
    def show():
        terminal = Terminal(0, 10)
        terminal.write(EVIL)
        terminal.write("compile \x1b[1m", end="")
        terminal.write("done")
        terminal.close()

    monkeypatch.setenv("TERM", "xterm")
    text = printed(show, pty.openpty(), monkeypatch)
    assert SHOWN in text and "compile \\x1b[1mdone\n" in text
    assert "\r" in text and "0/10" in text and "\x1b[31m" not in text and "\x07" not in text
    # The bar is taken away before a line is written: none stands behind another.
    assert all("\r" in line.split("a\\x1b")[0] for line in text.split("\n") if "a\\x1b" in line)


def test_errors_are_one_line_without_control_characters(monkeypatch):
    def fail():
        raise UserError("no trained model in a\n\x1b[31mb")

    statuses = []
    text = printed(lambda: statuses.append(run_main(fail)), pty.openpty(), monkeypatch)
    assert text == "error: no trained model in a\\n\\x1b[31mb\n" and statuses == [2]


def small_pipe():
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    return reading, writing


def test_a_reader_who_sleeps_gets_everything():
    reading, writing = small_pipe()
    text = "".join(map(str, range(5000)))
    received = []

    def read():
        time.sleep(0.5)
        while len(b"".join(received)) < len(text):
            received.append(os.read(reading, 1000))
            time.sleep(0.001)

    reader = threading.Thread(target=read)
    reader.start()
    with open(writing, "w", encoding="utf-8") as stream:
        output = SteadyOutput(stream)
        for begin in range(0, len(text), 700):
            output.write(text[begin : begin + 700])
        reader.join()
    assert b"".join(received).decode() == text
    os.close(reading)


def test_a_reader_who_has_gone_is_no_error():
    reading, writing = small_pipe()
    with open(writing, "w", encoding="utf-8") as stream:
        output = SteadyOutput(stream)
        timer = threading.Timer(0.3, os.close, [reading])
        timer.start()
        output.write("a" * 10_000)  # waits, and then the reader goes
        output.write("a" * 10_000)
        timer.join()
