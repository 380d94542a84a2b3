"""Models of other programs, without these programs: what is written, what is read back, what is refused."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import some
from flax import linen as nn
from safetensors.flax import load_file, save_file

import gpt_jax
from gpt_jax.commands import export as export_command
from gpt_jax.config import Config, ModelConfig
from gpt_jax.data.bpe import END, BPETokenizer, ByteTokenizer, train_bpe
from gpt_jax.data.tokenizer_json import NAME_OF
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.errors import UserError
from gpt_jax.interchange.evaluation import evaluate
from gpt_jax.interchange.exporting import export, export_elsewhere
from gpt_jax.interchange.trained_model import TrainedModel, _for_one_device
from gpt_jax.model.cache import empty_cache
from gpt_jax.model.params import init_params
from gpt_jax.sampling.generate import generate_tokens
from gpt_jax.sampling.rules import make_rules
from gpt_jax.storage.metadata import Metadata

ROPE = {"norm": "rmsnorm", "position": "rope"}
OWN_HEAD = {"tied_embedding": False, "norm_eps": 1e-5, "rope_base": 500_000.0}
FAMILIES = {
    "gpt2": {},
    "gpt2_bias": {"bias": True, "d_mlp": 40, "norm_eps": 0.01},
    "gpt2_exact": {"bias": True, "activation": "gelu_exact", "tied_embedding": False},
    "llama": ROPE | {"activation": "swiglu"},
    "llama_grouped": ROPE | OWN_HEAD | {"activation": "swiglu", "n_kv_head": 2, "d_head": 12, "bias": True},
    "qwen3": ROPE | {"activation": "swiglu", "qk_norm": True},
    "qwen3_grouped": ROPE
    | OWN_HEAD
    | {"activation": "swiglu", "qk_norm": True, "n_kv_head": 1, "d_head": 10},
    "arcee": ROPE | {"activation": "relu2"},
    "arcee_grouped": ROPE | OWN_HEAD | {"activation": "relu2", "n_kv_head": 2, "bias": True},
}
CHARACTERS = CharTokenizer.from_text("\n" + "".join(map(chr, range(32, 127))))
TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind"


def random_model(tokenizer=CHARACTERS, context=128, **options) -> TrainedModel:
    """A model with random parameters, all of them different from 0 and from 1."""
    shape = {"n_layer": 2, "n_head": 4, "d_model": 32, "context": context, "init_std": 0.3}
    metadata = Metadata(Config(model=ModelConfig(**shape | options)), tokenizer, "", 0, None, [], {})
    plan, module = _for_one_device(metadata)
    params = nn.unbox(init_params(module, jax.random.key(0)))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    return TrainedModel(metadata, plan, module, params, "random parameters", Path())


def written(folder, name="llama_grouped", **more) -> Path:
    """A folder of transformers."""
    export_elsewhere(random_model(**FAMILIES[name] | more), folder / "model", "hf")
    return folder / "model"


@pytest.mark.parametrize("name", some(*FAMILIES, quick=5))
def test_a_hugging_face_folder_is_read_back(name, tmp_path):
    model = random_model(**FAMILIES[name])
    export_elsewhere(model, tmp_path / "model", "hf")
    back = gpt_jax.load(tmp_path / "model")
    np.testing.assert_array_equal(back.logits(TEXT), model.logits(TEXT))
    assert back.tokenizer == CHARACTERS
    assert back.source == "Hugging Face folder"
    assert back.generate("To be", 200, seed=3) == model.generate("To be", 200, seed=3)


def shard(folder, dtype):
    """Write the parameters again: another type, several files, an order of names that is not theirs."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors, key=lambda name: name[::-1])
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name].astype(dtype) for name in names if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_shards_of_any_type_are_read(dtype, tmp_path):
    folder = written(tmp_path)
    model = gpt_jax.load(folder)
    shard(folder, dtype)
    back = gpt_jax.load(folder)
    rounded = jax.tree.map(lambda p: p.astype(dtype).astype(jnp.float32), model.params)
    jax.tree.map(np.testing.assert_array_equal, back.params, rounded)


def test_old_names_and_buffers_are_read(tmp_path):
    """As in the folder `gpt2` of the hub: without the prefix, and with masks that are no parameters."""
    folder = written(tmp_path, "gpt2_bias")
    logits = gpt_jax.load(folder).logits(TEXT)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"h.0.attn.bias": jnp.ones((1, 1, 8, 8)), "h.0.attn.masked_bias": jnp.float32(-1e4)}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    save_file(tensors, folder / "model.safetensors")
    np.testing.assert_array_equal(gpt_jax.load(folder).logits(TEXT), logits)


def test_rows_without_a_token_are_never_drawn(tmp_path):
    model = random_model(**FAMILIES["llama"], vocab_size=200)
    assert model.logits(TEXT).shape == (len(TEXT), 200)
    text = model.generate("To be", 300, temperature=1000.0)
    assert len(text) == 300 and set(text) <= set(CHARACTERS.characters)
    export_elsewhere(model, tmp_path / "model", "hf")
    assert gpt_jax.load(tmp_path / "model").config.model.vocab_size == 200


def test_a_long_context_needs_neither_a_long_cache_nor_a_long_prompt():
    """A text of a model with a context of 4,096 is that of a short context, which it does not fill."""
    short = random_model(**FAMILIES["llama"], context=512)
    long = random_model(**FAMILIES["llama"], context=4096)
    assert long.generate(TEXT, 200, seed=1) == short.generate(TEXT, 200, seed=1)


def change(folder, file, **values):
    """Change the JSON of a file; a value of None removes one."""
    old = json.loads((folder / file).read_text())
    new = {name: value for name, value in (old | values).items() if value is not None}
    (folder / file).write_text(json.dumps(new))


def change_tensors(folder, **tensors):
    """Change tensors; None removes one. Two underscores stand for a dot."""
    old = load_file(folder / "model.safetensors")
    new = old | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in new.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


LAYER_1 = "model__layers__1__mlp__down_proj__weight"
CONFIGS = {
    "no_architectures": (
        {"architectures": None},
        "config.json: architectures = None is not",
    ),
    "another": (
        {"architectures": ["MambaForCausalLM"]},
        "architectures = ['MambaForCausalLM'] is",
    ),
    "scaled_rope": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}},
        "rope_parameters = {'rope_type': 'yarn', 'rope_theta': 10000.0} is not supported, only the type",
    ),
    "nested_rope": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
        "rope_parameters = {'full_attention': {'rope_theta': 500000.0}} is not supported",
    ),
    "scaled_beside_plain_rope": (
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "rope_scaling = {'rope_type': 'linear', 'factor': 4.0} is not supported",
    ),
    "old_scaled_rope": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling = {'type': 'linear', 'factor': 2.0} is not supported, only the type 'default'",
    ),
    "partial_rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported, only 1"),
    "sliding_window": (
        {"use_sliding_window": True},
        "use_sliding_window = True is not",
    ),
    "sliding_layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = ['full_attention', 'sliding_attention'] is not supported",
    ),
    "odd_layers": ({"layer_types": [["a"], 3]}, "layer_types = [['a'], 3] is not supported"),
    "no_list_of_layers": ({"layer_types": 5}, "layer_types = 5 is not supported"),
    "no_epsilon": ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0 must be above 0"),
    "untied": ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding: set tie_word_embeddings"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
    "activation": ({"hidden_act": "mish"}, "hidden_act = 'mish' is not supported, only silu"),
    "no_size": ({"hidden_size": None}, "config.json: hidden_size is missing"),
    "wrong_type": ({"hidden_size": "32"}, "config.json: hidden_size = '32' must be of type int"),
    "too_large": ({"num_hidden_layers": 10**6}, "and its settings need"),
    "few_rows": (
        {"vocab_size": 50},
        "vocab_size = 50 is smaller than the 96 tokens of its tokenizer, which is another model's",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_not_supported_is_one_line(name, tmp_path):
    values, message = CONFIGS[name]
    folder = written(tmp_path)
    change(folder, "config.json", **values)
    with pytest.raises(UserError) as raised:
        gpt_jax.load(folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


GPT2_CONFIGS = {
    "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True,
}  # fmt: skip


@pytest.mark.parametrize("name", GPT2_CONFIGS)
def test_a_gpt2_that_is_not_supported_is_one_line(name, tmp_path):
    folder, value = written(tmp_path, "gpt2"), GPT2_CONFIGS[name]
    change(folder, "config.json", **{name: value})
    with pytest.raises(UserError, match=rf"config\.json: {name} = {value} is not supported, only"):
        gpt_jax.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b"[]", None])
def test_a_damaged_tokenizer_is_one_line(content, tmp_path):
    file = written(tmp_path) / "tokenizer.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match="its tokenizer cannot be used: ") as raised:
        gpt_jax.load(file.parent)
    assert "\n" not in str(raised.value) and str(file.parent) in str(raised.value)


def test_the_vocabulary_of_gpt2_may_be_in_two_files(tmp_path):
    folder = written(tmp_path, "gpt2", vocab_size=300)
    names = [NAME_OF[byte] for byte in range(256)]
    merged = names[ord("t")] + names[ord("h")]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate([*names, merged, END])}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    (folder / "tokenizer.json").unlink()
    model = gpt_jax.load(folder)
    assert model.tokenizer.encode("that").tolist() == [256, ord("a"), ord("t")]
    assert model.tokenizer.vocab_size == 258 and model.logits("that").shape == (3, 300)


TENSORS = {
    "missing": ({LAYER_1: None}, "tensor model.layers.1.mlp.down_proj.weight is missing"),
    "extra": ({"model__rotary": jnp.ones(3)}, "model.safetensors: tensor model.rotary is not"),
    "shape": (
        {LAYER_1: jnp.ones((32, 87))},
        "tensor model.layers.1.mlp.down_proj.weight has shape (32, 87), and its settings need (32, 88)",
    ),
    "nan": ({LAYER_1: jnp.full((32, 88), np.nan)}, "down_proj.weight has values that are NaN"),
    "integers": ({LAYER_1: jnp.ones((32, 88), jnp.int32)}, "is I32, and must be one of F32, F16, BF16"),
    "twice": ({"norm__weight": jnp.ones(32)}, "tensors with and without 'model.' before their names"),
    "norm": ({"model__norm__weight": None}, "tensor model.norm.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_one_line(name, tmp_path):
    tensors, message = TENSORS[name]
    folder = written(tmp_path)
    change_tensors(folder, **tensors)
    with pytest.raises(UserError) as raised:
        gpt_jax.load(folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_files_that_are_damaged_are_one_line(tmp_path):
    folder = written(tmp_path)
    file = folder / "model.safetensors"
    good = file.read_bytes()

    def fails(*messages):
        with pytest.raises(UserError) as raised:
            gpt_jax.load(folder)
        assert all(message in str(raised.value) for message in (str(folder), *messages))
        assert "\n" not in str(raised.value)

    file.write_bytes(good[:-1])
    fails("model.safetensors")
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] += 4
    lying = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(lying)) + lying + good[8 + length :])
    fails("model.safetensors")
    file.write_bytes(struct.pack("<Q", 2**60) + good[8:])
    fails("model.safetensors")
    file.unlink()
    fails("there is no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    fails("pytorch_model.bin can run code when it is read", "safe_serialization=True")
    file.write_bytes(good)
    shard(folder, "float32")
    (folder / "model-1.safetensors").unlink()
    fails("model-1.safetensors: missing")
    file.write_bytes(good)
    (folder / "tokenizer.json").unlink()
    fails("its tokenizer cannot be used: there is no file")


def test_the_command_writes_each_format(run_here, tmp_path):
    folder = written(tmp_path, norm_eps=1e-5, rope_base=10_000.0, d_head=8, bias=False)
    logits = gpt_jax.load(folder).logits(TEXT)

    def command(*flags):
        return run_here(export_command.main, f"--workdir={folder}", "--out=out", *flags, cwd=tmp_path)

    done = command("--format=hf", "--dtype=bfloat16")
    assert done.returncode == 0 and "config.json, model.safetensors, tokenizer.json" in done.stdout
    np.testing.assert_allclose(gpt_jax.load(tmp_path / "out").logits(TEXT), logits, atol=0.5)
    for flags, message in (
        (
            ["--format=hf", "--text=x"],
            "--text does not go with --format hf, which needs no text: leave it out",
        ),
        (["--format=llama2c", "--dtype=float16"], "--dtype float16 does not go with --format llama2c"),
        (["--format=llama2c"], "out = out holds other files, such as config.json: name a new folder"),
    ):
        done = command(*flags)
        assert done.returncode == 2 and message in done.stderr
    shutil.rmtree(tmp_path / "out")
    done = command("--format=llama2c")
    assert done.returncode == 0 and "model.bin, tokenizer.bin" in done.stdout


EXPORTS = {
    "convolution": ({"conv_width": 3}, "model.conv_width = 3"),
    "bigram": ({"bigram": True}, "model.bigram = True"),
    "x0": (
        ROPE | {"activation": "relu2", "x0_residual": True},
        "arcee, the nearest, does not have model.x0_",
    ),
    "relu2_qk_norm": (ROPE | {"activation": "relu2", "qk_norm": True}, "qwen3, the nearest, does not have"),
    "odd_width": (
        ROPE | {"activation": "swiglu", "n_head": 3, "d_head": 8},
        "no multiple of model.n_head = 3",
    ),
    "gpt2_grouped": ({"n_kv_head": 2}, "gpt2, the nearest, does not have model.n_kv_head = 2"),
}


def test_a_model_that_does_not_know_its_text_needs_one(tmp_path):
    model, text = gpt_jax.load(written(tmp_path)), tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    assert evaluate(model, text).n_tokens == len(TEXT) - 1
    for needs_a_text in (lambda: evaluate(model), lambda: export(model, tmp_path / "out")):
        with pytest.raises(UserError, match=r"does not say which text it was trained on: .* --text FILE"):
            needs_a_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EXPORTS)
def test_what_transformers_does_not_have_is_named(name, tmp_path):
    options, message = EXPORTS[name]
    with pytest.raises(UserError, match="no kind of model in transformers is like this one") as raised:
        export_elsewhere(random_model(**options), tmp_path / "model", "hf")
    assert message in str(raised.value)
    assert not (tmp_path / "model").exists()


def test_a_parameter_that_float16_cannot_hold_writes_nothing(tmp_path):
    model = random_model()
    model = replace(model, params=jax.tree.map(lambda p: p * 1e6, model.params))
    with pytest.raises(UserError, match="dtype = 'float16' is too small for"):
        export_elsewhere(model, tmp_path / "model", "hf", "float16")
    assert not (tmp_path / "model").exists()


def run_c(folder, ids, length):
    """What run.c of llama2.c computes, in NumPy: `length` ids, greedily, after some."""
    data = (folder / "model.bin").read_bytes()
    D, F, L, H, G, V, T = struct.unpack("<7i", data[:28])
    numbers, K, at, V = np.frombuffer(data[28:], "<f4"), D // H, 0, -V  # below 0: there is a head

    def take(*shape):
        nonlocal at
        at += np.prod(shape)
        return numbers[at - np.prod(shape) : at].reshape(shape)

    embedding, attention_norm = take(V, D), take(L, D)
    wq, wk, wv, wo = take(L, D, D), take(L, G * K, D), take(L, G * K, D), take(L, D, D)
    mlp_norm, w1, w2, w3, final_norm = take(L, D), take(L, F, D), take(L, D, F), take(L, F, D), take(D)
    take(T * K)
    head = take(V, D)
    assert at == len(numbers)

    def norm(x, w):
        return w * x / np.sqrt((x**2).mean() + 1e-5)

    def rotated(x, position):
        pairs = x.reshape(-1, K // 2, 2)
        angles = position * 10000.0 ** -(np.arange(K // 2) * 2 / K)
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = pairs[..., 0], pairs[..., 1]
        return np.stack([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(x.shape)

    ids, keys, values = list(ids), [[] for _ in range(L)], [[] for _ in range(L)]
    for position in range(len(ids) + length - 1):
        x = embedding[ids[position]].astype(float)
        for layer in range(L):
            y = norm(x, attention_norm[layer])
            q = rotated(wq[layer] @ y, position).reshape(H, K)
            keys[layer].append(rotated(wk[layer] @ y, position).reshape(G, K))
            values[layer].append((wv[layer] @ y).reshape(G, K))
            k, v = (np.repeat(np.array(part[layer]), H // G, axis=1) for part in (keys, values))
            scores = np.einsum("hk,thk->ht", q, k) / np.sqrt(K)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            x = x + wo[layer] @ np.einsum("ht,thk->hk", weights, v).reshape(-1)
            y = norm(x, mlp_norm[layer])
            gate = w1[layer] @ y
            x = x + w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ y))
        if position >= len(ids) - 1:
            ids.append(int(np.argmax(head @ norm(x, final_norm))))
    return ids[-length:]


def read_pieces(file):
    """The bytes of each token in a tokenizer.bin."""
    data, at, pieces = file.read_bytes(), 4, []
    while at < len(data):
        length = struct.unpack("<i", data[at + 4 : at + 8])[0]
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    assert struct.unpack("<i", data[:4])[0] == max(map(len, pieces))
    return pieces


def encode_c(pieces, text):
    """The ids that run.c makes of a prompt: each character, or else its bytes; then pairs are joined."""
    ids = [1]
    for character in " " + text:
        piece = character.encode()
        ids += [pieces.index(piece)] if piece in pieces else [byte + 3 for byte in piece]
    while True:
        pairs = [(pieces.index(both), i) for i in range(1, len(ids) - 1)
                 if (both := pieces[ids[i]] + pieces[ids[i + 1]]) in pieces]  # fmt: skip
        if not pairs:
            return ids
        joined, i = min(pairs)  # the highest score
        ids[i : i + 2] = [joined]


BPE = train_bpe(300, ["the quick brown fox jumps over the lazy dog. Noël, née: ROMEO and Juliet. "] * 20)
SWAPPED = BPETokenizer((*BPE.tokens[255::-1], *BPE.tokens[256:]))
TOKENIZERS = {"char": CHARACTERS, "byte": ByteTokenizer(), "bpe": BPE, "bpe, bytes in another order": SWAPPED}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("more", [{}, {"n_kv_head": 2, "tied_embedding": False}], ids=["tied", "grouped"])
def test_llama2c_computes_the_same(name, more, tmp_path):
    tokenizer = TOKENIZERS[name]
    model = random_model(tokenizer, **ROPE, activation="swiglu", norm_eps=1e-5, **more)
    export_elsewhere(model, tmp_path / "model", "llama2c")
    pieces = read_pieces(tmp_path / "model" / "tokenizer.bin")
    assert pieces[1] == b"<s>" and len(set(pieces)) == len(pieces)
    prompt = "ROMEO, the fox: " if tokenizer is CHARACTERS else "ROMEO, née the fox: "
    read = encode_c(pieces, prompt)
    assert b"".join(pieces[i] for i in read[1:]) == f" {prompt}".encode()
    theirs = run_c(tmp_path / "model", read, 60)
    start = np.array([tokenizer.start_id, *tokenizer.encode(" " + prompt)], np.int32)
    assert len(start) == len(read)
    rules, key = make_rules(greedy=True), jax.random.key(0)
    drawn = list(generate_tokens(model.module, model.params, [start], 60, rules, key))
    ours = tokenizer.decode(np.concatenate(drawn, axis=1)[0])
    assert b"".join(pieces[i] for i in theirs).decode(errors="replace") == ours


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu2"}, "model.activation = 'relu2'"),
        ({"activation": "swiglu", "norm_eps": 1e-6}, "model.norm_eps = 1e-06, only 1e-05"),
        (
            {"activation": "swiglu", "norm_eps": 1e-5, "rope_base": 5e5},
            "model.rope_base = 500000.0, only",
        ),
        ({"activation": "swiglu", "norm_eps": 1e-5, "d_head": 4}, "model.d_head = 4, only 8"),
    ],
)
def test_what_llama2c_does_not_have_is_named(options, message, tmp_path):
    with pytest.raises(UserError, match=r"llama2\.c does not have") as raised:
        export_elsewhere(random_model(**ROPE | options), tmp_path / "model", "llama2c")
    assert message in str(raised.value)
    assert not (tmp_path / "model").exists()


def test_llama2c_needs_a_space(tmp_path):
    model = random_model(CharTokenizer.from_text("abc"), **ROPE, activation="swiglu", norm_eps=1e-5)
    with pytest.raises(UserError, match="begins each prompt with a space, which is not in the vocabulary"):
        export_elsewhere(model, tmp_path / "model", "llama2c")
    assert not (tmp_path / "model").exists()


SAME = {"n_kv_head": 4, "d_head": 8, "rope_base": 5e5}


def test_settings_that_change_nothing_are_no_reason_to_refuse(tmp_path):
    model = random_model(**SAME)
    export_elsewhere(model, tmp_path / "model", "hf")
    np.testing.assert_array_equal(gpt_jax.load(tmp_path / "model").logits(TEXT), model.logits(TEXT))


def test_a_grouped_cache_is_smaller():
    sizes = {}
    for n_kv_head in (4, 1):
        module = random_model(**FAMILIES["llama"], n_kv_head=n_kv_head).module
        cache = jax.eval_shape(lambda module=module: empty_cache(module.config, module.execution, 96, 8))
        sizes[n_kv_head] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    assert sizes[4] == 4 * sizes[1]
    assert sizes[4] == 2 * 2 * 8 * 128 * 32 * 4  # layers, keys and values, texts, tokens, width, bytes
