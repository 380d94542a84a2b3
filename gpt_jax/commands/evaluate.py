"""The loss of a trained model: python -m gpt_jax.evaluate --workdir artifacts/shakespeare_cpu"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.commands.paths import newest_run, text_file
from gpt_jax.data.corpus import Corpus, load_corpus, read_text
from gpt_jax.errors import UserError
from gpt_jax.interchange.trained_model import TrainedModel, load
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache


@dataclass(frozen=True)
class Evaluation:
    """The headline loss of a text.

    Attributes:
        loss: nats per token.
        n_tokens, n_characters: how many were predicted.
    """

    loss: float
    n_tokens: int
    n_characters: int

    @property
    def bits_per_character(self) -> float:
        """The loss per character, in bits."""
        return self.loss * self.n_tokens / self.n_characters / math.log(2)


def evaluate(model: TrainedModel, text_path: Path | None = None) -> Evaluation:
    """The headline loss on the validation split of the model's run, or on all of a text file.

    Raises:
        UserError: the text cannot be read, is not the one trained on, or has unknown characters.
    """
    text = corpus_of(model).val_text if text_path is None else read_text(text_path)[0]
    n_tokens = len(model.tokenizer.encode(text))
    return Evaluation(model.loss(text, compiling_on_stderr), n_tokens - 1, len(text) - 1)


def corpus_of(model: TrainedModel) -> Corpus:
    """The text that a model was trained on.

    Raises:
        UserError: it cannot be read, or has changed.
    """
    data = model.config.data
    path = text_file(data)
    corpus = load_corpus(path, model.config.model.context, data.train_fraction)
    if corpus.fingerprint != model.metadata.fingerprint:
        raise UserError(
            f"{path} is not the text that this run was trained on, so its validation split cannot be found: "
            f"restore the old text, or name a text with --text"
        )
    return corpus


def main() -> int:
    """Parse the flags, evaluate, print."""
    parser = argparse.ArgumentParser(prog="python -m gpt_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--workdir", type=Path, help="a run, or an exported model; default: the newest run in artifacts/"
    )
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    parser.add_argument("--text", type=Path, help="a UTF-8 text; default: the validation split")
    flags = parser.parse_args()
    use_compilation_cache()
    workdir = flags.workdir or newest_run()
    model = load(workdir, flags.which)
    result = evaluate(model, flags.text)
    print(f"run        {workdir}, {model.source}, step {model.step:,}")
    print(f"text       {flags.text or 'validation split'}, {result.n_tokens:,} tokens predicted")
    print(f"loss       {result.loss:.4f} nats per token")
    print(f"           {result.bits_per_character:.4f} bits per character")
    print(f"perplexity {math.exp(result.loss):.3f}")
    return 0
