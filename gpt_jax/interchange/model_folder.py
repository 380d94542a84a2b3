"""A trained model in a folder to share: its arrays as safetensors, all else as JSON. No code.

    params.safetensors   the parameters, float32 or float16, under names like "blocks.mlp.up.kernel"
    model.json           format version, settings, tokenizer, step, loss, data fingerprint, versions, checksum
    README.md            the model card

Layout and names differ from Hugging Face's. About safetensors: https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt_jax.errors import UserError
from gpt_jax.model.layers import Params
from gpt_jax.model.params import count_params, name_leaves
from gpt_jax.storage.integrity import first_difference
from gpt_jax.storage.metadata import Metadata

PARAMS, MODEL, CARD = "params.safetensors", "model.json", "README.md"
FILES = (PARAMS, MODEL, CARD)
DTYPES = {"float32": "F32", "float16": "F16"}  # as safetensors names them
MAX_JSON = 2**24  # bytes; a larger file is not read: a vocabulary of all of Unicode takes less


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds an exported model, or some of its files."""
    return any((folder / name).exists() for name in (PARAMS, MODEL))


def read_exported(folder: Path, target_of: Callable[[Metadata], Params]) -> tuple[Metadata, Params]:
    """Read the metadata of a model, and its parameters: float32, stacked, in the shapes of `target_of`.

    Sizes are checked before anything large is read, and no code in the folder is run. A `UserError` names a
    file that is missing, damaged, or does not fit the others.
    """
    with named(folder / MODEL, "exported model") as path:
        model = read_json(path)
        metadata = Metadata.from_dict(model | {"recent_losses": []})
    with named(folder / PARAMS, "exported model") as path:
        target = target_of(metadata)
        n_params, n_bytes = count_params(target), path.stat().st_size
        if 2 * n_params > n_bytes:
            raise UserError(f"{n_bytes:,} bytes cannot hold the {n_params:,} parameters of its settings")
        arrays = _read_arrays(path, name_leaves(target))
        if model.get("sha256") != checksum(arrays):
            raise UserError("its parameters do not match the recorded checksum")
    # NumPy converts them: JAX would compile a program for each shape.
    leaves = jax.device_put([array.astype(np.float32) for array in arrays.values()])
    return metadata, jax.tree.unflatten(jax.tree.structure(target), leaves)


def _read_arrays(path: Path, wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(array.get_shape()) for name, array in found.items()}
        if difference := first_difference(shapes, {name: leaf.shape for name, leaf in wanted.items()}):
            raise UserError(f"it does not fit {MODEL}: {difference}")
        for name, array in found.items():
            if (dtype := array.get_dtype()) not in DTYPES.values():
                raise UserError(f"{name} is {dtype}, and must be one of {', '.join(DTYPES.values())}")
        return {name: file.get_tensor(name) for name in wanted}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON, which may not be large."""
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path.stat().st_size:,} bytes are more than {MAX_JSON:,}")
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError("not a JSON object")
    return values


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """The SHA-256 of the names and the bytes of arrays, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


@contextmanager
def named(path: Path, kind: str) -> Iterator[Path]:
    """Turn whatever is wrong with a file into one line that names it, and the kind of model."""
    try:
        if not path.is_file():  # reading a pipe would wait forever
            raise UserError("not a file" if path.exists() else "missing: get the folder again")
        yield path
    except (UserError, OSError, ValueError, RecursionError, OverflowError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        what = textwrap.shorten(str(what), 400)
        what += ": get another copy" if isinstance(error, SafetensorError) else ""
        raise UserError(f"{kind}, {path}: {what or type(error).__name__}") from None
