"""Where arrays lie: the mesh of devices, and which axis of an array is split over which of its axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
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
    """A mesh (data, fsdp, tensor) over the first of `devices` (default: all there are).

    Raises:
        UserError: there are too few devices.
    """
    devices = jax.devices() if devices is None else devices
    n_other = config.fsdp * config.tensor
    shape = (config.data or max(len(devices) // n_other, 1), config.fsdp, config.tensor)
    n_devices = math.prod(shape)
    if n_devices > len(devices):
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, shape))} needs {n_devices} "
            f"devices, and {len(devices)} are here: choose smaller ones"
        )
    return jax.make_mesh(
        shape,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=tuple(devices[:n_devices]),
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
