"""Export a trained model: a folder of a few megabytes, described in `model_folder.py`, with a model card."""

import json
import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from gpt_jax.config import Config, flatten
from gpt_jax.data.documents import Progress, no_progress
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.data.tokens import Corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.files import sync
from gpt_jax.interchange import hugging_face, llama2c
from gpt_jax.interchange.evaluation import corpus_of
from gpt_jax.interchange.hugging_face import hugging_face_files
from gpt_jax.interchange.llama2c import llama2c_files
from gpt_jax.interchange.model_folder import CARD, FILES, MODEL, PARAMS, checksum
from gpt_jax.interchange.trained_model import TrainedModel
from gpt_jax.model.layers import Params
from gpt_jax.model.params import count_params, name_leaves
from gpt_jax.parallel.devices import first_device
from gpt_jax.paths import relative_to_root
from gpt_jax.storage.metadata import FORMAT_VERSION

ELSEWHERE = {"hf": hugging_face.FILES, "llama2c": llama2c.FILES}  # kinds of folders for other programs
JSON_KEYS = ("format_version", "step", "val_loss", "fingerprint", "versions", "parent", "sha256", "tokenizer",
             "config")  # fmt: skip


def export(
    model: TrainedModel,
    out: Path,
    dtype: str = "float32",
    text: Path | None = None,
    progress: Progress = no_progress,
) -> TrainedModel:
    """Write a model to a folder, with the loss of the parameters as they are stored; return what was written.

    The folder is a new one, or has an exported model, which is replaced. "float16" halves the size. `text` is
    where the text of the training is now; None: where training read it.

    Raises:
        UserError: the text is gone or another one, `out` holds other files, or a parameter is too large for
            float16.
        RunError: `out` cannot be written.
    """
    _check_out(out, FILES)
    corpus = corpus_of(model, text, progress)
    metadata, config = model.metadata, model.config
    if metadata.total_steps is not None:  # chosen by `--minutes`: as if the settings had named it
        config = replace(config, train=replace(config.train, steps=metadata.total_steps))
    stored = as_stored(model.params, dtype)
    # Placed as they were: the loss needs no other program.
    params = jax.tree.map(
        lambda leaf, old: jax.device_put(jnp.float32(leaf), old.sharding), stored, model.params
    )
    model = replace(model, params=params)
    loss = model.loss(corpus.val)
    model = replace(model, metadata=replace(metadata, config=config, total_steps=None, val_loss=loss))
    path = relative_to_root(out.resolve())
    card = _model_card(model, corpus, path.name if path.is_absolute() else str(path), dtype)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in name_leaves(stored).items()}
    values = model.metadata.to_dict() | {"format_version": FORMAT_VERSION, "sha256": checksum(arrays)}
    facts = json.dumps({name: values[name] for name in JSON_KEYS}, indent=1) + "\n"
    _write(out, {PARAMS: save(arrays), MODEL: facts.encode(), CARD: card.encode()})
    return model


def export_elsewhere(model: TrainedModel, out: Path, kind: str, dtype: str = "float32") -> tuple[str, ...]:
    """Write a model for other programs, `kind` is one of `ELSEWHERE`; return the names of the files.

    Raises:
        UserError: they have no such model, `out` holds other files, or a parameter is too large for `dtype`.
        RunError: `out` cannot be written.
    """
    files = ELSEWHERE[kind]
    _check_out(out, files)
    stored = as_stored(model.params, dtype)
    if kind == "hf":
        contents = hugging_face_files(model.module, model.tokenizer, stored)
    else:
        contents = llama2c_files(model.config.model, model.tokenizer, stored)
    _write(out, contents)
    return files


def _check_out(out: Path, files: Sequence[str]) -> None:
    """Raise a `UserError` if a folder holds other files than those that are written."""
    if out.is_dir():
        if others := sorted({path.name for path in out.iterdir()} - {*files}):
            raise UserError(f"out = {out} holds other files, such as {others[0]}: name a new folder")
    elif out.exists():
        raise UserError(f"out = {out} is not a folder: name a new one")


def as_stored(params: Params, dtype: str) -> Params:
    """Parameters as NumPy arrays of `dtype`; raises `UserError` if one of them is not finite there."""
    with np.errstate(over="ignore"):
        stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params)
    for name, leaf in name_leaves(stored).items():
        if not np.isfinite(leaf.astype(np.float32)).all():
            raise UserError(f"dtype = {dtype!r} is too small for {name}: use --dtype float32")
    return stored


def _model_card(model: TrainedModel, corpus: Corpus, name: str, dtype: str) -> str:
    """What a model is, in Markdown; it is stored in a folder `name`, its parameters as `dtype`."""
    config, loss = model.config, model.metadata.val_loss
    assert loss is not None
    is_char = isinstance(model.tokenizer, CharTokenizer)
    tokens, vocab_size = "characters" if is_char else "tokens", model.tokenizer.vocab_size
    size = f"{corpus.n_characters:,} characters" if corpus.n_characters else "token files"
    shape, folder = config.model, shlex.quote(name)
    # Without the folders of this machine.
    text, parent = Path(config.data.path).name, Path(config.init_from).name
    settings, defaults = flatten(config) | {"data.path": text, "init_from": parent}, flatten(Config())
    changed = [f"    {key} = {value!r}\n" for key, value in settings.items() if value != defaults[key]]
    versions = ", ".join(map(" ".join, sorted(model.metadata.versions.items())))
    return f"""\
# {Path(name).name}

A GPT that writes text {"character by character" if is_char else "token by token"}, trained by gpt_jax. This
folder and this card were written by `python -m gpt_jax export`.

| | |
|---|---|
| parameters | {count_params(model.params):,} |
| stored as | {dtype}, computed with in float32 or bfloat16 (`model.dtype`) |
| shape | layers: {shape.n_layer}, heads: {shape.n_head}, width: {shape.d_model}, context: {shape.context} |
| loss | {loss:.4f} nats per token ({loss / math.log(2):.4f} bits) |
| step | {model.step:,} of {config.train.steps:,} ({model.source}) |
| started from | {parent or "random parameters"} |
| trained with | {versions} |

The loss is the mean cross-entropy over the whole validation split, in non-overlapping windows of the
context, each counted once. It was measured on the parameters as they are stored here, in
{model.plan.execution.dtype} on a {first_device(model.plan.mesh)[0].upper()}.

## Use

    python -m gpt_jax sample --workdir {folder}
    python -m gpt_jax evaluate --workdir {folder}

From Python:

    import gpt_jax
    gpt_jax.load({name!r}).generate(length=500)

## Data

{text or "tiny Shakespeare"}: {size}, vocabulary of {vocab_size:,}, split {corpus.split}.
Training split: the first {len(corpus.train):,} tokens. Validation split: the last {len(corpus.val):,}.
Fingerprint of text and tokenizer:

    {model.metadata.fingerprint}

## Settings

All settings are in `model.json`. This trains with them:

    python -m gpt_jax train --config {folder}/model.json

Those that differ from the defaults:

{"".join(changed)}
## Limits

- It knows {vocab_size} {tokens} and no others, and looks back at most {shape.context}.
- It imitates one text. Do not rely on what it writes: it may repeat passages of that text, it follows no
  instructions, and nothing filters its output.
- The validation split was used to choose the checkpoint, and often the recipe: on another text of the same
  kind expect a higher loss.
"""


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    """Write all files or none: a new folder is renamed into place, or the old one back."""
    folder = folder.resolve()  # a link stays a link
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            for name, content in contents.items():
                (new / name).write_bytes(content)
                sync(new / name)
            try:
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
            except BaseException:  # Ctrl-C too: the temporary folder is about to be deleted
                if old.exists() and not folder.exists():
                    old.rename(folder)
                raise
            sync(folder.parent)
    except OSError as error:
        raise RunError(f"out = {folder} cannot be written: {error.strerror}") from None
