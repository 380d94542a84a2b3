"""The state of training: parameters, optimizer state, and the step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from gpt_jax.adapters import adapting, merge, trained, trained_params
from gpt_jax.model.layers import Params
from gpt_jax.model.params import abstract_params, init_params, with_sharding
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import replicated


class TrainState(struct.PyTreeNode):
    """All that changes from step to step. Together with the seed it determines the rest of the run.

    Attributes:
        step: int32 scalar, updates done.
        params: what is trained, float32: all parameters, or with `model.lora_rank` the adapters.
        opt_state: optax's.
        frozen: the parameters that the adapters adapt, which are neither trained nor saved; else None.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    frozen: Params = None

    @property
    def model_params(self) -> Params:
        """The parameters of the model as it is now, the adapters merged into them."""
        return self.params if self.frozen is None else merge(self.frozen, self.params)


def abstract_state(model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without its values: the target of a restore."""
    params = trained_params(model, mesh)
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
        frozen=abstract_params(model, mesh) if model.config.lora_rank else None,
    )


def init_state(
    model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh, key: jax.Array, params: Params = None
) -> TrainState:
    """The initial state, of `params` or else by `key`. Under jit, so that each device only holds its part.

    With `model.lora_rank`, `params` are what is adapted.
    """
    rank = model.config.lora_rank
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))

    def make(key: jax.Array, given: Params) -> TrainState:
        with adapting(rank):
            params = nn.unbox(init_params(model, key)) if rank or given is None else given
        params = trained(params) if rank else params
        return TrainState(jnp.int32(0), params, optimizer.init(params), frozen=given if rank else None)

    placed = (
        None if params is None else jax.device_put(params, shardings.frozen if rank else shardings.params)
    )
    return jax.jit(make, out_shardings=shardings)(key, placed)


def _is_masked(leaf: Any) -> bool:
    # It stands for parameters that this part of the optimizer does not update.
    return isinstance(leaf, optax.MaskedNode)


def _with_sharding(leaf: Any, sharding: Any) -> Any:
    return leaf if _is_masked(leaf) else with_sharding(leaf, sharding)
