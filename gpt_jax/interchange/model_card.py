"""The model card: what an exported model is, in Markdown."""

import math
import shlex
from pathlib import Path

import jax
import numpy as np

from gpt_jax.config import Config, flatten
from gpt_jax.data.corpus import Corpus
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.interchange.trained_model import TrainedModel
from gpt_jax.model.layers import compute_dtype
from gpt_jax.model.params import count_params


def model_card(model: TrainedModel, corpus: Corpus, name: str, dtype: str, command: str | None) -> str:
    """The card, made from the model alone.

    Args:
        model: its `metadata.val_loss` is that of the parameters as they are stored.
        corpus: its text.
        name: of the folder that it is in.
        dtype: of the stored parameters.
        command: that trains such a model; None: there is none to show.
    """
    config, loss = model.config, model.metadata.val_loss
    assert loss is not None
    is_char = isinstance(model.tokenizer, CharTokenizer)
    tokens = "characters" if is_char else "tokens"
    shape, ema = config.model, f", EMA over steps (decay {config.optimizer.ema_decay:g})"
    text = text_name(config) or "tiny Shakespeare"
    recipe = f"    {command}\n\n" if command else ""
    defaults = flatten(Config())
    settings = [
        f"    {key} = {public_value(key, value, config)!r}\n"
        for key, value in flatten(config).items()
        if value != defaults[key]
    ]
    versions = ", ".join(
        f"{library} {version}" for library, version in sorted(model.metadata.versions.items())
    )
    return f"""\
# {Path(name).name}

A GPT that writes text {"character by character" if is_char else "token by token"}, trained by gpt_jax. This
folder and this card were written by `python -m gpt_jax.export`.

| | |
|---|---|
| parameters | {count_params(model.params):,}{ema if config.optimizer.ema_decay else ""} |
| stored as | {dtype}, computed with in float32 or bfloat16 (`model.dtype`) |
| shape | layers: {shape.n_layer}, heads: {shape.n_head}, width: {shape.d_model}, context: {shape.context} |
| loss | {loss:.4f} nats per token ({loss / math.log(2):.4f} bits) |
| step | {model.step:,} of {config.train.steps:,} ({model.source}) |
| trained with | {versions} |

The loss is the mean cross-entropy over the whole validation split, in non-overlapping windows of the
context, each counted once. It was measured on the parameters as they are stored here, in
{np.dtype(compute_dtype(shape)).name} on a {jax.default_backend().upper()}.

## Use

    python -m gpt_jax.sample --workdir {shlex.quote(name)}
    python -m gpt_jax.evaluate --workdir {shlex.quote(name)}

From Python:

    import gpt_jax
    gpt_jax.load({name!r}).generate(length=500)

## Data

{text}: {corpus.n_characters:,} characters, vocabulary of {model.tokenizer.vocab_size}. The first
{len(corpus.train):,} tokens trained, the last {len(corpus.val):,} validate. Fingerprint of text and
tokenizer:

    {model.metadata.fingerprint}

## Recipe

{recipe}Settings that differ from the defaults (`model.json` has all of them):

{"".join(settings)}
## Limits

- It knows {model.tokenizer.vocab_size} {tokens} and no others, and looks back at most {shape.context}.
- It imitates one text. Do not rely on what it writes: it may repeat passages of that text, it follows no
  instructions, and nothing filters its output.
- The validation split was used to choose the checkpoint, and often the recipe: on another text of the same
  kind expect a higher loss.
"""


def text_name(config: Config) -> str:
    """The name of the text file without its folders; empty for tiny Shakespeare."""
    return Path(config.data.path).name


def public_value(key: str, value: object, config: Config) -> object:
    """The value of a setting, without the folders of this machine."""
    return text_name(config) if key == "data.path" else value
