"""Where arrays lie: the mesh of devices, and which axis of an array is split over which of its axes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_jax.config import MeshConfig
from gpt_jax.errors import UserError

# Logical axes, as model.py names them, to axes of the mesh. The vocabulary of a character model is
# small and odd (65), so it stays whole.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", None),
    ("time", None),
    ("layers", None),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) over `devices` (default: all there are); 1 x 1 x 1 works too.

    Raises:
        UserError: the devices do not fill the mesh.
    """
    devices = jax.devices() if devices is None else devices
    n_other = config.fsdp * config.tensor
    n_data = config.data or len(devices) // n_other
    if not n_data or n_data * n_other != len(devices):
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {config.data} x {config.fsdp} x {config.tensor} "
            f"does not fit the {len(devices)} device(s) here: their product must be {len(devices)} "
            f"(mesh.data = 0 takes what the others leave)"
        )
    return jax.make_mesh(
        (n_data, config.fsdp, config.tensor),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=np.asarray(devices).tolist(),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[B, ...] split along B."""
    return NamedSharding(mesh, PartitionSpec(dict(RULES)["batch"]))


def param_shardings(mesh: Mesh, boxed_params: Any) -> Any:
    """A sharding for each parameter, from the logical axes that linen boxed it with."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_params), mesh, RULES)
