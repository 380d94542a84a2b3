"""Low-rank adapters, LoRA (Hu et al. 2021): train a small correction of each linear layer, and nothing else.

A layer computes x W + x A B, where A has `model.lora_rank` columns and B is zero at first. The modules of
`model/` do not know of this: their calls are intercepted, as in google-deepmind/gemma.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from gpt_jax.model.layers import Params, normal
from gpt_jax.model.params import abstract_params
from gpt_jax.model.transformer import GPT

A, B = "lora_a", "lora_b"  # the names of a layer's two parameters, beside its "kernel"


def adapting(rank: int) -> AbstractContextManager[Any]:
    """Within this context, linear layers also have adapters of this rank; 0: none."""
    return nn.intercept_methods(partial(_add_adapter, rank)) if rank else nullcontext()


def _add_adapter(
    rank: int,
    call: Callable[..., jax.Array],
    inputs: Any,
    options: Any,
    context: Any,
) -> jax.Array:
    """What `intercept_methods` calls in place of each method of a module."""
    layer, y = context.module, call(*inputs, **options)
    if not isinstance(layer, nn.DenseGeneral) or context.method_name != "__call__":
        return y
    x = inputs[0]
    axes = [axis % x.ndim for axis in ([layer.axis] if isinstance(layer.axis, int) else layer.axis)]
    features = (layer.features,) if isinstance(layer.features, int) else tuple(layer.features)
    widths = tuple(x.shape[axis] for axis in axes)
    std = math.prod(widths) ** -0.5
    a = layer.param(A, normal(std, (None,) * (len(axes) + 1)), (*widths, rank))
    b = layer.param(B, normal(0.0, (None,) * (len(features) + 1)), (rank, *features))
    low = jnp.tensordot(x.astype(y.dtype), a.astype(y.dtype), (axes, [*range(len(axes))]))
    return y + jnp.tensordot(low, b.astype(y.dtype), 1)


def trained(params: Params) -> Params:
    """The adapters alone, of parameters that have them."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if path[-1] in (A, B)})


def join(params: Params, adapters: Params) -> Params:
    """Parameters with adapters beside their kernels."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(adapters))


@jax.jit
def merge(params: Params, adapters: Params) -> Params:
    """Parameters of stacked layers with the adapters added to the kernels: W + A B."""
    leaves, added = flatten_dict(params), flatten_dict(adapters)
    for (*path, name), a_LxIxR in added.items():
        if name == A:
            kernel, b_LxRxO = leaves[*path, "kernel"], added[*path, B]
            n_layer, rank = len(kernel), b_LxRxO.shape[1]
            product = a_LxIxR.reshape(n_layer, -1, rank) @ b_LxRxO.reshape(n_layer, rank, -1)
            leaves[*path, "kernel"] = kernel + product.reshape(kernel.shape)
    return unflatten_dict(leaves)


def trained_params(model: GPT, mesh: Mesh) -> Params:
    """Shapes, types and shardings of what a run trains: all parameters, or adapters."""
    rank = model.config.lora_rank
    with adapting(rank):
        params = abstract_params(model, mesh)
    return trained(params) if rank else params
