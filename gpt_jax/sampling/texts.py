"""Texts as they grow: from tokens to characters, up to a stop string or the end of text."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Ended = Literal["length", "stop", "end_of_text"]


class Token(NamedTuple):
    """A token of a text."""

    id: int
    text: str  # the characters that it completes, without those from a stop string on
    logprob: float | None  # log probability before all rules; None unless `SamplingRules.logprobs`


class Piece(str):
    """The next piece of a text: a string that knows its tokens.

    Attributes:
        tokens: their texts make up the piece.
        ended: why the text ends with this piece; None: it goes on.
    """

    tokens: tuple[Token, ...]
    ended: Ended | None

    def __new__(cls, tokens: Sequence[Token], ended: Ended | None) -> "Piece":
        """The piece that the tokens make up."""
        piece = super().__new__(cls, "".join(token.text for token in tokens))
        piece.tokens, piece.ended = tuple(tokens), ended
        return piece


class GrowingText:
    """One text. What could be the beginning of a stop string is held back until that is decided.

    The first stop string that is complete ends the text, which does not depend on the pieces it comes in.

    Attributes:
        ended: why it has ended; None: it goes on.
    """

    def __init__(self, decode: Callable[..., str], stops: Sequence[str], end_id: int | None):
        self._decode, self._stops, self._end_id = decode, stops, end_id
        self._held: list[Token] = []
        self.ended: Ended | None = None

    def add(self, ids_N: np.ndarray, logprobs_N: Any, is_last: bool) -> Piece:
        """The piece that the next tokens complete; `is_last`: no more will come.

        After the end of the text it is empty, and its `ended` stays.
        """
        for i, token_id in enumerate(ids_N.tolist()):
            if self.ended is not None:
                break
            logprob = None if logprobs_N is None else float(logprobs_N[i])
            if token_id == self._end_id:
                self.ended = "end_of_text"
                if rest := self._decode(ids_N[:0], True):  # of a character that was begun
                    self._held.append(Token(token_id, rest, logprob))
            else:
                self._held.append(Token(token_id, self._decode(ids_N[i : i + 1]), logprob))
                self._stop()
        if is_last and self.ended is None:
            self.ended = "length"
            if self._held:
                last = self._held[-1]  # which may have begun a character
                self._held[-1] = last._replace(text=last.text + self._decode(ids_N[:0], True))
        given = len(self._held) if self.ended else self._n_decided()
        piece, self._held = Piece(self._held[:given], self.ended), self._held[given:]
        return piece

    def _stop(self) -> None:
        """End the text before the stop string that the newest token completes, if there is one."""
        text = "".join(token.text for token in self._held) if self._stops else ""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:
            self.ended, left = "stop", min(found)[1]
            tokens, self._held = self._held, []
            for token in tokens:
                if left <= 0:
                    break
                self._held.append(token._replace(text=token.text[:left]))
                left -= len(token.text)

    def _n_decided(self) -> int:
        """How many of the tokens held are not part of a stop string or a character to be completed."""
        whole = len(self._held)
        while whole and not self._held[whole - 1].text:
            whole -= 1
        if not self._stops:
            return whole
        text = "".join(token.text for token in self._held)
        open_ = [n for n in range(len(text)) if any(stop.startswith(text[n:]) for stop in self._stops)]
        first, end = open_[0] if open_ else len(text), 0
        for n, token in enumerate(self._held):
            end += len(token.text)
            if end > first:
                return n
        return whole
