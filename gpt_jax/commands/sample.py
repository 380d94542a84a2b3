"""Write text with a trained model: python sample.py --length 10000"""

import argparse
import os
import sys
import time
from itertools import chain
from pathlib import Path

from gpt_jax.commands.paths import ARTIFACTS, newest_run
from gpt_jax.data.corpus import read_text
from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import load
from gpt_jax.sampling.generate import WINDOWS
from gpt_jax.sampling.rules import SamplingRules, make_rules
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache

SEPARATOR = "\n" + "-" * 20 + "\n"


def main() -> None:
    """Parse the flags and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
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
        show: characters of the first sample to show.
        out: the file, written completely at the end.

    Raises:
        UserError: an argument out of its range, unknown characters, no trained run, or a folder as `out`.
    """
    workdir = newest_run() if workdir is None else workdir
    model = load(workdir, which)
    if prompt_file is not None:
        prompt, _ = read_text(prompt_file)
    else:
        prompt = _as_utf8(prompt)
    pieces = model.stream(prompt, length, rules, num_samples=num_samples, seed=seed, window=window)
    if out.is_dir():
        raise UserError(f"out = {out} is a folder: name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)

    print(f"{workdir}, {model.source}, step {model.step:,}", file=sys.stderr)
    grown: list[list[str]] = [[prompt] for _ in range(num_samples)]
    to_show = max(show, 0)
    begun = time.monotonic()
    stopped = False
    try:
        first = []
        if length:
            with compiling_on_stderr("sampling"):
                first.append(next(pieces))
        print(prompt, end="", flush=True)
        for texts in chain(first, pieces):
            # First kept, then shown: what a person has seen is in the file, even after Ctrl-C.
            for sample, text in zip(grown, texts, strict=True):
                sample.append(text)
            print(texts[0][:to_show], end="", flush=True)
            to_show = max(to_show - len(texts[0]), 0)
    except KeyboardInterrupt:
        stopped = True  # what there is gets written
    seconds = max(time.monotonic() - begun, 1e-9)
    samples = ["".join(sample) for sample in grown]
    print(" ..." if len(samples[0]) - len(prompt) > show else "", flush=True)

    _write(out, SEPARATOR.join(samples))
    count = sum(map(len, samples)) - num_samples * len(prompt)
    print(
        f"{count:,} characters in {seconds:.1f} s ({count / seconds:,.0f} a second, with compilation), "
        f"written to {out}",
        file=sys.stderr,
    )
    if stopped:
        raise KeyboardInterrupt


def _write(out: Path, text: str) -> None:
    """Write a file completely or not at all; a link or a device stays what it is."""
    out = out.resolve()
    temporary = out.with_name(out.name + ".tmp") if out.is_file() or not out.exists() else out
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        if temporary != out:
            os.replace(temporary, out)
    except OSError as error:
        if temporary != out:
            temporary.unlink(missing_ok=True)
        raise RunError(f"out = {out} cannot be written: {error.strerror}") from None


def _as_utf8(argument: str) -> str:
    """A command-line argument decoded as UTF-8, whatever the locale is."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise UserError(
            f"prompt = {argument!r} is not UTF-8: give the text in a file, --prompt_file"
        ) from None
