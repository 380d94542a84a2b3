"""Trees of parameters: initial values, shapes, names, counts, and the two layouts of the layers.

Everywhere but inside the decoder the layers are stacked: "blocks" has one array for all layers, [L, ...]. The
decoder has them unstacked: "block_0", "block_1" ...
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from gpt_jax.config import ModelConfig
from gpt_jax.model.layers import Params
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import param_shardings


def init_params(model: GPT, key: jax.Array) -> Params:
    """Initial parameters, each boxed by linen with the names of its axes."""
    return model.init(key, jnp.zeros((1, model.config.context), jnp.int32))["params"]


def abstract_params(model: GPT, mesh: Mesh) -> Params:
    """Shapes, types and shardings of the parameters, without their values."""
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(with_sharding, nn.unbox(boxed), param_shardings(mesh, boxed))


def unstack_layers(params: Params) -> Params:
    """From one stack of layers to a tree for each layer, for decoding."""
    params = dict(params)
    blocks = params.pop("blocks")
    n_layer = jax.tree.leaves(blocks)[0].shape[0]
    layers = {f"block_{i}": jax.tree.map(lambda p, i=i: p[i], blocks) for i in range(n_layer)}
    return params | layers


def count_params(params: Params) -> int:
    """How many numbers the parameters hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def name_leaves(tree: Any) -> dict[str, Any]:
    """`{"blocks.mlp.up.kernel": leaf}`: the leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The shape and type of an array, with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def cast_matrices(params: Params, dtype: str) -> Params:
    """Cast kernels and embeddings once, before a loop, instead of at each use."""
    return jax.tree.map(lambda leaf, cast: leaf.astype(dtype) if cast else leaf, params, is_matrix(params))


def is_matrix(params: Params) -> Params:
    """True for kernels and embeddings, in the structure of `params`.

    False for parameters of single channels: biases, norms, convolutions, x0 gates. The names decide, since
    stacking the layers gives every array one more axis.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations of a training step for each token, without what is recomputed.

    Six for each weight of a matrix product (two forward, four backward), and 12 L H K T for attention, the
    causal mask ignored (Chowdhery et al. 2022, "PaLM", appendix B). The forward pass alone is a third.
    """
    width = config.n_head * config.head_width
    attention = (2 + 2 / config.n_groups) * config.d_model * width
    mlp = (3 if config.activation == "swiglu" else 2) * config.d_model * config.mlp_width
    weights = config.n_layer * (round(attention) + mlp) + config.d_model * vocab_size
    return 6 * weights + 12 * config.n_layer * width * config.context
