"""Write a model like Llama for llama2.c, a program in C, and its relatives: `model.bin` and `tokenizer.bin`.

Source: github.com/karpathy/llama2.c, run.c. A text begins there with the token 1, and ends before the next.
"""

import struct

import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.data.bpe import ByteTokenizer
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.errors import UserError
from gpt_jax.interchange.families import LLAMA, foreign_settings
from gpt_jax.model.layers import Params

MODEL, TOKENIZER = "model.bin", "tokenizer.bin"
FILES = (MODEL, TOKENIZER)
# What run.c has in its code.
REQUIRED = {"bias": False, "norm_eps": 1e-5, "rope_base": 10_000.0}


def llama2c_files(config: ModelConfig, tokenizer: Tokenizer, params: Params) -> dict[str, bytes]:
    """The two files, by name; the parameters are float32 NumPy arrays. UserError: run.c has no such model."""
    has = {name: getattr(config, name) for name in REQUIRED} | {"d_head": config.head_width}
    foreign = [*foreign_settings(LLAMA, config)]
    for name, value in (REQUIRED | {"d_head": config.d_model // config.n_head}).items():
        foreign += [f"model.{name} = {has[name]!r}, only {value!r}"] if has[name] != value else []
    if foreign:
        raise UserError(f"llama2.c does not have {', '.join(foreign)}")
    if not isinstance(tokenizer, CharTokenizer | ByteTokenizer):
        raise UserError(f"a model for llama2.c needs tokens char, byte, gpt2 or bpe:N, not {tokenizer.name}")
    rows, unlikely, pieces = _vocabulary(tokenizer)
    embedding = params["token_embedding"]["embedding"]
    head = embedding if config.tied_embedding else params["head"]["kernel"].T
    mean = head[: tokenizer.vocab_size].mean(axis=0)
    embedding, head = embedding[rows], head[rows]
    head[unlikely] = mean  # a logit that is never the largest
    n_layer, n_model, width = config.n_layer, config.d_model, config.head_width
    blocks = params["blocks"]
    attention, mlp = blocks["attention"], blocks["mlp"]
    if config.n_groups > 1:
        qkv = (attention["q"]["kernel"], *np.moveaxis(attention["kv"]["kernel"], 2, 0))
    else:
        qkv = tuple(np.moveaxis(attention["qkv"]["kernel"], 2, 0))
    gate, up = np.moveaxis(mlp["up"]["kernel"], 2, 0)
    # RoPE rotates channels i and i + K/2 here, and 2i and 2i + 1 there.
    order = np.arange(width).reshape(2, -1).T.reshape(-1)
    kernels = (qkv[0][..., order], qkv[1][..., order], qkv[2], attention["out"]["kernel"])
    n_in = config.n_head * width
    shapes = [(n_layer, n, -1) for n in (n_model, n_model, n_model, n_in)]
    wqkvo = [kernel.reshape(shape).swapaxes(1, 2) for kernel, shape in zip(kernels, shapes, strict=True)]
    arrays = [
        embedding, blocks["attention_norm"]["scale"], *wqkvo, blocks["mlp_norm"]["scale"],
        *(kernel.swapaxes(1, 2) for kernel in (gate, mlp["down"]["kernel"], up)),
        params["final_norm"]["scale"],
        np.zeros(config.context * width),  # not read any more
        head,
    ]  # fmt: skip
    n_kv, n_rows = config.n_head // config.n_groups, -len(embedding)  # below 0: there is a head
    header = (n_model, config.mlp_width, n_layer, config.n_head, n_kv, n_rows, config.context)
    weights = [np.ascontiguousarray(array, "<f4").tobytes() for array in arrays]
    # The lower an id, the earlier its two parts are joined.
    entries = [struct.pack("<fi", -float(i), len(piece)) + piece for i, piece in enumerate(pieces)]
    longest = struct.pack("<i", max(map(len, pieces)))
    return {
        MODEL: struct.pack("<7i", *header) + b"".join(weights), TOKENIZER: longest + b"".join(entries),
    }  # fmt: skip


def _vocabulary(tokenizer: CharTokenizer | ByteTokenizer) -> tuple[list[int], list[int], list[bytes]]:
    """The ids of run.c: the token here that each is read as, those never to be drawn, the bytes of each.

    Its id 1 is end of text, and byte b of a character that is no token has the id b + 3. A vocabulary of
    characters has no end of text: it is read as the character that stands for an empty prompt.
    """
    if isinstance(tokenizer, CharTokenizer):
        if " " not in tokenizer.characters:
            raise UserError("llama2.c begins each prompt with a space, which is not in the vocabulary")
        first, *others = [character.encode() for character in tokenizer.characters]
        return [0, tokenizer.start_id, *range(1, tokenizer.vocab_size)], [1], [first, b"<s>", *others]
    end, tokens = tokenizer.end_id, tokenizer.tokens
    ids = [
        *sorted(range(256), key=tokens.__getitem__),
        *range(256, end),
    ]  # GPT-2 has the bytes in another order
    return [end, end, end, *ids], [0, 2], [b"<unk>", b"<s>", b"</s>", *(tokens[i] for i in ids)]
