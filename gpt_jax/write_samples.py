"""What `sample.py` does: find a run, write text, show it while it grows."""

import os
import sys
import time
from itertools import chain
from pathlib import Path

from gpt_jax.compilation import compiling_on_stderr
from gpt_jax.corpus import read_text
from gpt_jax.errors import RunError, UserError
from gpt_jax.run import load, newest_run
from gpt_jax.sampling import SamplingRules

SEPARATOR = "\n" + "-" * 20 + "\n"


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
        workdir: a run or an exported model; None takes what `gpt_jax.run.newest_run` finds.
        which: "best" or "last" checkpoint.
        prompt: what to continue; it begins each sample in the file.
        prompt_file: a UTF-8 file to take the prompt from instead.
        length: new characters in each sample.
        rules: how characters are drawn.
        num_samples: how many, generated side by side.
        seed: the same seed gives the same text.
        window: "half" or "exact", see `gpt_jax.sampler`.
        show: characters of the first sample to show.
        out: the file, written whole at the end.

    Raises:
        UserError: an argument out of its range, unknown characters, no trained run, or a folder as `out`.
    """
    workdir = newest_run() if workdir is None else workdir
    run = load(workdir, which)
    if prompt_file is not None:
        prompt, _ = read_text(prompt_file)
    else:
        prompt = _as_utf8(prompt)
    pieces = run.stream(prompt, length, rules, num_samples=num_samples, seed=seed, window=window)
    if out.is_dir():
        raise UserError(f"out = {out} is a folder: name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)

    print(f"{workdir}, {run.source}, step {run.step:,}", file=sys.stderr)
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
            # First kept, then shown: what a person has seen is in the file, whenever Ctrl-C comes.
            for sample, text in zip(grown, texts, strict=True):
                sample.append(text)
            print(texts[0][:to_show], end="", flush=True)
            to_show = max(to_show - len(texts[0]), 0)
    except KeyboardInterrupt:
        stopped = True  # what there is gets written
    seconds = max(time.monotonic() - begun, 1e-9)
    print("" if length <= show else " ...", flush=True)
    samples = ["".join(sample) for sample in grown]

    _write(out, SEPARATOR.join(samples))
    count = sum(map(len, samples)) - num_samples * len(prompt)
    print(
        f"{count:,} characters in {seconds:.1f} s ({count / seconds:,.0f} a second, compilation "
        f"counted), written to {out}",
        file=sys.stderr,
    )
    if stopped:
        raise KeyboardInterrupt


def _write(out: Path, text: str) -> None:
    """Write a file whole or not at all; a link or a device stays what it is."""
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
    """A command-line argument as its bytes mean it, whatever the locale made of them."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise UserError(
            f"prompt = {argument!r} is not UTF-8: give the text in a file, --prompt_file"
        ) from None
