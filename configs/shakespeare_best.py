"""For a lower loss, 10.7M weights. For a GPU or TPU.

    python train.py --config configs/shakespeare_best.py

Expect: not yet measured; `shakespeare_cpu_long.py`, half the size, reaches 1.4000. The recipe combines what
lowered the loss of small models here (a convolution before the MLP, a residual connection from the embedding
to each block, Muon, weight decay of embeddings and head, linear decay of the learning rate to zero:
benchmarks/RECORDS.md) with what the best public recipe of this size has: strong weight decay, and dropout on
what each block adds (github.com/JiHa-Kim/tinyshakespeare-gpt, 1.391 over 200 random batches). It trains for
thirty-three epochs, in which a bigram embedding seems to overfit, so it has none.
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.model.update(
        n_layer=6, n_head=6, d_model=384, context=256, norm="rmsnorm", activation="relu2", position="rope",
        qk_norm=True, conv_width=3, x0_residual=True, tied_embedding=False, zero_init=True, dropout=0.15,
    )  # fmt: skip
    config.optimizer.update(
        name="muon", muon_learning_rate=0.035, weight_decay=0.33, learning_rate=1e-2, embedding_decay=1.0,
        b1=0.9, b2=0.95, schedule="linear", warmup_steps=100, min_lr_ratio=0.0,
    )  # fmt: skip
    config.train.update(steps=2000, batch_size=64, eval_every=100)
    return config
