"""A tokenizer from a Hugging Face tokenizer.json."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from gpt_jax.data.tokenizer import Decoder, Tokenizer, checked, last_cut, library, utf8
from gpt_jax.errors import UserError

ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # what files call end of text


@dataclass(frozen=True)
class HuggingFaceTokenizer(Tokenizer):
    """What the library `tokenizers` makes of a tokenizer.json; special tokens are shown as their text.

    A character without a token becomes the file's token for unknown ones; without that, the library drops it.
    """

    file: str = field(repr=False)  # the JSON of the file
    type: ClassVar[str] = "hugging_face"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HuggingFaceTokenizer":
        """The inverse of `to_json`. The library reads the file at the first use, or raises a UserError."""
        if not isinstance(values.get("file"), dict):
            raise UserError("tokenizer: its file must be the JSON object of a tokenizer.json")
        file = values["file"] | {"truncation": None, "padding": None}  # a text is encoded as a whole
        return cls(json.dumps(file, ensure_ascii=False, separators=(",", ":")))

    def to_json(self) -> str:
        """JSON with the type, and the file."""
        return f'{{"type": "{self.type}", "file": {self.file}}}'

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizers, values = library("tokenizers"), json.loads(self.file)
        try:
            for token in values.get("added_tokens", []):
                token["special"] |= token["content"] in ENDS
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
            tokenizer.encode_special_tokens = True  # as ordinary text
        except Exception as error:  # the library has no type of its own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the library tokenizers cannot read the tokenizer.json ({reason})") from None
        if not tokenizer.get_vocab_size():
            raise UserError("the tokenizer.json has no tokens")
        return tokenizer

    @property
    def name(self) -> str:
        """See `Tokenizer`: hf:V."""
        return f"hf:{self.vocab_size}"

    @cached_property
    def vocab_size(self) -> int:
        """V: one more than the highest id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @cached_property
    def end_id(self) -> int | None:
        """The added token that has a name in `ENDS`."""
        ids = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        return next((ids[name] for name in ENDS if name in ids), None)

    @cached_property
    def start_id(self) -> int:
        """See `Tokenizer`."""
        line_feed = self.encode("\n")
        return self.end_id if self.end_id is not None else int(line_feed[0]) if len(line_feed) == 1 else 0

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encoded = self._encode(texts)
        for i, ids in enumerate(encoded):
            if (ids == self.end_id).any():  # the vocabulary has the name of end of text too, not only its id
                end = self._tokenizer.id_to_token(self.end_id)
                parts = re.split(f"(?<={re.escape(end[0])})(?={re.escape(end[1:])})", texts[i])
                encoded[i] = np.concatenate(self._encode(parts))
        return encoded

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        encode = self._tokenizer.encode_batch_fast
        try:
            encodings = encode(texts, add_special_tokens=False)
        except Exception as error:  # an unknown character, and no token for those
            raise UserError(f"the tokenizer.json cannot encode the text: {error}") from None
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def cut(self, text: str) -> int:
        """As for GPT-2. Where the file has other rules for words, ids around a cut can be others."""
        return last_cut(text)

    def decode(self, ids: np.ndarray) -> str:
        """See `Tokenizer`."""
        return self._decode(checked(ids, self.vocab_size))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def decoder(self) -> Decoder:
        """See `Tokenizer`.

        A token's text can depend on those before it: the space between words, a character of several tokens.
        So new ids are decoded together with those of the piece before. Where bytes are no UTF-8, a file with
        byte fallback can show another number of U+FFFD than in `decode`.
        """
        window: list[int] = []
        n_before = n_shown = 0  # ids of the piece before; characters of the window that were returned

        def decode(ids: np.ndarray, final: bool = False) -> str:
            nonlocal window, n_before, n_shown
            window += checked(ids, self.vocab_size)
            text = self._decode(window)
            whole = text if final else text.rstrip("\ufffd")
            piece = whole[n_shown:]
            n_shown += len(piece)
            if final:
                window, n_before, n_shown = [], 0, 0
            elif piece and whole == text:
                window = window[n_before:]
                n_before, n_shown = len(window), len(self._decode(window))
            return piece

        return decode
