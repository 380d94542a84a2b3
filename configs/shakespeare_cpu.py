"""A small modern GPT, in minutes on two CPU cores.

    python train.py --config configs/shakespeare_cpu.py

Expect: validation loss 1.433 (1.430 to 1.437, three seeds) after 4 min 29 s to 4 min 50 s on two cores of an
AMD EPYC (Zen 4), JAX 0.12.0.1; 1.428 after 4 min 52 s with JAX 0.9.2 (one run). More: benchmarks/RECORDS.md.
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.model.update(
        n_layer=4, n_head=2, d_model=160, context=256, norm="rmsnorm", activation="relu2",
        position="rope", qk_norm=True, bigram=True, conv_width=3, x0_residual=True, tied_embedding=False,
        zero_init=True, query_blocks=4,
    )  # fmt: skip
    config.optimizer.update(
        name="muon", muon_learning_rate=0.02, muon_momentum=0.9, learning_rate=1e-2, b1=0.9, b2=0.95,
        weight_decay=0.15, embedding_decay=1.0, schedule="linear", warmup_steps=50, min_lr_ratio=0.0,
    )  # fmt: skip
    config.train.update(steps=1500, batch_size=8, eval_every=750, log_every=50)
    return config
