"""The loss of nanoGPT's CPU recipe, 1.88, in seconds.

    python train.py --config configs/shakespeare_quick.py

Expect: 1.842 after 11 s on two cores of an AMD EPYC (Zen 4), JAX 0.12.0.1, where nanoGPT's recipe takes 81 s
(benchmarks/RECORDS.md).
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.model.update(
        n_layer=1, n_head=2, d_model=128, context=64, norm="rmsnorm", activation="relu2", position="rope",
        qk_norm=True, bigram=True, x0_residual=True, tied_embedding=False, zero_init=True,
    )  # fmt: skip
    config.optimizer.update(
        name="muon", muon_learning_rate=0.02, muon_momentum=0.9, learning_rate=1e-2, b1=0.9, b2=0.95,
        weight_decay=0.0, schedule="linear", warmup_steps=10, min_lr_ratio=0.0,
    )  # fmt: skip
    config.train.update(steps=220, batch_size=16, eval_every=220, log_every=50)
    return config
