"""Text to token ids and back. docs/code.md says how to add a tokenizer."""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpt_jax.data.bpe import BPETokenizer, ByteTokenizer, gpt2, read_bpe, train_bpe
from gpt_jax.data.hugging_face import HuggingFaceTokenizer
from gpt_jax.data.tokenizer import Decoder, Tokenizer, checked
from gpt_jax.errors import UserError

KNOWN = "char, byte, gpt2, bpe:N (such as bpe:8192), or the path of a tokenizer.json"
MAX_VOCAB = 2**20  # N of bpe:N
MAX_JSON = 2**23  # characters of `to_json`: the file that stores them may have 2^24 bytes
# GPT-2's two files, as OpenAI and as Hugging Face name them.
BPE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
CHARACTERS_AT_ONCE = 2**16  # to encode, so that a text needs little more memory than its ids
MAX_LISTED = 20  # unknown characters in an error
# Characters that can stand for each other, the one on keyboards first: quotes, dashes, spaces, line ends.
ALIKE = ("'‘’‚‛′‹›`´", '"“”„‟″«»', "-‐‑‒–—―−", " \t", "\n\r\x85\u2028\u2029")


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
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

    @property
    def end_id(self) -> int | None:
        """None: no character ends a text."""
        return None

    @cached_property
    def _id_of(self) -> np.ndarray:
        """Ids by code point, int32: -1 if it is unknown; the last entry is for all code points above."""
        known = _code_points(self.characters)
        table = np.full(int(known.max(initial=0)) + 2, -1, np.int32)
        table[known] = np.arange(self.vocab_size)
        return table

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`; the error lists the unknown characters, each with the nearest that is known."""
        ids_T = np.empty(len(text), np.int32)
        unknown: set[str] = set()
        for begin in range(0, len(text), CHARACTERS_AT_ONCE):
            code_points = _code_points(text[begin : begin + CHARACTERS_AT_ONCE])
            ids = self._id_of.take(code_points, mode="clip")
            unknown.update(map(chr, np.unique(code_points[ids < 0])))
            ids_T[begin : begin + CHARACTERS_AT_ONCE] = ids
        if unknown:
            listed = _list_unknown(unknown, self.characters, text)
            vocabulary = f"the vocabulary has the {self.vocab_size} characters of the training text"
            raise UserError(f"unknown characters: {listed}; {vocabulary}")
        return ids_T

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`, integers [T]."""
        return "".join([self.characters[i] for i in checked(ids, self.vocab_size)])

    def decoder(self) -> Decoder:
        """`decode`: each token is a whole character."""
        return lambda ids, final=False: self.decode(ids)


# By type: from what JSON holds to the tokenizer.
TOKENIZERS: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
    kind.type: kind.from_dict for kind in (CharTokenizer, ByteTokenizer, BPETokenizer, HuggingFaceTokenizer)
}


def make_tokenizer(spec: str, sample: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokenizer of a setting `data.tokenizer`.

    char and bpe:N (N tokens, 257 to 2^20) take their vocabulary from a text, which `sample` gives in blocks.
    byte, gpt2, and the path of a tokenizer.json, of GPT-2's files, or of their folder do not read it.

    Raises:
        UserError: it is none of these, a file or a library is missing or broken, or the text is too short.
    """
    if spec == "char":
        tokenizer: Tokenizer = CharTokenizer.from_text("".join(set().union(*sample())))
    elif spec == "byte":
        tokenizer = ByteTokenizer()
    elif spec == "gpt2":
        tokenizer = gpt2()
    elif spec.startswith("bpe:"):
        if not re.fullmatch("[0-9]{1,7}", spec[4:]) or not 257 <= int(spec[4:]) <= MAX_VOCAB:
            raise UserError(f"data.tokenizer = {spec!r}: the number of tokens must lie in [257, {MAX_VOCAB}]")
        tokenizer = train_bpe(int(spec[4:]), sample())
    else:
        try:
            tokenizer = read_tokenizer(Path(os.path.expanduser(spec)))
        except (UserError, OSError, ValueError, RecursionError) as error:
            found = error.strerror if isinstance(error, OSError) else str(error)
            reason = found if isinstance(error, (UserError, OSError)) else "it is not JSON"
            raise UserError(f"data.tokenizer = {spec!r} cannot be used: {reason}; give {KNOWN}") from None
    if (size := len(tokenizer.to_json())) > MAX_JSON:
        too_large = f"takes {size:,} bytes, and a checkpoint has room for {MAX_JSON:,}"
        raise UserError(f"data.tokenizer = {spec!r} {too_large}: use a smaller vocabulary")
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, or of the files in a folder."""
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    for names in BPE_FILES:
        pair = [folder / name for name in names]
        in_folder = path == folder and not file.is_file() and all(part.is_file() for part in pair)
        if in_folder or path.name in names:
            return read_bpe(*pair)
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    tokenizer = HuggingFaceTokenizer.from_dict({"file": json.loads(file.read_text(encoding="utf-8"))})
    tokenizer.encode("a")  # the library reads it, or a UserError says why not
    return tokenizer


def tokenizer_from_json(text: str) -> Tokenizer:
    """The inverse of a tokenizer's `to_json`; a UserError for other text."""
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
