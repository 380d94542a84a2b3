"""Models in folders of Hugging Face's transformers: GPT-2, Llama, Qwen3 and Arcee, read and written.

    config.json                        architecture and settings
    model.safetensors                  the parameters; or several files, with model.safetensors.index.json
    tokenizer.json, tokenizer_config.json

Nothing is fetched, and no code in the folder is run.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from safetensors import safe_open
from safetensors.numpy import save

from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.data.tokenizer_json import recognize, to_tokenizer_json
from gpt_jax.data.tokenizers import read_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interchange.families import (
    FAMILIES,
    GPT2,
    Stored,
    assemble,
    family_of,
    our_settings,
    their_arrays,
    their_settings,
)
from gpt_jax.interchange.model_folder import named, read_json
from gpt_jax.model.layers import Params
from gpt_jax.model.params import init_params, name_leaves
from gpt_jax.model.transformer import GPT
from gpt_jax.storage.metadata import Metadata

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, ABOUT = "tokenizer.json", "tokenizer_config.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER, ABOUT)  # that an export writes
KIND = "Hugging Face folder"  # in messages


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder has a model of transformers, or some of its files. (A run has a config.json too.)"""
    names = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    if any((folder / name).exists() for name in names):
        return True
    return (folder / CONFIG).is_file() and '"model_type"' in (folder / CONFIG).read_text(errors="replace")


def read_hugging_face(folder: Path, target_of: Callable[[Metadata], Params]) -> tuple[Metadata, Params]:
    """Read settings, tokenizer and parameters: float32, stacked, in the shapes of `target_of`.

    A `UserError` names the file, and what of it is missing, damaged or not supported.
    """
    with named(folder / CONFIG, KIND) as path:
        theirs = read_json(path)
        architectures = theirs.get("architectures")
        family = next((family for family in FAMILIES if [family.architecture] == architectures), None)
        if family is None:
            known = ", ".join(family.architecture for family in FAMILIES)
            raise UserError(f"architectures = {architectures!r} is not supported, only one of {known}")
        config = our_settings(family, theirs)
    try:
        tokenizer = recognize(read_tokenizer(folder))
    except (UserError, OSError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{KIND}, {folder}: its tokenizer cannot be used: {what}") from None

    def may_lack(name: str) -> bool:
        """Whether a parameter is zero if it is missing: some models have biases in a part of their layers."""
        has_biases = theirs.get("mlp_bias" if "mlp" in name else "attention_bias")
        return family is not GPT2 and name.endswith(".bias") and not has_biases

    with ExitStack() as files:
        stored = _open(folder, files)
        try:
            return assemble(family, config, tokenizer, 0, stored, target_of, may_lack)
        except UserError as error:
            raise UserError(f"{KIND}, {folder}: {error}") from None


def _open(folder: Path, files: ExitStack) -> dict[str, Stored]:
    """The tensors of all files by name; nothing large is read yet."""
    names: list[str] = [WEIGHTS]
    index: Any = {}
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
            found = next(iter(sorted(folder.glob("*.bin"))), None)
            what = f"{found.name} can run code when it is read" if found else f"there is no {WEIGHTS}"
            raise UserError(f"{KIND}, {folder}: {what}: save the model with safe_serialization=True")
        with named(folder / INDEX, KIND) as path:
            index = read_json(path).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
                raise UserError("weight_map must say which file has which tensor")
            names = sorted({Path(name).name for name in index.values()})  # without folders: files of this one
    stored = {}
    for name in names:
        with named(folder / name, KIND) as path:
            file = files.enter_context(safe_open(path, framework="flax"))
            for tensor in file.keys():  # noqa: SIM118
                shape, dtype = file.get_slice(tensor).get_shape(), file.get_slice(tensor).get_dtype()
                stored[tensor] = Stored(name, tuple(shape), dtype, partial(file.get_tensor, tensor))
    if missing := sorted(index.keys() - stored.keys()):
        file = folder / index[missing[0]]
        raise UserError(f"{KIND}, {file}: {missing[0]}, which {INDEX} names, is missing: get the file again")
    return stored


def hugging_face_files(module: GPT, tokenizer: Tokenizer, stored: Params) -> dict[str, bytes]:
    """The files of a model, by name; its parameters are NumPy arrays of one dtype.

    Raises `UserError` if transformers has no such model.
    """
    config, end_id = module.config, tokenizer.end_id
    family, dtype = family_of(config), str(jax.tree.leaves(stored)[0].dtype)
    settings = their_settings(family, config, module.vocab_size) | {
        "dtype": dtype, "torch_dtype": dtype, "bos_token_id": end_id, "eos_token_id": end_id,
    }  # fmt: skip
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if end_id is not None:  # this string in a text is not read as the end
        about |= {"eos_token": tokenizer.decode(np.array([end_id])), "split_special_tokens": True}
    arrays, tensors = name_leaves(stored), dict[str, np.ndarray]()
    like = module.clone(config=replace(config, bias=config.bias or family is GPT2))
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(like, jax.random.key(0))))
    for name, leaf in name_leaves(shapes).items():
        # A GPT-2 has biases: without them here, they are zeros there.
        tensors |= their_arrays(family, name, arrays.get(name, np.zeros(leaf.shape, leaf.dtype)))
    return {
        CONFIG: json.dumps(settings, indent=2).encode(),
        WEIGHTS: save(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()}, {"format": "pt"}
        ),
        TOKENIZER: to_tokenizer_json(tokenizer).encode(),
        ABOUT: json.dumps(about, indent=2).encode(),
    }
