"""What every tokenizer has, and what several share."""

import importlib
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np

from gpt_jax.errors import UserError

Decoder = Callable[..., str]  # of ids [n], and `final`: see `Tokenizer.decoder`


class Tokenizer(Protocol):
    """What the rest of the program needs of a tokenizer."""

    type: ClassVar[str]  # in JSON

    @property
    def name(self) -> str:
        """What messages call it: char, byte, gpt2, bpe:8192, hf:32000."""
        return self.type

    @property
    def vocab_size(self) -> int:
        """V: ids lie in [0, V)."""

    @property
    def start_id(self) -> int:
        """The token that stands in for an empty prompt: end of text, or else a line feed, or else 0."""

    @property
    def end_id(self) -> int | None:
        """The token for the end of a text, which `encode` makes of no text; None: there is none."""
        return None

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [T]; a UserError where no token stands for a character."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, by all cores where the library can."""
        return [self.encode(text) for text in texts]

    def cut(self, text: str) -> int:
        """The last position at which a text can be cut without changing its ids; 0: there is none."""
        return len(text)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, integers [T] in [0, V), else a UserError.

        End of text is shown as its text, <|endoftext|>, and bytes that are not UTF-8 as U+FFFD.
        """

    def decoder(self) -> Decoder:
        """A function that decodes a text piece by piece.

        It takes the next ids, integers [n], and returns the characters that are now complete: a token can end
        within a character. With `final=True` the text ends, and half a character is shown as U+FFFD.
        """

    def to_json(self) -> str:
        """JSON that `tokenizer_from_json` reads: an object whose "type" is a key of `TOKENIZERS`."""


def utf8(text: str) -> bytes:
    """The UTF-8 of a text; a UserError names a lone surrogate, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start:,} of the text, {text[error.start]!r}"
        raise UserError(f"{found}, is a lone surrogate, which is not valid Unicode: remove it") from None


def checked(ids: np.ndarray, vocab_size: int) -> list[int]:
    """Ids, integers [T], as a list; a UserError names one outside [0, V)."""
    found = np.asarray(ids)
    if (wrong := found[(found < 0) | (found >= vocab_size) | (found % 1 != 0)]).size:
        raise UserError(f"token id {wrong[0]} must be an integer in [0, {vocab_size})")
    return found.astype(int).tolist()


def last_cut(text: str) -> int:
    """Where to cut a text of words: before a space between two characters that are no white space.

    There a word of GPT-2's pattern begins. A text without one, as of Chinese, is cut before such a line feed.
    """
    for separator in " \n":
        position = len(text) - 1
        while (position := text.rfind(separator, 1, position)) > 0:
            if not text[position - 1].isspace() and not text[position + 1].isspace():
                return position
    return 0


def library(name: str) -> Any:
    """A module that only some tokenizers need; a UserError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this tokenizer needs {name}, which is missing: pip install -e '.[bpe]'") from None
