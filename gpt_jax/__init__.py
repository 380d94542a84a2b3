"""A small GPT trainer in JAX and Flax.

The Python face:

    import gpt_jax
    run = gpt_jax.load("artifacts/shakespeare_cpu", which="best")
    run.generate("ROMEO:", length=500, temperature=0.8, seed=0)
    run.logits("To be")
    run.loss("To be, or not to be")
"""

import os

# Read when jaxlib is imported: jaxlib 0.9 warns for each program that it reads from the compilation cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from gpt_jax.errors import UserError
from gpt_jax.run import Run, load

__all__ = ["Run", "UserError", "load"]
