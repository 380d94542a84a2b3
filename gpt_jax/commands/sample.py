"""Write text with a trained model: python sample.py --length 10000"""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.paths import ARTIFACTS, newest_run
from gpt_jax.data.corpus import read_text
from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import TrainedModel, load
from gpt_jax.sampling.generate import WINDOWS
from gpt_jax.sampling.rules import SamplingRules, make_rules
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache

SEPARATOR = "\n" + "-" * 20 + "\n"


def main() -> None:
    """Parse the flags and write the samples."""
    parser = ArgumentParser(description=__doc__)
    flag = parser.add_argument
    flag("--length", type=int, default=10_000, help="tokens (characters) to generate (%(default)s)")
    flag("--prompt", default="", help="text to continue")
    flag("--prompt_file", type=Path, help="a UTF-8 file with the text to continue")
    flag("--temperature", type=float, default=0.8, help="lower is safer, higher is wilder (%(default)s)")
    flag("--top_k", type=int, help="draw from the k most likely tokens")
    flag("--top_p", type=float, help="draw from the most likely tokens with this total probability")
    flag("--min_p", type=float, help="draw from tokens at least this many times as likely as the likeliest")
    flag("--greedy", action="store_true", help="always take the most likely token")
    flag("--num_samples", type=int, default=1, help="texts to generate side by side (%(default)s)")
    flag("--seed", type=int, default=0, help="the same seed gives the same text (%(default)s)")
    flag("--which", choices=("best", "last"), default="best", help="checkpoint (%(default)s)")
    flag("--workdir", type=Path, help="a run, or an exported model (the newest run in artifacts/)")
    flag("--out", type=Path, default=ARTIFACTS / "output.txt", help="file to write (%(default)s)")
    flag("--window", choices=WINDOWS, default=WINDOWS[0], help="what the model sees past its context")
    flag("--show", type=int, default=500, help="characters to show on the terminal (%(default)s)")
    flags = vars(parser.parse_args())
    use_compilation_cache()
    names = ("temperature", "top_k", "top_p", "min_p", "greedy")
    write_samples(rules=make_rules(**{name: flags.pop(name) for name in names}), **flags)


def write_samples(
    workdir: Path | None,
    which: str,
    prompt: str,
    prompt_file: Path | None,
    length: int,
    rules: SamplingRules,
    num_samples: int,
    seed: int,
    window: str,
    show: int,
    out: Path,
) -> None:
    """Generate text, show its beginning on the terminal, and write all of it to a file.

    Args:
        workdir: a run or an exported model; None: what `newest_run` finds.
        which: "best" or "last" checkpoint.
        prompt: what to continue; each sample in the file begins with it.
        prompt_file: a UTF-8 file to take the prompt from instead.
        length: new tokens in each sample.
        rules: how tokens are drawn.
        num_samples: how many, generated side by side.
        seed: the same seed gives the same text.
        window: "half" or "exact", see `sampling/generate.py`.
        show: characters to show: of the prompt's end, and of the first sample's new text.
        out: the file, written completely at the end.

    Raises:
        UserError: an argument out of its range, unknown characters, no trained run, or a folder as `out`.
        RunError: `out` cannot be written.
    """
    if show < 0:
        raise UserError(f"show = {show} must be 0 or above")
    workdir = newest_run() if workdir is None else workdir
    model = load(workdir, which)
    prompt = _typed(prompt, model) if prompt_file is None else read_text(prompt_file)
    pieces = model.stream(prompt, length, rules, num_samples=num_samples, seed=seed, window=window)
    if out.is_dir():
        raise UserError(f"out = {out} is a folder: name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)

    print(f"{workdir}, {model.source}, step {model.step:,}", file=sys.stderr)
    samples: list[list[str]] = [[] for _ in range(num_samples)]
    begun = time.monotonic()
    stopped = False
    try:
        if length:
            pieces = _compile(pieces)
        _fill(samples, pieces, prompt, show)
    except KeyboardInterrupt:
        stopped = True  # write what was generated so far
    seconds = max(time.monotonic() - begun, 1e-9)
    _write(out, _in_order(prompt, samples))
    if stopped:
        print(file=sys.stderr)  # the line of the text has no end
    count = sum(map(len, chain.from_iterable(samples)))
    print(
        f"{count:,} characters in {seconds:.1f} s ({count / seconds:,.0f} a second, with compilation), "
        f"written to {out}",
        file=sys.stderr,
    )
    if stopped:
        raise KeyboardInterrupt


def _compile(pieces: Iterator[list[str]]) -> Iterator[list[str]]:
    """The same pieces; the first is computed here, so that compilation happens now."""
    with compiling_on_stderr("sampling"):
        return chain([next(pieces)], pieces)


def _fill(samples: list[list[str]], pieces: Iterator[list[str]], prompt: str, show: int) -> None:
    """Add the pieces to the samples; show the end of the prompt and the beginning of the first sample."""
    if show:
        print(("... " if len(prompt) > show else "") + prompt[-show:], end="", flush=True)
    n_new = 0
    for texts in pieces:
        # First kept, then shown: what a person has seen is in the file, even after Ctrl-C.
        for sample, text in zip(samples, texts, strict=True):
            sample.append(text)
        print(texts[0][: max(show - n_new, 0)], end="", flush=True)
        n_new += len(texts[0])
    if show:
        print(" ..." if n_new > show else "", flush=True)


def _in_order(prompt: str, samples: list[list[str]]) -> Iterator[str]:
    """The parts of the file."""
    for number, pieces in enumerate(samples):
        yield SEPARATOR if number else ""
        yield prompt
        yield from pieces


def _write(out: Path, parts: Iterable[str]) -> None:
    """Write a file completely or not at all; a link or a device stays what it is."""
    out = out.resolve()
    temporary = out.with_name(out.name + ".tmp") if out.is_file() or not out.exists() else out
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines(parts)
        if temporary != out:
            os.replace(temporary, out)
    except OSError as error:
        raise RunError(f"out = {out} cannot be written: {error.strerror}") from None
    finally:
        if temporary != out:
            with suppress(OSError):
                temporary.unlink()


def _typed(prompt: str, model: TrainedModel) -> str:
    """A prompt from the command line, decoded as UTF-8, whatever the locale is.

    Raises:
        UserError: it is not UTF-8, or it has an escape such as \\n, which would be two characters.
    """
    try:
        prompt = os.fsencode(prompt).decode("utf-8")
    except UnicodeError:
        raise UserError(f"prompt = {prompt!r} is not UTF-8: give the text in a file, --prompt_file") from None
    escape = re.search(r"\\[nrt]", prompt)
    if escape and not _knows(model, "\\"):
        raise UserError(
            f"prompt: {escape[0]} is two characters here, and the model does not know the backslash: for a "
            f"line feed write --prompt $'ROMEO:\\n', or give the text in a file, --prompt_file"
        )
    return prompt


def _knows(model: TrainedModel, text: str) -> bool:
    try:
        model.tokenizer.encode(text)
    except UserError:
        return False
    return True
