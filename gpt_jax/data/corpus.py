"""A text file as two arrays of token ids: the training split and the validation split.

A text takes two bytes of memory per ASCII character while it is loaded, and one afterwards: it is decoded
and encoded block by block, and never exists as a string.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_jax.data.tokenizers import CharTokenizer, Tokenizer
from gpt_jax.errors import UserError

BLOCK = 2**20  # bytes that are read, decoded or encoded at a time
GIVE_A_PATH = "give the path of a UTF-8 text file"

Progress = Callable[[int, int], None]  # called with the bytes that are done and all bytes


@dataclass(frozen=True)
class Corpus:
    """A text, tokenized and split by position.

    Attributes:
        train, val: token ids [N] in the smallest unsigned integer type that holds the vocabulary.
        tokenizer: made from the characters of the whole file.
        fingerprint: SHA-256 of the file's bytes and the tokenizer; a run resumes only on the same data.
        n_characters: of the whole text.
        n_val_characters: of the validation split.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str
    n_characters: int
    n_val_characters: int


def silent(_done: int, _total: int) -> None:
    """A `Progress` that shows nothing."""


def load_corpus(path: Path, context: int, train_fraction: float, progress: Progress = silent) -> Corpus:
    """Read a UTF-8 text file.

    Args:
        path: the file.
        context: T; both splits must hold at least one window of T inputs and the target after it.
        train_fraction: the first `int(train_fraction * N)` characters train, the rest validate.
        progress: called after each block; reading, finding the characters and encoding count a third each.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is too short.
    """
    data = _read(path, f"{GIVE_A_PATH} with --config.data.path=FILE", _third(progress, 0))
    characters: set[str] = set()
    n_characters = 0
    for block in _decode(path, data, _third(progress, 1)):
        characters.update(block)
        n_characters += len(block)
    n_train = int(train_fraction * n_characters)
    n_val = n_characters - n_train
    _check_length(path, n_train, n_val, context)

    tokenizer = CharTokenizer.from_text("".join(characters))
    ids_N = _encode(_decode(path, data, _third(progress, 2)), n_characters, tokenizer)
    return Corpus(
        ids_N[:n_train], ids_N[n_train:], tokenizer, _fingerprint(data, tokenizer), n_characters, n_val
    )


def fingerprint_of(path: Path, tokenizer: Tokenizer, advice: str = GIVE_A_PATH) -> str:
    """The `fingerprint` of a file's corpus, if this is its tokenizer.

    Raises:
        UserError: the file cannot be read. Where there is none, the error ends in `advice`.
    """
    return _fingerprint(_read(path, advice), tokenizer)


def encode_file(path: Path, tokenizer: Tokenizer, progress: Progress = silent) -> tuple[np.ndarray, int]:
    """The token ids of a UTF-8 file [N], and its number of characters; memory is as for `load_corpus`.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has unknown characters.
    """
    data = _read(path, GIVE_A_PATH)
    n_characters = sum(map(len, _decode(path, data)))
    return _encode(_decode(path, data, progress), n_characters, tokenizer), n_characters


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    A byte order mark at the beginning is not part of the text. Nothing else is changed, not even line ends.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    return "".join(_decode(path, _read(path, GIVE_A_PATH)))


def _read(path: Path, advice: str, progress: Progress = silent) -> bytearray:
    data = bytearray()
    try:
        if not path.is_file():
            reason = "is not a regular file" if path.exists() else "does not exist"
            raise UserError(f"text file {path} {reason}: {advice}")
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                data += block
                progress(len(data), max(len(data), size))
    except OSError as error:
        raise UserError(f"text file {path} cannot be read: {error.strerror}") from None
    return data


def _decode(path: Path, data: bytearray, progress: Progress = silent) -> Iterator[str]:
    """The text, block by block, without a byte order mark."""
    begin = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    while begin < len(data):
        end = _border(data, min(begin + BLOCK, len(data)))
        try:
            yield data[begin:end].decode("utf-8")
        except UnicodeDecodeError as error:
            offset = begin + error.start
            raise UserError(
                f"text file {path} is not UTF-8: byte {data[offset]:#04x} at offset {offset:,}; save it as "
                f"UTF-8"
            ) from None
        progress(end, len(data))
        begin = end


def _encode(blocks: Iterable[str], n_characters: int, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a text of `n_characters`, in the smallest type; each token is one character."""
    ids_N = np.empty(n_characters, np.min_scalar_type(tokenizer.vocab_size - 1))
    begin = 0
    for block in blocks:
        ids_N[begin : begin + len(block)] = tokenizer.encode(block)
        begin += len(block)
    return ids_N


def _border(data: bytearray, end: int) -> int:
    """The last place up to `end` where a character begins; `end` if there is none in the last four bytes."""
    for place in range(end, end - 4, -1):  # a character has four bytes at most
        if place == len(data) or data[place] & 0xC0 != 0x80:
            return place
    return end


def _fingerprint(data: bytearray, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(data).hexdigest()
    return hashlib.sha256((digest + tokenizer.to_json()).encode()).hexdigest()


def _check_length(path: Path, n_train: int, n_val: int, context: int) -> None:
    longest = min(n_train, n_val) - 1  # the context that fits both splits
    if longest >= context:
        return
    split, n_tokens = ("training", n_train) if n_train < context + 1 else ("validation", n_val)
    tokens = "token" if n_tokens == 1 else "tokens"
    raise UserError(
        f"{path} has {n_train + n_val:,} characters: its {split} split of {n_tokens:,} {tokens} is shorter "
        f"than one window of model.context + 1 = {context + 1}; use a longer text"
        + (f", or --config.model.context={longest}" if longest > 0 else "")
    )


def _third(progress: Progress, number: int) -> Progress:
    """The progress of one of three equal parts: 0, 1 or 2."""

    def of_the_whole(done: int, total: int) -> None:
        progress((number * total + done) // 3, total)

    return of_the_whole
