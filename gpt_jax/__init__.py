"""A small GPT trainer in JAX and Flax.

From Python:

    import gpt_jax
    model = gpt_jax.train("configs/smoke.py", workdir="runs/a", **{"train.steps": 100})
    model = gpt_jax.load("artifacts/pretrained")
    model.generate("ROMEO:", length=500, temperature=0.8, seed=0)
    model.logits("To be")
    model.attention("To be")
    model.loss("To be, or not to be")
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Read when jaxlib is imported. jaxlib 0.9 logs two "errors" for each program that it reads from the cache
# (LLVM's tuning flags are not CPU features). Real failures still raise exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import TrainedModel, load
from gpt_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from gpt_jax.trainer.trainer import Callback, StepInfo, Trainer, train

__all__ = ["Callback", "RunError", "StepInfo", "TrainedModel", "Trainer", "UserError", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import the trainer when it is used: optax and Orbax take a second; a trained model needs neither."""
    if name in ("Callback", "StepInfo", "Trainer", "train"):
        return getattr(importlib.import_module("gpt_jax.trainer.trainer"), name)
    raise AttributeError(f"module 'gpt_jax' has no attribute {name!r}")
