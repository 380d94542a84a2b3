"""The command evaluate."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.newest_run import newest_run
from gpt_jax.interchange.evaluation import evaluate
from gpt_jax.interchange.trained_model import load
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache

PURPOSE = "The loss of a trained model, on its validation split or on another text."
EXAMPLES = ("--workdir artifacts/shakespeare_cpu", "--workdir artifacts/pretrained --text other.txt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, evaluate, print."""
    parser = ArgumentParser("evaluate", PURPOSE, EXAMPLES)
    flag = parser.add_argument
    flag("--workdir", type=Path, metavar="DIR", help="a run or exported model (newest in artifacts/)")
    flag("--which", choices=("best", "last"), default="best", help="checkpoint (%(default)s)")
    flag("--text", type=Path, metavar="FILE", help="a text to evaluate (the model's validation split)")
    flags = parser.parse_args(arguments)
    use_compilation_cache()
    workdir = flags.workdir or newest_run()
    model = load(workdir, flags.which)
    with compiling_on_stderr("evaluation"):
        model.loss(np.zeros(2, np.int32))
    with LoadingBar(sys.stderr) as progress:
        result = evaluate(model, flags.text, progress)
    print(f"run        {workdir}, {model.source}, step {model.step:,}")
    print(f"text       {result.text}, {result.n_tokens:,} tokens predicted")
    print(f"loss       {result.loss:.4f} nats per token")
    for unit, bits in (("character", result.bits_per_character), ("byte", result.bits_per_byte)):
        if bits is not None:
            print(f"           {bits:.4f} bits per {unit}")
    print(f"perplexity {math.exp(result.loss):.3f}")
    return 0
