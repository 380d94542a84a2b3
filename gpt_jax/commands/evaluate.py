"""The command evaluate."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.commands.newest_run import newest_run
from gpt_jax.interchange.evaluation import evaluate_side_by_side
from gpt_jax.interchange.trained_model import load
from gpt_jax.model.params import count_params
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.storage.compilation_cache import compiling_on_stderr, use_compilation_cache

PURPOSE = "The loss of a trained model, or of several side by side, on one text."
EXAMPLES = ("--workdir artifacts/pretrained --text other.txt", "--workdir runs/a runs/b --ensemble")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, evaluate, print."""
    parser = ArgumentParser("evaluate", PURPOSE, EXAMPLES)
    flag, about = parser.add_argument, "runs or exported models (newest in artifacts/)"
    flag("--workdir", type=Path, metavar="DIR", nargs="+", action="extend", help=about)
    flag("--which", choices=("best", "last"), default="best", help="checkpoint (%(default)s)")
    flag("--text", type=Path, metavar="FILE", help="a text (the first model's validation split)")
    flag("--ensemble", action="store_true", help="also average the probabilities of the models")
    flags = parser.parse_args(arguments)
    use_compilation_cache()
    workdirs = flags.workdir or [newest_run()]
    models = [load(workdir, flags.which) for workdir in workdirs]
    with compiling_on_stderr("evaluation"):
        for model in models:
            (model.losses if flags.ensemble else model.loss)(np.zeros(2, np.int32))
    with LoadingBar(sys.stderr) as progress:
        results = evaluate_side_by_side(models, flags.text, progress, flags.ensemble)
    if len(results) > 1:
        sizes = [count_params(model.params) for model in models]
        rows = zip(results, [*workdirs, f"ensemble of {len(models)}"], [*sizes, sum(sizes)], strict=False)
        print(f"text  {results[0].text}")
        print("nats/token  bits/character  bits/byte  parameters  model, best first")
        for result, name, size in sorted(rows, key=lambda row: row[0].loss * row[0].n_tokens):
            units = result.bits_per_character or math.nan, result.bits_per_byte or math.nan
            print(f"{result.loss:10.4f}  {units[0]:14.4f}  {units[1]:9.4f}  {size:10,}  {name}")
        return 0
    model, result = models[0], results[0]
    print(f"run        {workdirs[0]}, {model.source}, step {model.step:,}")
    print(f"text       {result.text}, {result.n_tokens:,} tokens predicted")
    print(f"loss       {result.loss:.4f} nats per token")
    for unit, bits in (("character", result.bits_per_character), ("byte", result.bits_per_byte)):
        if bits is not None:
            print(f"           {bits:.4f} bits per {unit}")
    print(f"perplexity {math.exp(result.loss):.3f}")
    return 0
