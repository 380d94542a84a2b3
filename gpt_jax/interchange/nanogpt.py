"""Read a checkpoint of nanoGPT: `ckpt.pt`, with the `meta.pkl` of its text beside it, or else of GPT-2.

PyTorch reads it, without running the code that a pickle can contain. Source: github.com/karpathy/nanoGPT.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpt_jax.data.token_files import META, read_meta
from gpt_jax.data.tokenizers import make_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interchange.families import DTYPES, NANOGPT, Stored, assemble, our_settings
from gpt_jax.interchange.model_folder import named
from gpt_jax.model.layers import Params
from gpt_jax.storage.metadata import Metadata

CHECKPOINT = "ckpt.pt"
KIND = "nanoGPT"  # in messages
N_GPT2 = 50_257  # tokens of GPT-2


def is_nanogpt(folder: Path) -> bool:
    """Whether a folder has a checkpoint of nanoGPT."""
    return (folder / CHECKPOINT).exists()


def read_nanogpt(folder: Path, target_of: Callable[[Metadata], Params]) -> tuple[Metadata, Params]:
    """Read settings, tokenizer and parameters: float32, stacked, in the shapes of `target_of`.

    A `UserError` names the file, and what is wrong with it.
    """
    with named(folder / CHECKPOINT, KIND) as path:
        try:
            torch = importlib.import_module("torch")
        except ImportError:
            raise UserError("reading it needs PyTorch, which is missing: pip install torch") from None
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            settings, step = dict(checkpoint["model_args"]), int(checkpoint.get("iter_num", 0))
            tensors = checkpoint["model"].items()
            stored = {name.removeprefix("_orig_mod."): _stored(tensor) for name, tensor in tensors}
        except Exception as error:  # PyTorch has no type of its own
            raise UserError(f"it is no checkpoint of nanoGPT ({type(error).__name__}: {error})") from None
        config = our_settings(NANOGPT, settings)
        if not (folder / META).is_file() and config.vocab_size < N_GPT2:
            raise UserError(f"{META} is missing beside it: copy it there from nanoGPT's folder of the text")
    tokenizer = read_meta(folder / META) or make_tokenizer("gpt2", lambda: iter(()))
    try:
        return assemble(NANOGPT, config, tokenizer, step, stored, target_of)
    except UserError as error:
        raise UserError(f"{KIND}, {folder}: {error}") from None


def _stored(tensor: Any) -> Stored:
    dtype = str(tensor.dtype).removeprefix("torch.")
    read: Any = partial(lambda tensor: tensor.float().numpy(), tensor)
    return Stored(CHECKPOINT, tuple(tensor.shape), DTYPES.get(dtype, dtype), read)
