"""The loss of a trained model: python -m gpt_jax.evaluate --workdir artifacts/shakespeare_cpu"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.paths import newest_run, relative_to_root, text_file
from gpt_jax.data.corpus import GIVE_A_PATH, Corpus, encode_file, fingerprint_of, load_corpus
from gpt_jax.errors import UserError
from gpt_jax.interchange.trained_model import TrainedModel, load
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache


@dataclass(frozen=True)
class Evaluation:
    """The headline loss of a text.

    Attributes:
        text: which text, for a person.
        loss: nats per token.
        n_tokens, n_characters: how many were predicted.
    """

    text: str
    loss: float
    n_tokens: int
    n_characters: int

    @property
    def bits_per_character(self) -> float:
        """The loss per character, in bits."""
        return self.loss * self.n_tokens / self.n_characters / math.log(2)


class OtherTextError(UserError):
    """A text is not the one that a model was trained on."""


def evaluate(model: TrainedModel, text: Path | None = None) -> Evaluation:
    """The headline loss on the validation split of the model's text, or on all of another text.

    Args:
        model: the model.
        text: the model's own text, wherever it is now, or another one; None: where training read it.

    Raises:
        UserError: the text cannot be read, has unknown characters, or is None and has changed.
    """
    try:
        corpus = corpus_of(model, text)
    except OtherTextError:
        if text is None:
            raise
        with LoadingBar(sys.stderr) as progress:
            tokens_N, n_characters = encode_file(text, model.tokenizer, progress)
        name = str(text)
    else:
        path = text or relative_to_root(text_file(model.config.data))
        name, tokens_N, n_characters = f"validation split of {path}", corpus.val, corpus.n_val_characters
    loss = model.loss_of_tokens(tokens_N, compiling_on_stderr)
    return Evaluation(name, loss, len(tokens_N) - 1, n_characters - 1)


def corpus_of(model: TrainedModel, text: Path | None = None) -> Corpus:
    """The text that a model was trained on.

    Args:
        model: the model.
        text: where it is now; None: where training read it.

    Raises:
        OtherTextError: it has another fingerprint.
        UserError: it cannot be read.
    """
    data = model.config.data
    path = text_file(data) if text is None else text
    moved = "say where it is now with --text FILE; its fingerprint will be compared"
    fingerprint = fingerprint_of(path, model.tokenizer, GIVE_A_PATH if text else moved)
    if fingerprint != model.metadata.fingerprint:
        raise OtherTextError(
            f"{path} is not the text that this run was trained on: fingerprint "
            f"{model.metadata.fingerprint[:12]} then, {fingerprint[:12]} now; name the old text with "
            f"--text FILE"
        )
    with LoadingBar(sys.stderr) as progress:
        return load_corpus(path, model.config.model.context, data.train_fraction, progress)


def main() -> int:
    """Parse the flags, evaluate, print."""
    parser = ArgumentParser(prog="python -m gpt_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--workdir", type=Path, help="a run, or an exported model; default: the newest run in artifacts/"
    )
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    about_text = "a UTF-8 text; of the one trained on (the default), only the validation split is evaluated"
    parser.add_argument("--text", type=Path, help=about_text)
    flags = parser.parse_args()
    use_compilation_cache()
    workdir = flags.workdir or newest_run()
    model = load(workdir, flags.which)
    result = evaluate(model, flags.text)
    print(f"run        {workdir}, {model.source}, step {model.step:,}")
    print(f"text       {result.text}, {result.n_tokens:,} tokens predicted")
    print(f"loss       {result.loss:.4f} nats per token")
    print(f"           {result.bits_per_character:.4f} bits per character")
    print(f"perplexity {math.exp(result.loss):.3f}")
    return 0
