"""The command sample."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.interrupts import interrupts_kept
from gpt_jax.commands.newest_run import newest_run
from gpt_jax.commands.prompt_loop import prompt_loop
from gpt_jax.data.corpus import read_text
from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import TrainedModel, load
from gpt_jax.paths import ARTIFACTS, relative_to_root
from gpt_jax.sampling.generate import WINDOWS
from gpt_jax.sampling.rules import make_rules
from gpt_jax.sampling.texts import Piece, Token
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache

SEPARATOR = "\n" + "-" * 20 + "\n"
PURPOSE = "Write text with a trained model."
MAX_TEXTS = 4096  # of a file of prompts; each takes a cache of its own
SOURCES = ("prompt", "prompt_file", "prompts_file", "interactive")
# Flags that --json repeats.
MADE_BY = (
    "seed", "length", "temperature", "top_k", "top_p", "min_p", "greedy", "repetition_penalty", "window"
)  # fmt: skip
EXAMPLES = ("--length 10000", "--prompt ROMEO: --length 500 --temperature 0.6")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, generate texts, show the beginning of the first, and write all of them to a file.

    After Ctrl-C too. With --interactive, continue what is typed instead.

    Raises:
        RunError: a file cannot be written; what was there before stays.
        KeyboardInterrupt: it was interrupted; what was generated before is written.
    """
    flags = _parse(arguments)
    use_compilation_cache()
    rules = make_rules(
        flags.temperature, flags.top_k, flags.top_p, flags.min_p, flags.greedy, flags.repetition_penalty,
        flags.logprobs is not None,
    )  # fmt: skip
    if flags.show < 0:
        raise UserError(f"show = {flags.show} must be 0 or above")
    workdir = flags.workdir or newest_run()
    model = load(workdir, flags.which)
    stops = [_typed("stop", stop, model) for stop in flags.stop]
    how = {"window": flags.window, "stop": stops}
    print_source = partial(print, f"{workdir}, {model.source}, step {model.step:,}", file=sys.stderr)
    if flags.interactive:
        model.stream("", flags.length, rules, seed=flags.seed, **how)  # checks them before a line is typed
        print_source()

        def continue_line(line: str, number: int) -> Iterator[list[Piece]]:
            prompt, seed = _typed("prompt", line, model), (flags.seed + number) % 2**32
            pieces = model.stream(prompt, flags.length, rules, seed=seed, **how)
            return pieces if number else _compile(pieces)

        prompt_loop(continue_line)
        return
    prompts = _prompts(flags, model)
    pieces = model.stream(prompts, flags.length, rules, num_samples=flags.num_samples, seed=flags.seed, **how)
    if flags.logprobs is not None and os.path.realpath(flags.logprobs) == os.path.realpath(flags.out):
        raise UserError(f"--out and --logprobs both name {flags.out}: name two files")
    for name, file in (("out", flags.out), ("logprobs", flags.logprobs)):
        if file is not None and file.is_dir():
            raise UserError(f"{name} = {file} is a folder: name a file in it")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    print_source()
    ended = "interrupted" if flags.length else "length"  # until a piece says why
    texts = [Text(prompt, [], [], ended) for prompt in prompts for _ in range(flags.num_samples)]
    begun, stopped = time.monotonic(), False
    try:
        _fill(texts, _compile(pieces) if flags.length else pieces, 0 if flags.json else flags.show)
    except KeyboardInterrupt:
        stopped = True  # write what was generated so far
    seconds = max(time.monotonic() - begun, 1e-9)
    _write("out", flags.out, _separated(texts))
    if flags.logprobs is not None:
        _write("logprobs", flags.logprobs, _json_lines(texts))
    if stopped:
        print(file=sys.stderr)  # the line of the text has no end
    if flags.json:
        made = {name: getattr(flags, name) for name in MADE_BY} | {"stop": stops}
        model_ = {"workdir": str(workdir), "source": model.source, "step": model.step}
        print(json.dumps(model_ | made | {"texts": [text.to_dict() for text in texts]}), flush=True)
    count = sum(len(piece) for text in texts for piece in text.pieces)
    print(
        f"{count:,} characters in {seconds:.1f} s ({count / seconds:,.0f} a second, with compilation), "
        f"written to {flags.out}",
        file=sys.stderr,
    )
    if stopped:
        raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> Any:
    """The flags. Some are named in the help of another, so that it fits a screen."""
    parser = ArgumentParser("sample", PURPOSE, EXAMPLES)
    flag, out, hidden = parser.add_argument, ARTIFACTS / "output.txt", argparse.SUPPRESS
    flag("--length", type=int, metavar="N", default=10_000, help="tokens (characters) to write (%(default)s)")
    flag("--prompt", metavar="TEXT", help="text to continue; from a file: --prompt_file FILE")
    flag("--prompt_file", type=Path, help=hidden)
    flag("--prompts_file", type=Path, metavar="FILE", help="a prompt on each line, all continued together")
    flag("--interactive", action="store_true", help="continue what you type, line by line")
    flag("--workdir", type=Path, metavar="DIR", help="a run (its --which best or last) or exported model")
    flag("--which", choices=("best", "last"), default="best", help=hidden)
    flag("--out", type=Path, metavar="FILE", default=out, help=f"file to write ({relative_to_root(out)})")
    flag("--logprobs", type=Path, metavar="FILE", help="write each token's log probability, as JSON lines")
    flag(
        "--show",
        type=int,
        metavar="N",
        default=500,
        help="characters to show here (%(default)s); all: --json",
    )
    flag("--json", action="store_true", help=hidden)
    flag("--seed", type=int, metavar="N", default=0, help="the same seed, the same text (%(default)s)")
    flag("--num_samples", type=int, metavar="N", default=1, help="texts of each prompt (%(default)s)")
    flag("--stop", action="append", metavar="TEXT", default=[], help="end before TEXT; may be repeated")
    flag(
        "--temperature", type=float, metavar="X", default=0.8, help="randomness (%(default)s); none: --greedy"
    )
    flag("--greedy", action="store_true", help=hidden)
    flag("--top_k", type=int, metavar="K, --top_p P", help="the K likeliest tokens; probability P in all")
    flag("--top_p", type=float, help=hidden)
    flag("--min_p", type=float, metavar="P", help="drop tokens less than P times as likely as the best")
    about = "above 1: make what was there less likely"
    flag("--repetition_penalty", type=float, metavar="X", default=1.0, help=about)
    flag("--window", choices=WINDOWS, default=WINDOWS[0], help="how to pass the context (%(default)s)")
    flags = parser.parse_args(arguments)
    given = [name for name in SOURCES if getattr(flags, name) not in (None, False)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} both say what to continue: leave one out")
    if flags.interactive:
        for name in ("json", "logprobs"):
            if getattr(flags, name):
                raise UserError(f"--{name} and --interactive exclude each other: leave one out")
    return flags


@dataclass
class Text:
    """A prompt and what continues it."""

    prompt: str
    pieces: list[str]
    tokens: list[Token]  # only with log probabilities: they take more memory than the text
    ended: str
    n_tokens: int = 0

    def add(self, piece: Piece) -> None:
        """The next piece; until the last one has come, the text counts as interrupted."""
        self.pieces.append(piece)
        self.tokens += [token for token in piece.tokens if token.logprob is not None]
        self.n_tokens += len(piece.tokens)
        self.ended = piece.ended or "interrupted"

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        text = "".join(self.pieces)
        return {"prompt": self.prompt, "text": text, "tokens": self.n_tokens, "ended": self.ended}


def _prompts(flags: Any, model: TrainedModel) -> list[str]:
    """What to continue.

    Raises:
        UserError: a file cannot be read or is not UTF-8, there are no prompts or too many, or one cannot be
            encoded; of a file, the error names the line.
    """
    if flags.prompt_file is not None:
        return [read_text(flags.prompt_file)]
    if flags.prompts_file is None:
        return [_typed("prompt", flags.prompt or "", model)]
    if flags.prompts_file.name.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise UserError(f"prompts_file = {flags.prompts_file}: each line must be a prompt, not JSON")
    file, text = flags.prompts_file, read_text(flags.prompts_file)
    prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    if not 0 < len(prompts) * flags.num_samples <= MAX_TEXTS:
        texts = f" of {flags.num_samples:,} texts each" if flags.num_samples > 1 else ""
        raise UserError(
            f"prompts_file = {file} has {len(prompts):,} prompts{texts}: give 1 to {MAX_TEXTS:,} texts"
        )
    for number, prompt in enumerate(prompts, 1):
        try:
            model.tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
    return prompts


def _compile(pieces: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
    """The same pieces; while the first is made, a line on stderr says that programs are compiled."""
    with compiling_on_stderr("sampling"):
        first = list(islice(pieces, 1))  # none, where no token is asked for
    return chain(first, pieces)


def _fill(texts: list[Text], pieces: Iterator[list[Piece]], show: int) -> None:
    """Add the pieces to the texts; show the end of the first prompt and the beginning of its first text."""
    if show:
        prompt = texts[0].prompt
        print(("... " if len(prompt) > show else "") + prompt[-show:], end="", flush=True)
    n_new = 0
    with interrupts_kept() as check_interrupt:
        for new in pieces:
            # First kept, then shown: what a person has seen is in the file, even after Ctrl-C.
            for text, piece in zip(texts, new, strict=True):
                text.add(piece)
            print(new[0][: max(show - n_new, 0)], end="", flush=True)
            n_new += len(new[0])
            check_interrupt()
    if show:
        print(" ..." if n_new > show else "", flush=True)


def _separated(texts: list[Text]) -> Iterator[str]:
    """The contents of the file of texts."""
    for number, text in enumerate(texts):
        yield from [SEPARATOR if number else "", text.prompt, *text.pieces]


def _json_lines(texts: list[Text]) -> Iterator[str]:
    """A line for each token: number of its text from 0, id, characters, natural logarithm of probability."""
    for number, text in enumerate(texts):
        for token in text.tokens:
            yield json.dumps({"sample": number, **token._asdict()}) + "\n"


def _write(name: str, out: Path, parts: Iterator[str]) -> None:
    """Write a file completely or not at all; a link or a device stays what it is."""
    out = Path(os.path.realpath(out))
    temporary = out.with_name(out.name + ".tmp") if out.is_file() or not out.exists() else out
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines(parts)
        if temporary != out:
            os.replace(temporary, out)
    except OSError as error:
        raise RunError(f"{name} = {out} cannot be written: {error.strerror}") from None
    finally:
        if temporary != out:
            with suppress(OSError):
                temporary.unlink()


def _typed(name: str, prompt: str, model: TrainedModel) -> str:
    """A prompt or stop string from the command line, decoded as UTF-8, whatever the locale is.

    Raises:
        UserError: it is not UTF-8, or it has an escape such as \\n, which would be two characters.
    """
    try:
        prompt = os.fsencode(prompt).decode("utf-8")
    except UnicodeError:
        raise UserError(f"{name} = {prompt!r} is not UTF-8: give the text in a file, --prompt_file") from None
    if escape := re.search(r"\\[nrt]", prompt):
        try:
            model.tokenizer.encode("\\")
        except UserError:
            raise UserError(
                f"{name}: {escape[0]} is two characters here, and the model does not know the backslash: for "
                f"a line feed write --{name} $'ROMEO:\\n', or give the text in a file, --prompt_file"
            ) from None
    return prompt
