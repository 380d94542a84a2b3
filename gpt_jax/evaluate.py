"""The loss of a trained run: `python -m gpt_jax.evaluate --workdir artifacts/shakespeare_cpu`."""

import argparse
import math
import sys
from pathlib import Path

from gpt_jax.compilation import compiling_on_stderr, use_compilation_cache
from gpt_jax.corpus import Corpus, load_corpus, read_text
from gpt_jax.errors import UserError, run_main
from gpt_jax.run import Run, load, newest_run


def evaluate(run: Run, text_file: Path | None = None) -> tuple[float, int]:
    """The headline loss on the run's validation split, or on all of a text file.

    Returns:
        Nats per character, and the number of characters predicted.

    Raises:
        UserError: the text cannot be read, is not the one trained on, or has unknown characters.
    """
    if text_file is not None:
        text, _ = read_text(text_file)
    else:
        corpus = corpus_of(run)
        text = corpus.tokenizer.decode(corpus.val)
    return run.loss(text, compiling_on_stderr), len(text) - 1


def corpus_of(run: Run) -> Corpus:
    """The text that a run was trained on.

    Raises:
        UserError: it cannot be read, or is another one now.
    """
    data = run.config.data
    corpus = load_corpus(data.file, run.config.model.context, data.train_fraction)
    if corpus.fingerprint != run.metadata.fingerprint:
        raise UserError(
            f"{data.file} is not the text that this run was trained on, so its validation split is "
            f"gone: give the old text back, or name a text with --text"
        )
    return corpus


def main() -> int:
    """Parse flags, evaluate, print."""
    parser = argparse.ArgumentParser(prog="python -m gpt_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--workdir", type=Path, help="a run, or an exported model; default: the newest run in artifacts/"
    )
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    parser.add_argument("--text", type=Path, help="a UTF-8 text; default: the validation split")
    flags = parser.parse_args()
    use_compilation_cache()
    workdir = flags.workdir or newest_run()
    run = load(workdir, flags.which)
    loss, n_characters = evaluate(run, flags.text)
    print(f"run        {workdir}, {run.source}, step {run.step:,}")
    print(f"text       {flags.text or 'validation split'}, {n_characters:,} characters predicted")
    print(f"loss       {loss:.4f} nats per character")
    print(f"           {loss / math.log(2):.4f} bits per character")
    print(f"perplexity {math.exp(loss):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
