"""A small GPT trainer in JAX and Flax.

From Python:

    import gpt_jax
    model = gpt_jax.load("artifacts/shakespeare_cpu", which="best")
    model.generate("ROMEO:", length=500, temperature=0.8, seed=0)
    model.logits("To be")
    model.attention("To be")
    model.loss("To be, or not to be")
"""

import os

# Read when jaxlib is imported: jaxlib 0.9 warns about each program that it reads from the compilation cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import TrainedModel, load
from gpt_jax.version import __version__

__all__ = ["RunError", "TrainedModel", "UserError", "__version__", "load"]
