"""A larger recipe for about an hour on two CPU cores.

    python train.py --config configs/shakespeare_cpu_long.py

Expect: validation loss 1.4000 after 64 minutes on two cores of an AMD EPYC (Zen 4), JAX 0.12.0.1 (one run,
with the dropout masks of an earlier version).
It is `shakespeare_cpu.py` with a larger model, larger batches, a longer warm-up and, for these batches, a
momentum of 0.95. It trains for twelve epochs, so it has dropout, and no bigram embedding, which seems to
overfit in that many epochs (benchmarks/RECORDS.md).
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.model.update(
        n_layer=6, n_head=4, d_model=256, context=256, norm="rmsnorm", activation="relu2",
        position="rope", qk_norm=True, conv_width=3, x0_residual=True, tied_embedding=False,
        zero_init=True, query_blocks=4, dropout=0.2,
    )  # fmt: skip
    config.optimizer.update(
        name="muon", muon_learning_rate=0.02, muon_momentum=0.95, learning_rate=1e-2, b1=0.9, b2=0.95,
        weight_decay=0.15, embedding_decay=1.0, schedule="linear", warmup_steps=100, min_lr_ratio=0.0,
    )  # fmt: skip
    config.train.update(steps=3000, batch_size=16, eval_every=500, log_every=50)
    return config
