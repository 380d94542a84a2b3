"""The state of training, made straight into its shardings."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from gpt_jax.model import GPT, Params
from gpt_jax.params import abstract_params, init_params, with_sharding
from gpt_jax.sharding import replicated


class TrainState(struct.PyTreeNode):
    """All that changes from step to step. With the seed it decides everything that follows.

    Attributes:
        step: int32 scalar, updates done.
        params: float32.
        opt_state: optax's.
        ema_params: moving average of `params`, or None where none is kept.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema_params: Params | None

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate and to sample with: the average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def abstract_state(
    model: GPT, optimizer: optax.GradientTransformation, keep_ema: bool, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of the state, without making it: a target to restore to."""
    params = abstract_params(model, mesh)
    # A moment of a parameter lies where the parameter does; counters lie everywhere.
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
        ema_params=params if keep_ema else None,
    )


def init_state(
    model: GPT, optimizer: optax.GradientTransformation, keep_ema: bool, mesh: Mesh, key: jax.Array
) -> TrainState:
    """A fresh state, computed under jit so that no device ever holds more than its share."""
    target = abstract_state(model, optimizer, keep_ema, mesh)

    def make(key: jax.Array) -> TrainState:
        params = nn.unbox(init_params(model, key))
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            ema_params=jax.tree.map(jnp.copy, params) if keep_ema else None,
        )

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))(key)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)  # stands where one part of an optimizer leaves a parameter


def _with_sharding(leaf: Any, sharding: Any) -> Any:
    return leaf if _is_masked(leaf) else with_sharding(leaf, sharding)
