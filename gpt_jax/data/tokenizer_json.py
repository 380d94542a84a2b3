"""Our tokenizers as a Hugging Face tokenizer.json, and such files as our tokenizers."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from gpt_jax.data.bpe import BYTE_OF, END, BPETokenizer, ByteTokenizer, as_bytes
from gpt_jax.data.hugging_face import HuggingFaceTokenizer
from gpt_jax.data.tokenizer import Tokenizer, library
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.errors import UserError

NAME_OF = {byte: name for name, byte in BYTE_OF.items()}
UNUSED = ("vocab", "fuse_unk", "byte_fallback", "ignore_merges")  # where the vocabulary has all bytes


def to_tokenizer_json(tokenizer: Tokenizer) -> str:
    """A tokenizer.json with the same ids for every text, the same text for all ids, and the same errors.

    It cannot say that <|endoftext|> in a text is ordinary text: set `encode_special_tokens` of the library,
    or `split_special_tokens` of `transformers`. Raises `UserError` for a token that BPE would not make.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.file
    lib = library("tokenizers")
    if isinstance(tokenizer, CharTokenizer):
        ids = {character: i for i, character in enumerate(tokenizer.characters)}
        made = lib.Tokenizer(lib.models.WordLevel(ids, unk_token="<unk>"))  # no token: an error
        made.pre_tokenizer = lib.pre_tokenizers.Split(lib.Regex(r"[\s\S]"), "isolated")
        made.decoder = lib.decoders.Fuse()
    else:
        assert isinstance(tokenizer, ByteTokenizer)
        ids = {token.decode("latin-1").translate(NAME_OF): i for i, token in enumerate(tokenizer.tokens)}
        made = lib.Tokenizer(lib.models.BPE(ids | {END: tokenizer.end_id}, [*_pairs(ids)]))
        is_bpe = isinstance(tokenizer, BPETokenizer)
        made.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_bpe)
        made.decoder = lib.decoders.ByteLevel()
        made.add_special_tokens([END])
    return made.to_str()


def _pairs(ids: dict[str, int]) -> Iterator[tuple[str, str]]:
    """What BPE joins to each token: the two parts that are left when tokens of lower ids are joined."""
    for name, number in list(ids.items())[256:]:
        parts = [*name]
        while len(parts) > 2:
            joined = [ids.get(first + second, number) for first, second in pairwise(parts)]
            best = joined.index(min(joined))
            if joined[best] >= number or name == END:
                raise UserError(f"tokenizer: BPE does not make token {number} of two others: {name!r}")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        yield parts[0], parts[1]


def recognize(tokenizer: Tokenizer) -> Tokenizer:
    """Our own tokenizer that a tokenizer.json describes, or else the argument itself."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    _ = tokenizer.vocab_size  # a UserError if the library cannot read the file
    rules = _rules(tokenizer.file)
    found: Tokenizer = ByteTokenizer()
    try:
        if rules["words"].get("use_regex"):
            found = BPETokenizer(tuple(map(as_bytes, [*rules["ids"]][:-1])))
        elif rules["type"] == "WordLevel":
            found = CharTokenizer.from_dict({"characters": "".join(rules["ids"])})
        return found if _rules(to_tokenizer_json(found)) == rules else tokenizer
    except (UserError, KeyError):  # it has other tokens
        return tokenizer


def is_same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers have the same content; a tokenizer.json can be the same as one of ours."""
    return recognize(a).to_json() == recognize(b).to_json()


def _rules(file: str) -> dict[str, Any]:
    """What makes ids and texts in a tokenizer.json that is like ours."""
    values = json.loads(
        library("tokenizers").Tokenizer.from_str(file).to_str()
    )  # with all fields, ids in order
    added = {token["content"]: token["id"] for token in values["added_tokens"]}
    model, words, decoder = (values[name] or {} for name in ("model", "pre_tokenizer", "decoder"))
    return {name: value or None for name, value in model.items() if name not in UNUSED} | {
        "ids": dict(model["vocab"]) | added, "added": added, "normalizer": values["normalizer"],
        "words": words | {"trim_offsets": None}, "decoder": decoder.get("type"),
    }  # fmt: skip
