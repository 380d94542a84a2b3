"""The state of training: parameters, optimizer state, and the step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from gpt_jax.model.layers import Params
from gpt_jax.model.params import abstract_params, init_params, with_sharding
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import replicated


class TrainState(struct.PyTreeNode):
    """All that changes from step to step. Together with the seed it determines the rest of the run.

    Attributes:
        step: int32 scalar, updates done.
        params: float32.
        opt_state: optax's.
    """

    step: jax.Array
    params: Params
    opt_state: Any


def abstract_state(model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without its values: the target of a restore."""
    params = abstract_params(model, mesh)
    # Moments are split like their parameters; counters are replicated.
    opt_state = optax.tree.map_params(
        optimizer,
        _with_sharding,
        jax.eval_shape(optimizer.init, params),
        jax.tree.map(lambda leaf: leaf.sharding, params),
        transform_non_params=lambda leaf: _with_sharding(leaf, replicated(mesh)),
        is_leaf=_is_masked,
    )
    return TrainState(
        step=_with_sharding(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh)),
        params=params,
        opt_state=opt_state,
    )


def init_state(model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh, key: jax.Array) -> TrainState:
    """The initial state, computed under jit so that each device only holds its part."""
    target = abstract_state(model, optimizer, mesh)

    def make(key: jax.Array) -> TrainState:
        params = nn.unbox(init_params(model, key))
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))(key)


def _is_masked(leaf: Any) -> bool:
    # It stands for parameters that this part of the optimizer does not update.
    return isinstance(leaf, optax.MaskedNode)


def _with_sharding(leaf: Any, sharding: Any) -> Any:
    return leaf if _is_masked(leaf) else with_sharding(leaf, sharding)
