"""A small Llama that other programs can run too.

It is shakespeare_cpu.py without what only gpt_jax has.

    python train.py --config configs/shakespeare_llama.py
    python -m gpt_jax export --workdir artifacts/shakespeare_llama --format hf --out exported/llama

Expect: validation loss 1.448 after 5 min 48 s on two cores of an Intel Xeon, where shakespeare_cpu.py had
1.434 after 5 min 54 s (one run each, JAX 0.12.0.1). More: benchmarks/RECORDS.md.
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.model.update(
        n_layer=4, n_head=4, d_model=160, context=256, norm="rmsnorm", norm_eps=1e-5, activation="swiglu",
        position="rope", tied_embedding=False, zero_init=True, query_blocks=4,
    )  # fmt: skip
    config.optimizer.update(
        name="muon", muon_learning_rate=0.02, muon_momentum=0.9, learning_rate=1e-2, b1=0.9, b2=0.95,
        weight_decay=0.15, embedding_decay=1.0, schedule="linear", warmup_steps=50, min_lr_ratio=0.0,
    )  # fmt: skip
    config.train.update(steps=1600, batch_size=8, eval_every=800, log_every=50)
    return config
