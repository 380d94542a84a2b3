"""Families of models that other programs know: their settings, and their names for our parameters.

Each table is read in both directions. Sources: the configuration and modeling files of Hugging Face's
transformers (gpt2, llama, qwen3, arcee), and nanoGPT's model.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from gpt_jax.checks import build
from gpt_jax.config import FREE, Config, ModelConfig
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import UserError
from gpt_jax.model.layers import Params
from gpt_jax.model.params import name_leaves
from gpt_jax.storage.metadata import Metadata


@dataclass(frozen=True)
class Family:
    """A kind of model, and how other programs store it."""

    name: str  # `model_type` in transformers
    architecture: str
    settings: dict[str, str]  # by the name of a setting there: its name here
    fixed: dict[str, Any]  # settings here that all models of the family have
    # By the name of a module here: its name there, or several names, whose arrays are stacked into one here.
    modules: dict[str, str]
    blocks: dict[str, str]  # the same within a block
    prefix: str = "model."  # of all names but that of the head; files may leave it out
    layers: str = "layers"  # what the list of blocks is called
    is_transposed: bool = True  # kernels are [out, in] there
    # Settings there: what they are where they are not named, and what they must be.
    defaults: dict[str, Any] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    settings={
        "vocab_size": "vocab_size", "n_positions": "context", "n_embd": "d_model", "n_layer": "n_layer",
        "n_head": "n_head", "n_inner": "d_mlp", "activation_function": "activation",
        "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied_embedding",
    },
    fixed={"norm": "layernorm", "position": "learned", "qk_norm": False, "bias": True},
    modules={"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f", "head": "lm_head"},
    blocks={
        "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    },
    prefix="transformer.",
    layers="h",
    is_transposed=False,
    defaults={
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    required={
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    },
)  # fmt: skip
LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    settings={
        "vocab_size": "vocab_size", "max_position_embeddings": "context", "hidden_size": "d_model",
        "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
        "head_dim": "d_head", "intermediate_size": "d_mlp", "hidden_act": "activation",
        "rms_norm_eps": "norm_eps", "rope_theta": "rope_base", "tie_word_embeddings": "tied_embedding",
        "attention_bias": "bias",
    },
    fixed={"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "qk_norm": False},
    modules={"token_embedding": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
    blocks={
        "attention_norm": "input_layernorm", "attention.out": "self_attn.o_proj",
        "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.q": "self_attn.q_proj", "attention.kv": "self_attn.k_proj self_attn.v_proj",
        "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.gate_proj mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
    defaults={
        "num_key_value_heads": None, "head_dim": None, "attention_bias": False, "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
    required={"use_sliding_window": False},
)  # fmt: skip
QWEN3 = replace(
    LLAMA, name="qwen3", architecture="Qwen3ForCausalLM", fixed=LLAMA.fixed | {"qk_norm": True},
    blocks=LLAMA.blocks | {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"},
    defaults=LLAMA.defaults | {"head_dim": 128, "num_key_value_heads": 32},
)  # fmt: skip
ARCEE = replace(
    LLAMA, name="arcee", architecture="ArceeForCausalLM", fixed=LLAMA.fixed | {"activation": "relu2"},
    blocks=LLAMA.blocks | {"mlp.up": "mlp.up_proj"},
)  # fmt: skip
FAMILIES = (GPT2, LLAMA, QWEN3, ARCEE)
NANOGPT = replace(
    GPT2, name="nanoGPT", is_transposed=True,
    settings={"vocab_size": "vocab_size", "block_size": "context", "n_embd": "d_model", "n_layer": "n_layer",
              "n_head": "n_head", "bias": "bias"},
    fixed={"norm": "layernorm", "position": "learned", "qk_norm": False, "activation": "gelu_exact"},
)  # fmt: skip
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of stored parameters, in safetensors
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # in old files: not parameters
CORRECT = "get another copy, or correct its settings"
# As transformers calls them. The first name for one of ours is what an export says.
ACTIVATIONS = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "silu": "swiglu", "relu2": "relu2",
}  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """The family of transformers that has such a model; a UserError names the settings that none has."""
    foreign = {family.name: list(foreign_settings(family, config)) for family in FAMILIES}
    family = min(FAMILIES, key=lambda family: len(foreign[family.name]))
    if foreign[family.name]:
        raise UserError(
            f"no kind of model in transformers is like this one: {family.name}, the nearest, does not have "
            f"{', '.join(foreign[family.name])}; docs/models.md says what can be exported"
        )
    return family


def foreign_settings(family: Family, config: ModelConfig) -> Iterator[str]:
    """The settings of a model that no model of a family has."""
    default = vars(ModelConfig())
    same = {  # settings that say what others say already, or nothing
        "n_kv_head": config.n_groups == 1, "d_head": config.head_width * config.n_head == config.d_model,
        "rope_base": config.position == "learned",
    }  # fmt: skip
    for name, value in vars(config).items():
        wanted = [family.fixed.get(name, default[name])]
        if name in FREE or same.get(name):
            continue
        if name == "bias":  # a GPT-2 without biases has zeros there; the MLP of Qwen3 has none
            wanted = [False] if family is QWEN3 else [True, False]
        elif name == "activation" and family is GPT2:
            wanted = ["gelu", "gelu_exact"]
        elif name in family.settings.values() and name not in family.fixed:
            wanted = [value]
        if value not in wanted:
            yield f"model.{name} = {value!r}"
    if family is not QWEN3 and config.d_model % config.n_head:
        yield f"a model.d_model = {config.d_model} that is no multiple of model.n_head = {config.n_head}"


def their_settings(family: Family, config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The config.json of a model of a family, for transformers, vLLM and llama.cpp."""
    ours = vars(config) | {
        "vocab_size": vocab_size, "d_mlp": config.mlp_width, "d_head": config.head_width,
        "n_kv_head": config.n_head // config.n_groups, "norm_eps": config.epsilon,
        "activation": next(name for name, known in ACTIVATIONS.items() if known == config.activation),
    }  # fmt: skip
    settings = {theirs: ours[name] for theirs, name in family.settings.items()}
    if family is not GPT2:  # newer versions of transformers read the base of RoPE from another place
        rope = {"rope_type": "default", "rope_theta": config.rope_base}
        settings |= {"rope_parameters": rope, "mlp_bias": config.bias}
    return {"architectures": [family.architecture], "model_type": family.name} | settings


def our_settings(family: Family, theirs: dict[str, Any]) -> ModelConfig:
    """The settings of a model from its config.json; a UserError names what this program does not have."""
    _check_supported(family, theirs)
    rope = theirs.get("rope_parameters") or {}
    values = family.defaults | theirs | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
    ours = dict(family.fixed)
    for name, setting in family.settings.items():
        value = values.get(name)
        if value is None and family.defaults.get(name, 0) is not None:
            raise UserError(f"{name} is missing")
        if value == 0 and value is not False:  # which would mean a default here
            raise UserError(f"{name} = {value!r} must be above 0")
        ours[setting] = 0 if value is None else value
        if setting == "activation":
            known = (family.fixed[setting],) if setting in family.fixed else ("gelu", "gelu_exact")
            ours[setting] = ACTIVATIONS.get(value) if isinstance(value, str) else None
            if ours[setting] not in known:
                names = ", ".join(name for name, activation in ACTIVATIONS.items() if activation in known)
                raise UserError(f"{name} = {value!r} is not supported, only {names}")
    if ours["bias"] is False and values.get("mlp_bias"):
        ours["bias"] = True
    try:
        return build(ModelConfig, ours, "model.")
    except UserError as error:
        message = str(error)
        for name, setting in family.settings.items():
            message = re.sub(rf"\bmodel\.{setting}\b", name, message)
        raise UserError(message) from None


def _check_supported(family: Family, theirs: dict[str, Any]) -> None:
    """Raise a `UserError` for a setting without a counterpart here."""
    found = dict(theirs)
    for name in ("rope_parameters", "rope_scaling"):  # newer and older versions of transformers
        rope = theirs.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{name} = {rope!r} is not supported, only the type 'default'")
        found |= rope
    types = theirs.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise UserError(f"layer_types = {types!r} is not supported, only 'full_attention'")
    for name, wanted in (family.required | {"partial_rotary_factor": 1, "quantization_config": None}).items():
        if found.get(name, wanted) != wanted:
            raise UserError(f"{name} = {found[name]!r} is not supported, only {wanted!r}")


def their_arrays(family: Family, name: str, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """A parameter, such as "blocks.mlp.up.kernel", all layers of it, as arrays under their names there."""
    arrays: dict[str, np.ndarray] = {}
    for layer, array in enumerate(leaf) if name.startswith("blocks.") else [(None, leaf)]:
        names = _names(family, name, layer)
        arrays |= zip(names, _split(family, name, array, len(names)), strict=True)
    return arrays


@dataclass(frozen=True)
class Stored:
    """An array in a file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]


def assemble(
    family: Family,
    config: ModelConfig,
    tokenizer: Tokenizer,
    step: int,
    stored: dict[str, Stored],
    target_of: Callable[[Metadata], Params],
    may_lack: Callable[[str], bool] = lambda _: False,
) -> tuple[Metadata, Params]:
    """What was read, as metadata and parameters in the shapes of `target_of`: see `read_leaves`."""
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size = {config.vocab_size:,} is smaller than the {tokenizer.vocab_size:,} tokens of its "
            f"tokenizer, which is another model's: get that of this model"
        )
    metadata = Metadata(Config(model=config), tokenizer, "", step, None, [], {})
    target = target_of(metadata)
    leaves = read_leaves(family, name_leaves(target), stored, may_lack)
    return metadata, jax.tree.unflatten(jax.tree.structure(target), leaves)


def read_leaves(
    family: Family,
    wanted: dict[str, jax.ShapeDtypeStruct],
    stored: dict[str, Stored],
    may_lack: Callable[[str], bool] = lambda _: False,
) -> list[jax.Array]:
    """The `wanted` parameters by name, float32, from arrays by their names there.

    A parameter that `may_lack` accepts is zero if it is missing. Raises `UserError` if any other is missing,
    or one is left over, has another shape, or is not finite.
    """
    stored = {name: array for name, array in stored.items() if not BUFFERS.search(name)}
    left = {name.removeprefix(family.prefix): (name, array) for name, array in stored.items()}
    if len(left) < len(stored):
        raise UserError(f"it has tensors with and without {family.prefix!r} before their names: {CORRECT}")
    files = sorted({array.file for array in stored.values()})
    n_stored = sum(math.prod(array.shape) for array in stored.values())
    n_wanted = sum(math.prod(leaf.shape) for leaf in wanted.values())
    if n_wanted > 2 * n_stored:  # before room is made for them; a few biases may be zeros
        raise UserError(
            f"its files have {n_stored:,} parameters, and its settings need {n_wanted:,}: {CORRECT}"
        )

    def read(name: str, part: str, shape: tuple[int, ...]) -> np.ndarray:
        found, array = left.pop(part.removeprefix(family.prefix), (part, None))
        if array is None:
            if may_lack(name):
                return np.zeros(shape, np.float32)
            raise UserError(f"{files[0] if files else 'files'}: tensor {part} is missing: {CORRECT}")
        which, dtypes = f"{array.file}: tensor {found}", DTYPES.values()
        if array.shape != shape:
            raise UserError(f"{which} has shape {array.shape}, and its settings need {shape}: {CORRECT}")
        if array.dtype not in dtypes:
            raise UserError(f"{which} is {array.dtype}, and must be one of {', '.join(dtypes)}")
        values = np.asarray(array.read()).astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{which} has values that are NaN or infinite: get another copy")
        return values

    leaves = []
    for name, leaf in wanted.items():
        is_stacked = name.startswith("blocks.")
        shape = leaf.shape[is_stacked:]
        values = np.empty((leaf.shape[0] if is_stacked else 1, *shape), np.float32)
        for layer in range(len(values)):
            parts = _names(family, name, layer if is_stacked else None)
            blank = _split(family, name, np.broadcast_to(np.float32(0), shape), len(parts))
            arrays = [read(name, part, array.shape) for part, array in zip(parts, blank, strict=True)]
            values[layer] = _join(family, name, arrays, shape)
        leaves.append(jax.device_put(values.reshape(leaf.shape)))
    if "lm_head.weight" in left and "head.kernel" not in wanted:  # tied: a copy of the embedding
        embedding = leaves[[*wanted].index("token_embedding.embedding")]
        if not np.array_equal(read("head.kernel", "lm_head.weight", embedding.shape), embedding):
            raise UserError("tensor lm_head.weight is not the embedding: set tie_word_embeddings to false")
    for name, array in left.values():
        raise UserError(
            f"{array.file}: tensor {name} is not part of a {family.name} model with these settings: {CORRECT}"
        )
    return leaves


def _names(family: Family, name: str, layer: int | None) -> list[str]:
    """The names there of what is one parameter of a layer here (None: of no layer)."""
    module, _, kind = name.removeprefix("blocks.").rpartition(".")
    prefix = "" if module == "head" else family.prefix
    prefix += "" if layer is None else f"{family.layers}.{layer}."
    parts = family.modules[module] if layer is None else family.blocks[module]
    return [f"{prefix}{part}.{'bias' if kind == 'bias' else 'weight'}" for part in parts.split()]


def _split(family: Family, name: str, array: np.ndarray, n_parts: int) -> list[np.ndarray]:
    """The arrays there of a parameter of one layer: matrices, and vectors of biases and scales."""
    is_kernel = name.endswith(".kernel")
    # Several are stacked on an axis: [D, 3, H, K], or as a bias [3, H, K].
    parts = [*np.moveaxis(array, int(is_kernel), 0)] if n_parts > 1 else [array]
    if not is_kernel:
        return [part if name.endswith("embedding") else part.reshape(-1) for part in parts]
    n_in = math.prod(array.shape[: 2 if name.endswith("out.kernel") else 1])
    matrices = [part.reshape(n_in, -1) for part in parts]
    return [matrix.T for matrix in matrices] if _is_transposed(family, name) else matrices


def _join(family: Family, name: str, parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_split`: a parameter of one layer, of this shape."""
    axis = int(name.endswith(".kernel"))
    parts = [part.T for part in parts] if axis and _is_transposed(family, name) else parts
    if len(parts) == 1:
        return parts[0].reshape(shape)
    return np.stack([part.reshape(shape[:axis] + shape[axis + 1 :]) for part in parts], axis)


def _is_transposed(family: Family, name: str) -> bool:
    """Whether a kernel is [out, in] there; that of the head always is."""
    return family.is_transposed or name == "head.kernel"
