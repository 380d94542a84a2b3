"""A trained model in a folder to give away: its arrays as safetensors, all else as JSON. No code.

    model.safetensors   the parameters, float32 or float16, under names like "block_0.mlp.up.kernel";
                        in its header step, validation loss, data fingerprint, versions, and a checksum
    config.json         the settings of the run
    tokenizer.json      the vocabulary
    README.md           the model card

The format of safetensors: https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gpt_jax.config import Config, MeshConfig
from gpt_jax.errors import RunError, UserError
from gpt_jax.integrity import sync
from gpt_jax.metadata import Metadata
from gpt_jax.model import GPT, Params
from gpt_jax.params import abstract_params, count_params, name_leaves, unstack_layers
from gpt_jax.sharding import make_mesh
from gpt_jax.tokenizer import CharTokenizer

MODEL, CONFIG, TOKENIZER, CARD = FILES = ("model.safetensors", "config.json", "tokenizer.json", "README.md")
DTYPES = {"float32": "F32", "float16": "F16"}  # as safetensors names them
# The header has one entry of our own: the format keeps no order of several, and equal models should make
# equal files.
ENTRY = "gpt_jax"
FACTS = ("step", "val_loss", "fingerprint", "versions")
MOST_JSON = 2**24  # bytes of a file; more is not read: a vocabulary of all of Unicode takes less
MOST_HEADER = 2**22  # bytes; a model of a thousand layers takes less


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds an exported model, or what is left of one."""
    return any((folder / name).exists() for name in (MODEL, TOKENIZER))


def check_replaceable(folder: Path) -> None:
    """An exported model may take the place of another one, and of nothing else.

    Raises:
        UserError: `folder` is not a folder, or holds other things.
    """
    if folder.is_dir():
        others = sorted({path.name for path in folder.iterdir()} - {*FILES})
        if others:
            raise UserError(f"out = {folder} holds other things, such as {others[0]}: name a new folder")
    elif folder.exists():
        raise UserError(f"out = {folder} is not a folder: name a new one")


def write_exported(folder: Path, metadata: Metadata, params: Params, card: str) -> None:
    """Write a model, whole or not at all.

    Args:
        folder: a new one, or one that holds an exported model, which is replaced.
        metadata: what the checkpoint said.
        params: one tree a layer, all float32 or all float16.
        card: the text of README.md.

    Raises:
        UserError: `folder` holds other things.
        RunError: it cannot be written.
    """
    check_replaceable(folder)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in name_leaves(params).items()}
    facts = {name: getattr(metadata, name) for name in FACTS} | {"sha256": _checksum(arrays)}
    contents = {
        MODEL: save(arrays, {ENTRY: json.dumps(facts)}),
        CONFIG: metadata.config.to_json().encode(),
        TOKENIZER: (metadata.tokenizer.to_json() + "\n").encode(),
        CARD: card.encode(),
    }
    folder = folder.resolve()  # a link stays what it is
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            for name, content in contents.items():
                (new / name).write_bytes(content)
                sync(new / name)
            old = Path(temporary, "old")
            try:
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
            except BaseException:  # Ctrl-C too: what `temporary` holds is about to be deleted
                if old.exists() and not folder.exists():
                    old.rename(folder)
                raise
            sync(folder.parent)
    except OSError as error:
        raise RunError(f"out = {folder} cannot be written: {error.strerror}") from None


def read_exported(folder: Path) -> tuple[Metadata, Params]:
    """Read a model. What takes memory is checked before it is read; nothing in it is run.

    Returns:
        What its checkpoint said, and its parameters: float32, one tree a layer.

    Raises:
        UserError: a file is missing, damaged, or does not fit the others; it is named.
    """
    with _named(folder / CONFIG) as path:
        config = Config.from_json(_read(path))
    with _named(folder / TOKENIZER) as path:
        tokenizer = CharTokenizer.from_json(_read(path))
    with _named(folder / MODEL) as path, path.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
        if header > MOST_HEADER:
            raise UserError(f"a header of {header:,} bytes is more than {MOST_HEADER:,}")
        target = _target(config, tokenizer.vocab_size, n_bytes=path.stat().st_size)
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get(ENTRY, "null"))
            if not isinstance(facts, dict):
                raise UserError("it has no facts of gpt_jax in its header")
            own = {"config": config.to_dict(), "tokenizer": tokenizer.to_json(), "recent_losses": []}
            metadata = Metadata.from_dict(facts | own)
            _check_arrays(file, name_leaves(target))
            arrays = {name: file.get_tensor(name) for name in name_leaves(target)}
        if facts.get("sha256") != _checksum(arrays):
            raise UserError("its parameters are not those that were written")
    leaves = [jnp.asarray(array, jnp.float32) for array in arrays.values()]
    return metadata, jax.tree.unflatten(jax.tree.structure(target), leaves)


def _target(config: Config, vocab_size: int, n_bytes: int) -> Params:
    """Shapes of the parameters, one tree a layer; refused where `n_bytes` cannot hold them."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    stacked = abstract_params(GPT(config.model, vocab_size), mesh)
    n_params = count_params(stacked)  # first: there may be no end of layers
    if 2 * n_params > n_bytes:
        raise UserError(f"{n_bytes:,} bytes cannot hold the {n_params:,} parameters of {CONFIG}")
    return jax.eval_shape(unstack_layers, stacked)


def _check_arrays(file: Any, wanted: dict[str, Any]) -> None:
    found = file.keys()
    for name in [*wanted, *sorted(set(found) - set(wanted))]:
        shape = wanted[name].shape if name in wanted else None
        array = file.get_slice(name) if name in found else None
        there = tuple(array.get_shape()) if array else None
        if there != shape:
            raise UserError(
                f"it does not fit {CONFIG} and {TOKENIZER}: {name} has shape {there or 'none'} there, "
                f"{shape or 'none'} in the model"
            )
        if array and array.get_dtype() not in DTYPES.values():
            raise UserError(f"{name} is {array.get_dtype()}, and must be one of {', '.join(DTYPES.values())}")


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


def _read(path: Path) -> str:
    if path.stat().st_size > MOST_JSON:
        raise UserError(f"{path.stat().st_size:,} bytes are more than {MOST_JSON:,}")
    return path.read_text(encoding="utf-8")


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """Whatever is wrong with a file, in one line that names it."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise UserError("not a file" if path.exists() else "missing")
        yield path
    except (UserError, OSError, ValueError, RecursionError, OverflowError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        what = textwrap.shorten(str(what), 400)
        raise UserError(f"exported model, {path}: {what or type(error).__name__}") from None
