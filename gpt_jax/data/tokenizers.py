"""Text to token ids and back.

To add a tokenizer: write a class with the methods of `Tokenizer`, put the inverse of its `to_json` into
`TOKENIZERS`, and let `load_corpus` (data/corpus.py) make it from a text.
"""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from gpt_jax.errors import UserError

CHARACTERS_AT_ONCE = 2**16  # to encode, so that a text needs little more memory than its ids
MAX_LISTED = 20  # unknown characters in an error
# Characters that can stand for each other, the one on keyboards first: quotes, dashes, spaces, line ends.
ALIKE = (
    "'‘’‚‛′‹›`´",
    '"“”„‟″«»',
    "-‐‑‒–—―−",
    " \t",
    "\n\r\x85\u2028\u2029",
)


class Tokenizer(Protocol):
    """What the rest of the program needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """V: ids lie in [0, V)."""

    @property
    def start_id(self) -> int:
        """The token that stands in for an empty prompt."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [T].

        Raises:
            UserError: the text has characters that no token stands for.
        """

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, integers [T]."""

    def decoder(self) -> Callable[[np.ndarray], str]:
        """A function that decodes a text piece by piece.

        It takes the next ids, integers [n], and returns the characters that are now complete: a token can end
        within a character.
        """

    def to_json(self) -> str:
        """JSON that `tokenizer_from_json` reads: an object whose "type" is a key of `TOKENIZERS`."""


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character. `characters` is the sorted vocabulary; an id is an index into it."""

    characters: str
    type: ClassVar[str] = "char"

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The vocabulary of `text`: its distinct characters, sorted."""
        return cls("".join(sorted(set(text))))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CharTokenizer":
        """The inverse of `to_json`, from what JSON holds."""
        characters = values.get("characters")
        if not isinstance(characters, str) or not characters or list(characters) != sorted(set(characters)):
            raise UserError("tokenizer: its characters must be a sorted string without duplicates")
        if any("\ud800" <= character <= "\udfff" for character in characters):
            raise UserError("tokenizer: it has surrogates, which are not characters")
        return cls(characters)

    def to_json(self) -> str:
        """JSON with the type and the characters."""
        return json.dumps({"type": self.type, "characters": self.characters})

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.characters)

    @property
    def start_id(self) -> int:
        """A line feed, or the first character where the vocabulary has none."""
        return max(self.characters.find("\n"), 0)

    @cached_property
    def _id_of(self) -> np.ndarray:
        """Ids by code point, int32: -1 if it is unknown; the last entry is for all code points above."""
        known = _code_points(self.characters)
        table = np.full(int(known.max(initial=0)) + 2, -1, np.int32)
        table[known] = np.arange(self.vocab_size)
        return table

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [T].

        Raises:
            UserError: `text` has characters outside the vocabulary; they are listed, with the nearest in it.
        """
        ids_T = np.empty(len(text), np.int32)
        unknown: set[str] = set()
        for begin in range(0, len(text), CHARACTERS_AT_ONCE):
            code_points = _code_points(text[begin : begin + CHARACTERS_AT_ONCE])
            ids = self._id_of.take(code_points, mode="clip")
            unknown.update(map(chr, np.unique(code_points[ids < 0])))
            ids_T[begin : begin + CHARACTERS_AT_ONCE] = ids
        if unknown:
            listed = _list_unknown(unknown, self.characters, text)
            raise UserError(
                f"unknown characters: {listed}; the vocabulary has the {self.vocab_size} characters of the "
                f"training text"
            )
        return ids_T

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`, integers [T]."""
        return "".join(self.characters[i] for i in np.asarray(ids).tolist())

    def decoder(self) -> Callable[[np.ndarray], str]:
        """`decode`: each token is a whole character."""
        return self.decode


# By type: from what JSON holds to the tokenizer.
TOKENIZERS: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {CharTokenizer.type: CharTokenizer.from_dict}


def tokenizer_from_json(text: str) -> Tokenizer:
    """The inverse of a tokenizer's `to_json`.

    Raises:
        UserError: `text` is not such JSON.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer: not JSON ({type(error).__name__})") from None
    kind = values.get("type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in TOKENIZERS:
        raise UserError(f"tokenizer: type {kind!r} is not known; known: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind](values)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _list_unknown(unknown: set[str], known: str, text: str) -> str:
    """Unknown characters of a text, for an error: each with the nearest that is known."""
    listed = []
    for character in sorted(unknown)[:MAX_LISTED]:
        nearest = _nearest(character, known)
        if character == "\r" and "\r\n" in text and "\n" in known:
            note = " (the text has Windows line ends, CRLF; the model knows LF only)"
        else:
            note = f" (nearest known: {nearest!r})" if nearest else ""
        listed.append(f"{character!r}{note}")
    more = len(unknown) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


def _nearest(character: str, known: str) -> str:
    """What could stand for a character, in known ones: a look-alike, no accent, other case; "": nothing."""
    alike = next((group for group in ALIKE if character in group), "")
    parts = unicodedata.normalize("NFKD", character)  # makes accents separate, and an ellipsis three dots
    plain = "".join(part for part in parts if not unicodedata.combining(part))
    candidates = (*alike, plain, plain.lower(), plain.upper())
    return next((text for text in candidates if text and set(text) <= set(known)), "")
