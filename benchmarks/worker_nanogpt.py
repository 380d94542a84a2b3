"""nanoGPT as a contender, see contest.py. It needs torch, and a checkout of nanoGPT; nothing of this package.

Tasks: "train" does steps as nanoGPT's train.py does them, in float32 on a CPU and bfloat16 on a GPU; "sample"
generates with its `generate`.
"""

import json
import sys
import time

import torch


def main() -> None:
    """Prepare, and work when told to."""
    task = json.loads(sys.argv[1])
    sys.path.insert(0, task["checkout"])
    from model import GPT, GPTConfig

    shape, device = task["shape"], "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    config = GPTConfig(
        block_size=shape["context"], vocab_size=shape["vocab_size"], n_layer=shape["n_layer"],
        n_head=shape["n_head"], n_embd=shape["d_model"], dropout=shape["dropout"], bias=False,
    )  # fmt: skip
    sys.stdout = sys.stderr  # the model prints
    model = GPT(config).to(device)
    if task["task"] == "train":
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
        if task["compiled"]:
            model = torch.compile(model)

    def work() -> None:
        if task["task"] == "sample":
            model.eval()
            prompt = torch.zeros((1, task["prompt"]), dtype=torch.long, device=device)
            model.generate(prompt, task["length"], temperature=0.8)
            return
        model.train()
        # Tokens come from memory, so that no disk is measured.
        batch = torch.randint(shape["vocab_size"], (shape["batch_size"], shape["context"] + 1)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            _, loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}
    print(json.dumps(facts), file=sys.__stdout__, flush=True)
    for _ in sys.stdin:
        begun = time.monotonic()
        for _ in range(task["steps"]):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        print(time.monotonic() - begun, file=sys.__stdout__, flush=True)


main()
