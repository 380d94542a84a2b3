"""A text file as two arrays of token ids: the training split and the validation split."""

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_jax.data.tokenizers import CharTokenizer, Tokenizer
from gpt_jax.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """A text, tokenized and split by position.

    Attributes:
        train, val: token ids [N] in the smallest unsigned integer type that holds the vocabulary.
        tokenizer: made from the characters of the whole file.
        fingerprint: SHA-256 of the file's bytes and the tokenizer; a run resumes only on the same data.
        val_text: the text of the validation split.
        n_characters: of the whole text.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str
    val_text: str
    n_characters: int


def load_corpus(path: Path, context: int, train_fraction: float) -> Corpus:
    """Read a UTF-8 text file.

    Args:
        path: the file.
        context: T; both splits must hold at least one window of T inputs and the target after it.
        train_fraction: the first `int(train_fraction * N)` characters train, the rest validate.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is too short.
    """
    text, digest = read_text(path)
    n_train = int(train_fraction * len(text))
    tokenizer: Tokenizer = CharTokenizer.from_text(text or " ")
    smallest_type = np.min_scalar_type(tokenizer.vocab_size - 1)
    train, val = (tokenizer.encode(part).astype(smallest_type) for part in (text[:n_train], text[n_train:]))
    for split, tokens_N in (("training", train), ("validation", val)):
        if len(tokens_N) < context + 1:
            raise UserError(
                f"{path} has {len(text):,} characters: its {split} split of {len(tokens_N):,} tokens is "
                f"shorter than one window of model.context + 1 = {context + 1}; use a longer text or a "
                f"shorter context"
            )
    fingerprint = hashlib.sha256((digest + tokenizer.to_json()).encode()).hexdigest()
    return Corpus(train, val, tokenizer, fingerprint, text[n_train:], len(text))


def read_text(path: Path) -> tuple[str, str]:
    """The text of a UTF-8 file, and the SHA-256 of its bytes.

    A byte order mark at the beginning is not part of the text. Nothing else is changed, not even line ends.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        if not path.is_file():
            reason = "is not a regular file" if path.exists() else "does not exist"
            raise UserError(f"text file {path} {reason}: give the path of a UTF-8 text file")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"text file {path} cannot be read: {error.strerror}") from None
    text = data.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode("utf-8"), hashlib.sha256(data).hexdigest()
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(text)
        raise UserError(
            f"text file {path} is not UTF-8: byte {data[offset]:#04x} at offset {offset:,}; save it as UTF-8"
        ) from None
