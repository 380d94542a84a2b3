"""GPT-2 small, 124M parameters. For a GPU or TPU.

    python train.py --config configs/gpt2_124m.py

llm.c's recipe: 10 billion tokens of FineWeb. Not trained: only compiled, see docs/accelerators.md. It is
that of scripts/run_gpt2_124M.sh in github.com/karpathy/llm.c, whose discussion 481 reports its result:
batches of 524,288 tokens, 18,865 of them (9.9 billion tokens, one epoch), a peak learning rate of 6e-4
after 700 steps, which falls to 0 by a cosine, AdamW with betas 0.9 and 0.95, weight decay 0.1, clipping at
1. As there, the loss of 10 million validation tokens is computed every 250 steps. llm.c's padding of the
vocabulary to 50,304 tokens is left out.

`data.path` is a folder of token files with llm.c's header, *_train_*.bin and *_val_*.bin. llm.c makes them:
`python dev/data/fineweb.py --version 10B`. A folder that `prepare --tokenizer gpt2` wrote works too.
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.data.update(path="data/fineweb10B", tokenizer="gpt2")
    config.model.update(n_layer=12, n_head=12, d_model=768, context=1024, bias=True)
    config.optimizer.update(
        learning_rate=6e-4, schedule="cosine", warmup_steps=700, min_lr_ratio=0.0,
        b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0,
    )  # fmt: skip
    config.train.update(steps=18_865, batch_size=512, eval_every=250, eval_tokens=10_485_760)
    return config
