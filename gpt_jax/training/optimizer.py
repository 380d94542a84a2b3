"""The learning-rate schedule and the optimizer, composed from optax's parts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from gpt_jax.config import OptimizerConfig
from gpt_jax.model.layers import Params
from gpt_jax.model.params import is_matrix

# Which axes of a kernel are its inputs and which its outputs. Along the other axes (layers; q, k and v) lie
# separate matrices.
_MUON_AXES = {
    "qkv": MuonDimensionNumbers(reduction_axis=1, output_axis=(3, 4)),  # [L, D, 3, H, K]
    "q": MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3)),  # [L, D, H, K]
    "kv": MuonDimensionNumbers(reduction_axis=1, output_axis=(3, 4)),  # [L, D, 2, H, K]
    "out": MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3),  # [L, H, K, D]
    "up": MuonDimensionNumbers(reduction_axis=1, output_axis=3),  # [L, D, G, F]
    "down": MuonDimensionNumbers(reduction_axis=1, output_axis=2),  # [L, F, D]
}


def make_schedule(config: OptimizerConfig, steps: int | jax.Array, peak: float) -> optax.Schedule:
    """The learning rate as a function of the number of updates done; `peak` is that after the warm-up.

    `steps`, of the whole run, may be traced, which optax's own schedules do not allow: one compiled program
    then serves runs of every length.
    """
    warmup, ratio = config.warmup_steps, config.min_lr_ratio

    def schedule(count: Any) -> jax.Array:
        # Update i of the warm-up has (i + 1) / (warmup + 1) of the peak, so that the first one is not 0.
        rise = (count + 1) / (warmup + 1)
        decayed = jnp.clip((count - warmup) / jnp.maximum(steps - warmup, 1), 0, 1)  # from 0 to 1
        match config.schedule:
            case "cosine":
                fall = ratio + (1 - ratio) * 0.5 * (1 + jnp.cos(jnp.pi * decayed))
            case "linear":
                fall = ratio + (1 - ratio) * (1 - decayed)
            case "constant":
                fall = jnp.ones_like(decayed)
        return peak * jnp.where(count < warmup, rise, fall)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int | jax.Array) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; or Muon for the matrices of the blocks and AdamW for the rest.

    Sources: AdamW (Loshchilov and Hutter 2019); Muon (Jordan et al. 2024), as in `optax.contrib`. `steps` may
    be traced, see `make_schedule`.
    """
    schedule = make_schedule(config, steps, config.learning_rate)
    adamw = partial(optax.adamw, schedule, b1=config.b1, b2=config.b2, eps=config.eps, mask=is_matrix)
    match config.name:
        case "adamw":
            optimizer = adamw(weight_decay=config.weight_decay)
        case "muon":
            muon = optax.contrib.muon(
                make_schedule(config, steps, config.muon_learning_rate),
                beta=config.muon_momentum,
                eps=config.eps,
                weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=_muon_axes,
            )
            # Not the Adam within optax's Muon: that one would decay norms as well.
            adam = adamw(weight_decay=config.embedding_decay, nesterov=True)  # as Muon's own momentum
            optimizer = optax.partition({"muon": muon, "adam": adam}, _muon_or_adam)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def _muon_or_adam(params: Params) -> Params:
    """Which optimizer updates which array: Muon the kernels of the blocks, Adam the rest."""

    def label(path: tuple[Any, ...], _: jax.Array) -> str:
        return "muon" if path[0].key == "blocks" and path[-1].key == "kernel" else "adam"

    return jax.tree.map_with_path(label, params)


def _muon_axes(params: Params) -> Params:
    """The axes of the kernels that `_muon_or_adam` gives to Muon."""
    return jax.tree.map_with_path(lambda path, _: _MUON_AXES[path[-2].key], params)
