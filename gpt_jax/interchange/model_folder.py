"""A trained model in a folder to share: its arrays as safetensors, all else as JSON. No code.

    params.safetensors   the parameters, float32 or float16, under names like "blocks.mlp.up.kernel"
    model.json           format version, settings, tokenizer, step, loss, data fingerprint, versions, checksum
    README.md            the model card

The layout differs from Hugging Face's, and so do the file names. Folders of format version 1 (which had
model.safetensors, config.json and tokenizer.json) are read too. About safetensors:
https://github.com/huggingface/safetensors.
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
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gpt_jax.config import MeshConfig
from gpt_jax.errors import RunError, UserError
from gpt_jax.files import sync
from gpt_jax.model.layers import Params
from gpt_jax.model.params import abstract_params, count_params, name_leaves, stack_layers, unstack_layers
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.storage.format import FORMAT_VERSION, array_names, current_array_names
from gpt_jax.storage.metadata import Metadata

PARAMS, MODEL, CARD = "params.safetensors", "model.json", "README.md"
FILES = (PARAMS, MODEL, CARD)
PARAMS_1, CONFIG_1, TOKENIZER_1 = "model.safetensors", "config.json", "tokenizer.json"
FILES_1 = (PARAMS_1, CONFIG_1, TOKENIZER_1, CARD)  # of format version 1
DTYPES = {"float32": "F32", "float16": "F16"}  # as safetensors names them
FACTS = ("step", "val_loss", "fingerprint", "versions")
MAX_JSON = 2**24  # bytes; a larger file is not read: a vocabulary of all of Unicode takes less
MAX_HEADER = 2**22  # bytes; a model of a thousand layers takes less


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds an exported model, or some of its files."""
    return any((folder / name).exists() for name in (PARAMS, MODEL, PARAMS_1, TOKENIZER_1))


def check_replaceable(folder: Path) -> None:
    """An exported model may replace another one, and nothing else.

    Raises:
        UserError: `folder` is not a folder, or holds other files.
    """
    if folder.is_dir():
        known = FILES_1 if _is_ours_1(folder) else FILES
        others = sorted({path.name for path in folder.iterdir()} - {*known})
        if others:
            raise UserError(f"out = {folder} holds other files, such as {others[0]}: name a new folder")
    elif folder.exists():
        raise UserError(f"out = {folder} is not a folder: name a new one")


def write_exported(folder: Path, metadata: Metadata, params: Params, card: str) -> None:
    """Write a model, completely or not at all.

    Args:
        folder: a new one, or one that holds an exported model, which is replaced.
        metadata: of the checkpoint.
        params: stacked, all float32 or all float16.
        card: the text of README.md.

    Raises:
        UserError: `folder` holds other files.
        RunError: it cannot be written.
    """
    check_replaceable(folder)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in name_leaves(params).items()}
    model = {
        "format_version": FORMAT_VERSION,
        **{name: getattr(metadata, name) for name in FACTS},
        "sha256": _checksum(arrays),
        "tokenizer": metadata.tokenizer.to_json(),
        "config": metadata.config.to_dict(),
    }
    contents = {
        PARAMS: save(arrays),
        MODEL: (json.dumps(model, indent=1) + "\n").encode(),
        CARD: card.encode(),
    }
    folder = folder.resolve()  # a link stays a link
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
            except BaseException:  # Ctrl-C too: the temporary folder is about to be deleted
                if old.exists() and not folder.exists():
                    old.rename(folder)
                raise
            sync(folder.parent)
    except OSError as error:
        raise RunError(f"out = {folder} cannot be written: {error.strerror}") from None


def read_exported(folder: Path) -> tuple[Metadata, Params]:
    """Read a model. Sizes are checked before anything large is read, and no code in it is run.

    Returns:
        Its metadata, and its parameters: float32, stacked.

    Raises:
        UserError: a file is missing, damaged, or does not fit the others; it is named.
    """
    if _is_version_1(folder):
        return _read_version_1(folder)
    with _named(folder / MODEL) as path:
        model = _read_json(path)
        metadata = Metadata.from_dict(model | {"recent_losses": []})
    target = array_names(_target(metadata, folder / PARAMS), metadata.format_version)
    params = _read_arrays(folder / PARAMS, MODEL, target, model.get("sha256"))
    return metadata, current_array_names(params, metadata.format_version)


def _is_version_1(folder: Path) -> bool:
    new, old = ((folder / name).exists() for name in (PARAMS, PARAMS_1))
    return not new and not (folder / MODEL).exists() and (old or (folder / TOKENIZER_1).exists())


def _is_ours_1(folder: Path) -> bool:
    """Whether it is a whole model of version 1; other programs use the same file names."""
    try:
        return _is_version_1(folder) and _read_header_1(folder) is not None
    except (UserError, OSError, ValueError, RecursionError, SafetensorError):
        return False


def _read_header_1(folder: Path) -> dict[str, Any] | None:
    """What version 1 wrote into the header of its arrays; None where another program wrote them."""
    if not (folder / PARAMS_1).is_file():
        return None
    with _open_arrays(folder / PARAMS_1) as file:
        facts = json.loads((file.metadata() or {}).get("gpt_jax", "null"))
    return facts if isinstance(facts, dict) else None


def _read_version_1(folder: Path) -> tuple[Metadata, Params]:
    """Three files; the step, loss and checksum are in the header of the arrays; the layers are unstacked."""
    with _named(folder / CONFIG_1) as path:
        config = _read_json(path)
    with _named(folder / TOKENIZER_1) as path:
        tokenizer = json.dumps(_read_json(path))
    with _named(folder / PARAMS_1) as path:
        facts = _read_header_1(folder)
        if facts is None:
            raise UserError("its header has no entry 'gpt_jax'")
    with _named(folder / CONFIG_1):
        own = {"config": config, "tokenizer": tokenizer, "recent_losses": []}
        metadata = Metadata.from_dict(facts | own)
    target = jax.eval_shape(unstack_layers, _target(metadata, folder / PARAMS_1))
    params = _read_arrays(
        folder / PARAMS_1, f"{CONFIG_1} and {TOKENIZER_1}", array_names(target, 1), facts.get("sha256")
    )
    return metadata, jax.jit(stack_layers)(current_array_names(params, 1))


def _target(metadata: Metadata, arrays: Path) -> Params:
    """Shapes of the parameters, checked against the size of the file `arrays`, which bounds the memory."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with _named(arrays) as path:
        target = abstract_params(GPT(metadata.config.model, metadata.tokenizer.vocab_size), mesh)
        n_params, n_bytes = count_params(target), path.stat().st_size
        if 2 * n_params > n_bytes:
            raise UserError(f"{n_bytes:,} bytes cannot hold the {n_params:,} parameters of its settings")
    return target


def _read_arrays(path: Path, described_by: str, target: Params, sha256: Any) -> Params:
    with _named(path), _open_arrays(path) as file:
        wanted = name_leaves(target)
        _check_arrays(file, wanted, described_by)
        arrays = {name: file.get_tensor(name) for name in wanted}
        if sha256 != _checksum(arrays):
            raise UserError("its parameters do not match the recorded checksum")
    # NumPy converts them: JAX would compile a program for each shape.
    leaves = jax.device_put([array.astype(np.float32) for array in arrays.values()])
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


@contextmanager
def _open_arrays(path: Path) -> Iterator[Any]:
    with path.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > MAX_HEADER:
        raise UserError(f"a header of {header:,} bytes is more than {MAX_HEADER:,}")
    with safe_open(path, framework="numpy") as file:
        yield file


def _check_arrays(file: Any, wanted: dict[str, Any], described_by: str) -> None:
    found = file.keys()
    for name in [*wanted, *sorted(set(found) - set(wanted))]:
        shape = wanted[name].shape if name in wanted else None
        array = file.get_slice(name) if name in found else None
        there = tuple(array.get_shape()) if array else None
        if there != shape:
            raise UserError(
                f"it does not fit {described_by}: {name} has shape {there or 'none'} there, "
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


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path.stat().st_size:,} bytes are more than {MAX_JSON:,}")
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError("not a JSON object")
    return values


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """Turn whatever is wrong with a file into one line that names it."""
    try:
        if not path.is_file():  # reading a pipe would wait forever
            raise UserError("not a file" if path.exists() else "missing")
        yield path
    except (UserError, OSError, ValueError, RecursionError, OverflowError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        what = textwrap.shorten(str(what), 400)
        raise UserError(f"exported model, {path}: {what or type(error).__name__}") from None
