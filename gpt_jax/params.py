"""Trees of parameters: their shapes before they exist, their names, their number, one tree a layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from gpt_jax.model import GPT, Params
from gpt_jax.sharding import param_shardings


def init_params(model: GPT, key: jax.Array) -> Params:
    """Fresh parameters, each boxed by linen with the names of its axes."""
    return model.init(key, jnp.zeros((1, model.config.context), jnp.int32))["params"]


def abstract_params(model: GPT, mesh: Mesh) -> Params:
    """Shapes, types and shardings of the parameters, without making them."""
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(with_sharding, nn.unbox(boxed), param_shardings(mesh, boxed))


def unstack_layers(params: Params) -> Params:
    """Parameters of `GPT(stacked=True)` as `GPT(stacked=False)` wants them: one tree a layer."""
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
    """Shape and type of an array, with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
