"""The losses of trained models on a whole text."""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from gpt_jax.data.corpus import INHERITED, encode_file, fingerprint_of, load_corpus
from gpt_jax.data.documents import GIVE_A_PATH, Progress, no_progress
from gpt_jax.data.tokenizer_json import is_same
from gpt_jax.data.tokens import Corpus
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
    return evaluate_side_by_side([model], text, progress)[0]


def ensemble(models: list[TrainedModel], text: Path | None = None) -> Evaluation:
    """The loss of the mean of the models' probabilities; a `UserError` where their tokenizers differ."""
    return evaluate_side_by_side(models, text, mean=True)[-1]


def evaluate_side_by_side(
    models: list[TrainedModel], text: Path | None = None, progress: Progress = no_progress, mean: bool = False
) -> list[Evaluation]:
    """The losses of models on one text: the text that `evaluate` takes for the first of them.

    `mean=True` adds the ensemble's loss as the last; the others may then differ in rounding. Raises
    `UserError` like `evaluate`.
    """
    first = models[0]
    same = [model is first or is_same(model.tokenizer, first.tokenizer) for model in models]
    if mean and not all(same):
        pair = f"{first.workdir} and {models[same.index(False)].workdir}"
        raise UserError(f"the tokenizers of {pair} differ, and an ensemble needs equal ones: leave one out")
    name, texts = _texts_of_each(models, same, text, progress)
    units = [n and n - 1 for n in max(texts, key=lambda found: found[2] or 0)[1:]]  # if one knows them
    losses: list[Any] = [(m.losses if mean else m.loss)(t[0]) for m, t in zip(models, texts, strict=True)]
    if mean:
        losses.append(math.log(len(models)) - np.logaddexp.reduce([-losses_N for losses_N in losses]))
        texts.append(texts[0])
    return [
        Evaluation(name, float(np.mean(loss, dtype=np.float64)), len(found[0]) - 1, *units)
        for loss, found in zip(losses, texts, strict=True)
    ]


def _texts_of_each(
    models: list[TrainedModel], same: list[bool], text: Path | None, progress: Progress
) -> tuple[str, list[Any]]:
    """The name of the text, and for each model: its tokens, and the number of characters and of bytes.

    `same` says which models have the tokenizer of the first one. The others need the text itself: where only
    the tokens of a split are known, it is written to a temporary file.
    """
    first, texts, name = models[0], list[Any](), str(text)
    with nullcontext("") if all(same) else TemporaryDirectory() as folder:
        if text is None or fingerprint_of(text, first.tokenizer) == first.metadata.fingerprint:
            name = f"validation split of {text or relative_to_root(first.plan.text)}"
            corpus, text = corpus_of(first, text, progress), Path(folder, "split.jsonl")
            texts.append((corpus.val, corpus.n_val_characters, corpus.n_val_bytes))
            if not all(same):  # write the texts between the ends of text
                ids_N, end_id = corpus.val[:], first.tokenizer.end_id
                parts = np.split(ids_N, np.flatnonzero(ids_N == end_id) + 1)
                documents = [first.tokenizer.decode(part[part != end_id]) for part in parts if len(part)]
                text.write_text("\n".join([json.dumps({"text": t}) for t in documents]), encoding="utf-8")
        for i, model in list(enumerate(models))[len(texts) :]:
            try:
                texts.append(texts[0] if i and same[i] else encode_file(text, model.tokenizer, progress))
            except UserError as error:
                raise UserError(f"{model.workdir} cannot encode the text, {name}: {error}") from None
    return name, texts


def corpus_of(model: TrainedModel, text: Path | None = None, progress: Progress = no_progress) -> Corpus:
    """The text that a model was trained on; `text`: where it is now, None: where training read it.

    Raises `UserError` if it cannot be read, or has another fingerprint.
    """
    if not model.metadata.fingerprint:
        raise UserError(
            f"{model.workdir} does not say which text it was trained on: evaluate it with --text FILE, "
            f"or export it with --format hf or llama2c"
        )
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
    spec = INHERITED if model.config.init_from else data.tokenizer
    return load_corpus(path, context, data.train_fraction, progress, spec, model.tokenizer)
