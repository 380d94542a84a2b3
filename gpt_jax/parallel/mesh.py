"""The mesh of devices, and the rules by which arrays are split over it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_jax.config import MeshConfig
from gpt_jax.errors import UserError
from gpt_jax.parallel.devices import local_devices

# From the logical axes that the model names to axes of the mesh. The vocabulary of a character model is small
# and odd (65), so it is not split.
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
        UserError: there are too few devices, or they cannot be arranged in this shape.
    """
    devices = local_devices() if devices is None else devices
    n_other = config.fsdp * config.tensor
    shape = (config.data or max(len(devices) // n_other, 1), config.fsdp, config.tensor)
    settings = f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, shape))}"
    n_devices = math.prod(shape)
    if n_devices > len(devices):
        raise UserError(
            f"{settings} needs {n_devices} devices, and there are {len(devices)}: choose smaller ones"
        )
    try:
        # Split: an axis of the mesh may take a part of an axis of the TPU's torus.
        arranged = create_device_mesh(shape, devices[:n_devices], allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{settings} cannot be laid out on these {len(devices)} devices ({reason}): choose powers of two "
            f"that use all of them"
        ) from None
    return Mesh(arranged, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_axis_split(mesh: Mesh, axis: int) -> NamedSharding:
    """Arrays whose axis number `axis` is a batch, split along it."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, dict(RULES)["batch"]))


def count_shards(mesh: Mesh) -> int:
    """How many devices a batch is split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def split_batch(x: Any, mesh: Mesh | None) -> Any:
    """Arrays [B, ...] split along B only, and their gradients too; unchanged without a mesh.

    Parameters are split over fsdp along their width. Without this constraint XLA split the activations along
    their width too, replicated the batch, and all-reduced whole activations.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, batch_axis_split(mesh, 0))


def gather(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The whole array on every device, such as a parameter before a loop; unchanged without a mesh."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, replicated(mesh))


def param_shardings(mesh: Mesh, boxed_params: Any) -> Any:
    """A sharding for each parameter, from the logical axes that linen boxed it with."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_params), mesh, RULES)
