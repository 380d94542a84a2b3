"""Give a trained model away: `python -m gpt_jax.export --workdir RUN --out artifacts/pretrained`.

The folder takes a few megabytes, can be committed, and is read like a run: `sample.py --workdir`,
`gpt_jax.load`, `gpt_jax.evaluate`. `gpt_jax/exported.py` says what is in it.
"""

import argparse
import math
import runpy
import shlex
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.compilation import compiling_on_stderr, use_compilation_cache
from gpt_jax.config import REPOSITORY, Config, flatten
from gpt_jax.corpus import Corpus
from gpt_jax.errors import UserError, run_main
from gpt_jax.evaluate import corpus_of
from gpt_jax.exported import DTYPES, FILES, MODEL, check_replaceable, write_exported
from gpt_jax.model import Params, compute_dtype
from gpt_jax.params import count_params, name_leaves
from gpt_jax.run import Run, load, newest_run


def export(run: Run, out: Path, dtype: str = "float32") -> Run:
    """Write a model to a folder, with a card whose loss is that of the parameters as they are stored.

    Args:
        run: the model; its text must still be there, for its loss.
        out: a new folder, or one with an exported model, which is replaced.
        dtype: "float32", or "float16" for half the size.

    Returns:
        What was written.

    Raises:
        UserError: the text is gone, `out` holds other things, or a parameter is too large for float16.
        RunError: `out` cannot be written.
    """
    check_replaceable(out)  # before the loss, which takes a while
    corpus = corpus_of(run)
    stored = as_stored(run.params, dtype)
    run = replace(run, params=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stored))
    loss = run.loss(corpus.tokenizer.decode(corpus.val), compiling_on_stderr)
    run = replace(run, metadata=replace(run.metadata, val_loss=loss))
    write_exported(out, run.metadata, stored, model_card(run, corpus, _name(out), dtype))
    return run


def as_stored(params: Params, dtype: str) -> Params:
    """Parameters as NumPy arrays of `dtype`.

    Raises:
        UserError: one of them is not finite there.
    """
    with np.errstate(over="ignore"):
        stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)
    for name, leaf in name_leaves(stored).items():
        if not np.isfinite(leaf).all():
            raise UserError(f"dtype = {dtype!r} cannot hold {name}: use --dtype float32")
    return stored


def model_card(run: Run, corpus: Corpus, name: str, dtype: str) -> str:
    """What the model is, in Markdown, made from the run alone.

    Args:
        run: the model; its `metadata.val_loss` is that of the parameters as they are stored.
        corpus: its text.
        name: of the folder that it lies in.
        dtype: of the stored parameters.
    """
    config, loss = run.config, run.metadata.val_loss
    assert loss is not None
    model, averaged = config.model, f", averaged over steps (EMA {config.optimizer.ema_decay:g})"
    text = _text_name(config) or "tiny Shakespeare (`artifacts/input.txt` of the repository)"
    defaults = flatten(Config())
    settings = [
        f"    {key} = {_public(key, value, config)!r}\n"
        for key, value in flatten(config).items()
        if value != defaults[key]
    ]
    versions = ", ".join(f"{library} {version}" for library, version in sorted(run.metadata.versions.items()))
    return f"""\
# {Path(name).name}

A GPT that writes text character by character, trained by gpt_jax. This folder and this card were written
by `python -m gpt_jax.export`.

| | |
|---|---|
| parameters | {count_params(run.params):,}{averaged if config.optimizer.ema_decay else ""} |
| stored as | {dtype}, computed with in float32 or bfloat16 (`model.dtype`) |
| shape | layers: {model.n_layer}, heads: {model.n_head}, width: {model.d_model}, context: {model.context} |
| loss | {loss:.4f} nats per character ({loss / math.log(2):.4f} bits) |
| step | {run.step:,} of {config.train.steps:,} ({run.source}) |
| trained with | {versions} |

The loss is the mean cross-entropy over the whole validation split, in non-overlapping windows of the
context, each counted once. It was measured on the parameters as they are stored here, in
{np.dtype(compute_dtype(model)).name} on a {jax.default_backend().upper()}.

## Use

    python sample.py --workdir {shlex.quote(name)}
    python -m gpt_jax.evaluate --workdir {shlex.quote(name)}

From Python:

    import gpt_jax
    gpt_jax.load({name!r}).generate(length=500)

## Data

{text}: {len(corpus.train) + len(corpus.val):,} characters, {run.tokenizer.vocab_size} distinct. The first
{len(corpus.train):,} trained, the last {len(corpus.val):,} validate. Fingerprint of text and vocabulary:

    {run.metadata.fingerprint}

## Recipe

    {training_command(config)}

What is not as by default (`config.json` has every setting):

{"".join(settings)}
## Limits

- It knows the {run.tokenizer.vocab_size} characters of its text and no others, and looks back at most
  {model.context} of them.
- It imitates one text. Nothing that it says is to be believed; it may repeat passages of that text; it
  follows no instructions, and nothing filters what it writes.
- The validation split helped to choose the checkpoint, and as a rule the recipe: on another text of the
  same kind expect a higher loss.
"""


def training_command(config: Config) -> str:
    """The command that trains by these settings: the config file nearest to them, and overrides."""
    wanted = flatten(config)
    commands: list[list[str]] = []
    for path in sorted((REPOSITORY / "configs").glob("*.py")):
        with suppress(Exception):  # somebody's unfinished config is no candidate
            there = flatten(Config.from_dict(runpy.run_path(str(path))["get_config"]()))
            overrides = [
                f"--config.{key}={_public(key, value, config)}"
                for key, value in wanted.items()
                if value != there[key]
            ]
            commands.append(["python", "train.py", "--config", f"configs/{path.name}", *overrides])
    nearest = min(commands, key=len)
    return shlex.join(nearest)


def _text_name(config: Config) -> str:
    """The text's name, without where it lies on this machine; empty for tiny Shakespeare."""
    return config.data.file.name if config.data.path else ""


def _public(key: str, value: object, config: Config) -> object:
    return _text_name(config) if key == "data.path" else value


def _name(out: Path) -> str:
    """A folder as whoever has the repository would name it."""
    out = out.resolve()
    return str(out.relative_to(REPOSITORY)) if out.is_relative_to(REPOSITORY) else out.name


def main() -> int:
    """Parse flags, export, say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m gpt_jax.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, help="a run; default: the newest in artifacts/")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="float16: half the size")
    flags = parser.parse_args()
    use_compilation_cache()
    workdir, out = flags.workdir or newest_run(), flags.out.expanduser()
    run = load(workdir, flags.which)
    exported = export(run, out, flags.dtype)
    before = run.metadata.val_loss
    print(f"run        {workdir}, {run.source}, step {run.step:,}")
    print(f"written    {out}/: {', '.join(FILES)}")
    print(f"size       {(out / MODEL).stat().st_size / 1e6:.1f} MB, {flags.dtype}")
    print(
        f"loss       {exported.metadata.val_loss:.5f} nats per character as exported"
        + ("" if before is None else f", {before:.5f} when it was saved")
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
