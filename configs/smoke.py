"""A tiny model to check that everything works.

    python train.py --config configs/smoke.py

Expect: validation loss 3.195 (JAX 0.7.2, 0.9.2 and 0.12.0.1) after about 30 s of CPU time on one Zen 3 core.
With compiled programs in the cache it takes 12 s.
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.model.update(n_layer=1, n_head=2, d_model=32, context=32)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=4)
    config.train.update(steps=40, batch_size=8, eval_every=20, log_every=5, sample_length=80)
    return config
