"""Our models in transformers and theirs here: the same logits and text. Needs the extra `interop`."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import need
from test_foreign import CHARACTERS, FAMILIES, ROPE, TEXT, TOKENIZERS, random_model

import gpt_jax
from gpt_jax.errors import UserError
from gpt_jax.interchange.exporting import export_elsewhere

torch, transformers = need("torch"), need("transformers")

TOLERANCE = 1e-4
CONFIGS = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt2_exact": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "activation_function": "gelu",
         "n_inner": 48},
    ),
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 10, "num_key_value_heads": 1}),
    "qwen3_bias": ("Qwen3Config", {"head_dim": 8, "num_key_value_heads": 4, "attention_bias": True}),
    "arcee": ("ArceeConfig", {"num_key_value_heads": 2, "mlp_bias": True}),
}  # fmt: skip
LIKE_LLAMA = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
              "max_position_embeddings": 128, 
              "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}  # fmt: skip


def their_model(name):
    """A random model of transformers, on our vocabulary of characters."""
    kind, settings = CONFIGS[name]
    settings = settings if name.startswith("gpt2") else LIKE_LLAMA | settings
    numbers = {"vocab_size": CHARACTERS.vocab_size, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings, **numbers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def their_text(model, ids, length):
    """The ids that a model of transformers writes, greedily, with its own cache."""
    prompt = torch.tensor([ids])
    how = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    drawn = model.generate(prompt, max_new_tokens=length, **how)
    return drawn[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_what_we_export(name, tmp_path):
    model = random_model(**FAMILIES[name])
    export_elsewhere(model, tmp_path / "model", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == CHARACTERS.encode(TEXT).tolist()
    assert tokenizer.decode(ids) == TEXT
    np.testing.assert_allclose(their_logits(theirs, ids), model.logits(TEXT), rtol=0, atol=TOLERANCE)
    assert tokenizer.decode(their_text(theirs, ids[:20], 100)) == model.generate(TEXT[:20], 100, greedy=True)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_transformers_reads_text_as_we_do(name, tmp_path):
    tokenizer = TOKENIZERS[name]
    export_elsewhere(random_model(tokenizer, **FAMILIES["llama"]), tmp_path / "model", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "née the fox<|endoftext|>, and\n\n  ROMEO"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.eos_token_id == model.config.bos_token_id == theirs.eos_token_id == tokenizer.end_id


@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_what_transformers_saves(name, tmp_path):
    theirs = their_model(name)
    export_elsewhere(random_model(), tmp_path / "tokenizer", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    theirs.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len([*(tmp_path / "model").glob("*.safetensors")]) > 1
    model = gpt_jax.load(tmp_path / "model")
    ids = CHARACTERS.encode(TEXT).tolist()
    np.testing.assert_allclose(model.logits(TEXT), their_logits(theirs, ids), rtol=0, atol=TOLERANCE)
    ours = model.generate(TEXT[:20], 100, greedy=True)
    assert ours == CHARACTERS.decode(np.array(their_text(theirs, ids[:20], 100)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_transformers_reads_smaller_types(dtype, tmp_path):
    export_elsewhere(random_model(**FAMILIES["llama"]), tmp_path / "model", "hf", dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    model = gpt_jax.load(tmp_path / "model")
    ids = CHARACTERS.encode(TEXT).tolist()
    np.testing.assert_allclose(their_logits(theirs, ids), model.logits(TEXT), rtol=0, atol=TOLERANCE)


def test_the_command_of_the_page_writes_text(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "models.md"
    command = re.search(r'python -c "(from transformers .*)"', page.read_text(encoding="utf-8"))[1]
    export_elsewhere(random_model(), tmp_path / "exported" / "a", "hf")
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", command], **run).stdout.startswith("ROMEO:")


def write_nanogpt(folder, bias):
    """A checkpoint as nanoGPT's train.py saves it; returns a model of transformers that computes the same."""
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(
        **settings, n_positions=128, vocab_size=CHARACTERS.vocab_size, activation_function="gelu",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter += 0.2 * torch.randn_like(parameter)
            parameter *= bias or not name.endswith("bias")
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {
        f"_orig_mod.{name}": tensor.T.contiguous() if name.endswith(transposed) else tensor
        for name, tensor in theirs.state_dict().items()
        if bias or not name.endswith("bias")
    }
    settings |= {"block_size": 128, "bias": bias, "dropout": 0.0, "vocab_size": CHARACTERS.vocab_size}
    saved = {
        "model": tensors, "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}}, "model_args": settings,
        "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char"},
    }  # fmt: skip
    torch.save(saved, folder / "ckpt.pt")
    itos = dict(enumerate(CHARACTERS.characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {character: i for i, character in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return theirs


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_is_read(bias, tmp_path):
    theirs = write_nanogpt(tmp_path, bias)
    model = gpt_jax.load(tmp_path)
    assert model.step == 7 and model.config.model.bias is bias
    ids = CHARACTERS.encode(TEXT).tolist()
    np.testing.assert_allclose(model.logits(TEXT), their_logits(theirs, ids), rtol=0, atol=TOLERANCE)


def test_masks_and_odd_parts_of_a_checkpoint_of_nanogpt(tmp_path):
    """Without flash attention it has masks, which are no parameters. Anything else is one line."""
    write_nanogpt(tmp_path, True)
    logits = gpt_jax.load(tmp_path).logits(TEXT)
    saved = torch.load(tmp_path / "ckpt.pt")

    def save(**parts):
        torch.save(saved | parts, tmp_path / "ckpt.pt", _use_new_zipfile_serialization="old" not in parts)

    save(old=1, model=saved["model"] | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)})
    np.testing.assert_array_equal(gpt_jax.load(tmp_path).logits(TEXT), logits)
    bad = [
        {"model_args": "x"}, {"model_args": None}, {"model_args": {}}, {"iter_num": None}, {"model": {}},
        {"model": [1]}, {"model": {"a": 1}}, {"model": {1: torch.ones(1)}},
        {"model": {"a": torch.ones(2, 2).to_sparse()}},
        {"model": saved["model"] | {"transformer.ln_f.weight": torch.ones(3)}},
    ]  # fmt: skip
    for parts in bad:
        save(**parts)
        with pytest.raises(UserError, match=f"^nanoGPT, {tmp_path}") as raised:
            gpt_jax.load(tmp_path)
        assert "\n" not in str(raised.value)
    save()
    (tmp_path / "meta.pkl").unlink()
    with pytest.raises(UserError, match=r"meta\.pkl is missing beside it: copy it there"):
        gpt_jax.load(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"")
    with pytest.raises(UserError, match="it is no checkpoint of nanoGPT"):
        gpt_jax.load(tmp_path)


class Attack:
    """A pickle that would make a file when it is read."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_no_code_in_a_checkpoint_of_nanogpt_runs(tmp_path):
    write_nanogpt(tmp_path, bias=True)
    torch.save({"model": Attack(tmp_path / "made"), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="it is no checkpoint of nanoGPT") as raised:
        gpt_jax.load(tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif("LLAMA2C" not in os.environ, reason="LLAMA2C names a folder with run.c of llama2.c")
@pytest.mark.parametrize("more", [{}, {"n_kv_head": 2, "tied_embedding": False}], ids=["tied", "grouped"])
def test_run_c_writes_the_same_text(more, tmp_path):
    """`test_foreign.py` has the same in NumPy, which needs no C program."""
    source = Path(os.environ["LLAMA2C"]) / "run.c"
    subprocess.run(["cc", "-O2", source, "-lm", "-o", tmp_path / "run"], check=True)
    model = random_model(**ROPE, activation="swiglu", norm_eps=1e-5, **more)
    export_elsewhere(model, tmp_path / "model", "llama2c")
    files = ["model/model.bin", "-z", "model/tokenizer.bin"]
    command = [tmp_path / "run", *files, "-t", "0", "-n", "100", "-i", "KING"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout.decode()
    # It begins each text with a space, which it does not show.
    ours = "KING" + model.generate("\n KING", 95, greedy=True)
    assert len(found) > 90 and ours.startswith(found.rstrip("\n"))
