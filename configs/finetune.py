"""Go on from the shipped model, on a text of your own.

    python train.py --config configs/finetune.py --config.data.path=my.txt --workdir runs/fine_tuned

Expect, on the 346,330 characters of Job to the Song of Solomon (King James): validation loss 1.063 after
291 s on two cores of an Intel Xeon. In the same time shakespeare_cpu.py reaches 1.183 on that text from
random parameters (best checkpoint; one run each, JAX 0.12.0.1).
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.init_from = "artifacts/pretrained"
    config.data.update(extend_vocabulary=True)
    config.model.update(dropout=0.1, query_blocks=4)
    config.optimizer.update(
        name="muon", muon_learning_rate=0.002, muon_momentum=0.9, learning_rate=1e-3, b1=0.9, b2=0.95,
        weight_decay=0.15, embedding_decay=1.0, schedule="linear", warmup_steps=20, min_lr_ratio=0.0,
    )  # fmt: skip
    config.train.update(steps=300, batch_size=8, eval_every=150, log_every=20)
    return config
