"""nanoGPT's recipe, 10.7M weights. For a GPU or TPU.

    python train.py --config configs/shakespeare.py

Expect: not yet measured on a GPU or TPU, nor trained to the end. On two cores of an AMD EPYC (Zen 5) a step
took 5.4 to 6.4 s (JAX 0.12.0.1), so the run takes 7.5 to 9 hours with evaluation, in 1.4 GiB of memory. With
the current dropout masks, which are newer than these timings, a step of 4 windows takes 0.83 times as long.
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.model.update(n_layer=6, n_head=6, d_model=384, context=256, dropout=0.2, attention_dropout=0.2)
    config.optimizer.update(
        learning_rate=1e-3, schedule="cosine", warmup_steps=100, min_lr_ratio=0.1,
        b2=0.99, weight_decay=0.1, clip_norm=1.0,
    )  # fmt: skip
    config.train.update(steps=5000, batch_size=64, eval_every=250)
    return config
