"""Running L layers with stacked parameters: one compiled layer, L times, with rematerialisation."""

from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from gpt_jax.config import ModelConfig


def stack(block: Any, config: ModelConfig, mesh: Mesh | None) -> nn.Module:
    """A module that runs `block` L times by a scan over parameters with a leading axis L.

    Its arguments are those of `block`; the last one also has a leading axis L.

    Args:
        block: a module class with the attributes `config` and `mesh`.
        config: of the model, "auto" resolved.
        mesh: the devices.
    """
    if config.remat != "nothing":
        products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = products if config.remat == "elementwise" else None
        # Inside a loop the compiler cannot merge the two forward passes; unrolled, it could.
        block = nn.remat(block, prevent_cse=config.unroll == "yes", policy=policy)
    return nn.scan(
        block,
        length=config.n_layer,
        unroll=config.n_layer if config.unroll == "yes" else 1,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, mesh, name="blocks")
