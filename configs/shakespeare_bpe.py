"""512 byte-pair tokens, as long as shakespeare_cpu.py.

    pip install -e '.[bpe]'
    python train.py --config configs/shakespeare_bpe.py

Expect: validation loss 2.67 nats per token, which is 2.053 bits per byte (2.042 to 2.062, three seeds), where
shakespeare_cpu.py has 2.068 in the same time. benchmarks/RECORDS.md has other sizes of the vocabulary.
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe of shakespeare_cpu.py, with dropout and without the bigram embedding, which overfits."""
    config = Config().to_config_dict()
    config.data.update(tokenizer="bpe:512")
    config.model.update(
        n_layer=4, n_head=2, d_model=160, context=128, norm="rmsnorm", activation="relu2", position="rope",
        qk_norm=True, conv_width=3, x0_residual=True, tied_embedding=False, zero_init=True, dropout=0.1,
        query_blocks=4,
    )  # fmt: skip
    config.optimizer.update(
        name="muon", muon_learning_rate=0.02, muon_momentum=0.9, learning_rate=1e-2, b1=0.9, b2=0.95,
        weight_decay=0.15, embedding_decay=1.0, schedule="linear", warmup_steps=50, min_lr_ratio=0.0,
    )  # fmt: skip
    config.train.update(steps=1450, batch_size=16, eval_every=725, log_every=50)
    return config
