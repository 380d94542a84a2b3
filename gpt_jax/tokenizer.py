"""Text to token ids and back."""

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpt_jax.errors import UserError


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character. `characters` is the sorted vocabulary; an id is a place in it."""

    characters: str

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The vocabulary of `text`: its distinct characters, sorted."""
        return cls("".join(sorted(set(text))))

    @classmethod
    def from_json(cls, text: str) -> "CharTokenizer":
        """The inverse of `to_json`.

        Raises:
            UserError: `text` is not such JSON.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"tokenizer: not JSON ({type(error).__name__})") from None
        if not isinstance(values, dict) or values.get("type") != "char":
            raise UserError("tokenizer: its type is not known: it must be 'char'")
        characters = values.get("characters")
        if not isinstance(characters, str) or not characters or list(characters) != sorted(set(characters)):
            raise UserError("tokenizer: its characters must be a text, sorted and without repetition")
        if any("\ud800" <= character <= "\udfff" for character in characters):
            raise UserError("tokenizer: it has surrogates, which are no characters")
        return cls(characters)

    def to_json(self) -> str:
        """JSON that `from_json` reads."""
        return json.dumps({"type": "char", "characters": self.characters})

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.characters)

    @cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [T].

        Raises:
            UserError: `text` has characters outside the vocabulary; they are listed.
        """
        code_points = _code_points(text)
        ids = np.searchsorted(self._code_points, code_points)
        ids = np.minimum(ids, self.vocab_size - 1)
        unknown = np.unique(code_points[self._code_points[ids] != code_points])
        if unknown.size:
            listed = " ".join(repr(chr(code)) for code in unknown[:20])
            more = f" and {unknown.size - 20} more" if unknown.size > 20 else ""
            raise UserError(
                f"characters that the model has never seen: {listed}{more}; "
                f"it knows the {self.vocab_size} of its training text"
            )
        return ids.astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`, integers [T]."""
        return "".join(self.characters[i] for i in np.asarray(ids).tolist())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
