"""The loss of a trained model on a whole text."""

import math
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.data.corpus import (
    encode_file,
    fingerprint_of,
    load_corpus,
)
from gpt_jax.data.documents import GIVE_A_PATH, Progress, no_progress
from gpt_jax.data.tokens import Corpus, Tokens
from gpt_jax.errors import UserError
from gpt_jax.interchange.trained_model import TrainedModel
from gpt_jax.paths import relative_to_root


@dataclass(frozen=True)
class Evaluation:
    """The loss of a text."""

    text: str  # its name, for messages
    loss: float  # nats per token
    n_tokens: int  # number of predicted tokens
    n_characters: int | None  # of the text, without the first one; None: not known
    n_bytes: int | None  # of the text as UTF-8, without the first one

    @property
    def bits_per_character(self) -> float | None:
        """The loss per character, in bits; None where their number is not known."""
        return self._bits_per(self.n_characters)

    @property
    def bits_per_byte(self) -> float | None:
        """The loss per byte of the text, in bits, which compares models of different tokenizers."""
        return self._bits_per(self.n_bytes)

    def _bits_per(self, n_units: int | None) -> float | None:
        return self.loss * self.n_tokens / n_units / math.log(2) if n_units else None


def evaluate(model: TrainedModel, text: Path | None = None, progress: Progress = no_progress) -> Evaluation:
    """The loss on the validation split of the model's own text, or on all of another text.

    `text` may be the training text itself, wherever it is now; None: where training read it. Raises
    `UserError` if it cannot be read, has unknown characters, or is None and has changed.
    """
    if text is None or fingerprint_of(text, model.tokenizer) == model.metadata.fingerprint:
        corpus = corpus_of(model, text, progress)
        name = f"validation split of {text or relative_to_root(model.plan.text)}"
        tokens_N: Tokens = corpus.val
        units = [corpus.n_val_characters, corpus.n_val_bytes]
    else:
        name = str(text)
        tokens_N, *units = encode_file(text, model.tokenizer, progress)
    loss = model.loss(tokens_N)
    n_characters, n_bytes = (n and n - 1 for n in units)
    return Evaluation(name, loss, len(tokens_N) - 1, n_characters, n_bytes)


def corpus_of(model: TrainedModel, text: Path | None = None, progress: Progress = no_progress) -> Corpus:
    """The text that a model was trained on; `text`: where it is now, None: where training read it.

    Raises `UserError` if it cannot be read, or has another fingerprint.
    """
    path = text or model.plan.text
    moved = "say where it is now with --text FILE; its fingerprint will be compared"
    fingerprint = fingerprint_of(path, model.tokenizer, GIVE_A_PATH if text else moved)
    if fingerprint != model.metadata.fingerprint:
        raise UserError(
            f"{path} is not the text that this run was trained on: fingerprint "
            f"{model.metadata.fingerprint[:12]} then, {fingerprint[:12]} now; name the old text with "
            f"--text FILE"
        )
    data, context = model.config.data, model.config.model.context
    return load_corpus(path, context, data.train_fraction, progress, data.tokenizer, model.tokenizer)
