"""Export a trained model: python -m gpt_jax.export --workdir RUN --out exported/my_model

The folder takes a few megabytes and can be committed. It is read like a run: sample.py --workdir,
gpt_jax.load, python -m gpt_jax.evaluate. `interchange/model_folder.py` describes its files.
"""

import runpy
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.evaluate import corpus_of
from gpt_jax.commands.paths import CHECKOUT, newest_run, relative_to_root
from gpt_jax.config import Config, flatten
from gpt_jax.errors import UserError
from gpt_jax.interchange.model_card import model_card, public_value
from gpt_jax.interchange.model_folder import DTYPES, FILES, PARAMS, check_replaceable, write_exported
from gpt_jax.interchange.trained_model import TrainedModel, load
from gpt_jax.model.layers import Params
from gpt_jax.model.params import name_leaves
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache


def export(model: TrainedModel, out: Path, dtype: str = "float32", text: Path | None = None) -> TrainedModel:
    """Write a model to a folder, with a card whose loss is that of the parameters as they are stored.

    Args:
        model: the model.
        out: a new folder, or one with an exported model, which is replaced.
        dtype: "float32", or "float16" for half the size.
        text: where the text is that it was trained on, for the loss; None: where training read it.

    Returns:
        What was written.

    Raises:
        UserError: the text is gone or another one, `out` holds other files, or a parameter is too large for
            float16.
        RunError: `out` cannot be written.
    """
    check_replaceable(out)  # before the loss, which takes a while
    corpus = corpus_of(model, text)
    model = _with_its_length(model)
    stored = as_stored(model.params, dtype)
    model = replace(model, params=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stored))
    loss = model.loss_of_tokens(corpus.val, compiling_on_stderr)
    model = replace(model, metadata=replace(model.metadata, val_loss=loss))
    card = model_card(model, corpus, _name(out), dtype, training_command(model.config))
    write_exported(out, model.metadata, stored, card)
    return model


def _with_its_length(model: TrainedModel) -> TrainedModel:
    """The model of a run whose length `--minutes` chose, as if its settings had named that length."""
    steps = model.metadata.total_steps
    if steps is None:
        return model
    config = replace(model.config, train=replace(model.config.train, steps=steps))
    metadata = replace(model.metadata, config=config, total_steps=None)
    return replace(model, config=config, metadata=metadata)


def as_stored(params: Params, dtype: str) -> Params:
    """Parameters as NumPy arrays of `dtype`.

    Raises:
        UserError: one of them is not finite there.
    """
    with np.errstate(over="ignore"):
        stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)
    for name, leaf in name_leaves(stored).items():
        if not np.isfinite(leaf).all():
            raise UserError(f"dtype = {dtype!r} is too small for {name}: use --dtype float32")
    return stored


def training_command(config: Config) -> str | None:
    """The command that trains with these settings: the nearest config file, and overrides.

    None without the repository, where there are no config files.
    """
    wanted = flatten(config)
    nearest: tuple[str, list[str]] | None = None
    for path in sorted(CHECKOUT.glob("configs/*.py")) if CHECKOUT else []:
        with suppress(Exception):  # ignore a config file that is broken
            there = flatten(Config.from_dict(runpy.run_path(str(path))["get_config"]()))
            overrides = [
                f"--config.{key}={public_value(key, value, config)}"
                for key, value in wanted.items()
                if value != there[key]
            ]
            if nearest is None or len(overrides) < len(nearest[1]):
                nearest = f"configs/{path.name}", overrides
    return nearest and shlex.join(["python", "train.py", "--config", nearest[0], *nearest[1]])


def _name(out: Path) -> str:
    """A folder, relative to the repository if it lies there."""
    path = relative_to_root(out.resolve())
    return path.name if path.is_absolute() else str(path)


def main() -> int:
    """Parse the flags, export, print."""
    parser = ArgumentParser(prog="python -m gpt_jax.export", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a run; default: the newest in artifacts/")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="float16: half the size")
    parser.add_argument("--text", type=Path, help="the text that it was trained on, if it has moved")
    flags = parser.parse_args()
    use_compilation_cache()
    workdir, out = flags.workdir or newest_run(), flags.out.expanduser()
    model = load(workdir, flags.which)
    exported = export(model, out, flags.dtype, flags.text)
    before = model.metadata.val_loss
    print(f"run        {workdir}, {model.source}, step {model.step:,}")
    print(f"written    {out}/: {', '.join(FILES)}")
    print(f"size       {(out / PARAMS).stat().st_size / 1e6:.1f} MB, {flags.dtype}")
    print(
        f"loss       {exported.metadata.val_loss:.5f} nats per token as exported"
        + ("" if before is None else f", {before:.5f} when it was saved")
    )
    return 0
