"""Short stories, from data of yours. For a GPU.

    python -m gpt_jax prepare TinyStories-train.jsonl --tokenizer bpe:4096 --out data/tinystories
    python train.py --config configs/tinystories.py

Expect: not yet measured. 29.4M parameters, 20,000 steps of 65,536 tokens: 1.3 billion tokens. The recipe is
that of shakespeare_best.py, with less weight decay and no dropout, since no story is seen more than a few
times.

Data: TinyStories (Eldan and Li 2023, arXiv:2305.07759), on Hugging Face as roneneldan/TinyStories. Its text
files have a line `<|endoftext|>` between stories. This makes one JSON object of each, so that `prepare` puts
an end-of-text token there, and sampling ends with the story:

    import json
    with open("TinyStories-train.txt", encoding="utf-8") as file, open("TinyStories-train.jsonl", "w") as out:
        story = ""
        for line in file:
            if line.strip() == "<|endoftext|>":
                print(json.dumps({"text": story.strip()}), file=out)
                story = ""
            else:
                story += line
"""

from ml_collections import ConfigDict

from gpt_jax.config import Config


def get_config() -> ConfigDict:
    """The recipe."""
    config = Config().to_config_dict()
    config.data.update(path="data/tinystories")
    config.model.update(
        n_layer=8, n_head=8, d_model=512, context=512, norm="rmsnorm", activation="relu2", position="rope",
        qk_norm=True, conv_width=3, x0_residual=True, tied_embedding=False, zero_init=True,
    )  # fmt: skip
    config.optimizer.update(
        name="muon", muon_learning_rate=0.02, weight_decay=0.1, learning_rate=5e-3, b1=0.9, b2=0.95,
        schedule="linear", warmup_steps=200, min_lr_ratio=0.0,
    )  # fmt: skip
    config.train.update(
        steps=20_000, batch_size=128, eval_every=1000, eval_tokens=2**20, log_every=20, sample_length=300,
    )  # fmt: skip
    return config
