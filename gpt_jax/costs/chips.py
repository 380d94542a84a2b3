"""Peak FLOP/s, bandwidth and memory of accelerators, as published, and the FLOP/s of the CPU here."""

import timeit
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    name: str  # in a topology, such as "v5e"
    kinds: tuple[str, ...]  # JAX's `device_kind` of such a device is one of these
    memory: float  # bytes
    flops: float  # peak dense bfloat16 arithmetic, FLOP/s
    bandwidth: float  # peak of the memory, bytes/s


GIB = 2**30  # what these makers write as GB of memory
# Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e); NVIDIA's data sheets for the A100 (SXM, 40 and
# 80 GB), H100 (SXM), H200 (SXM) and B200 (in a DGX). Other cards of these names (PCIe, NVL, MIG slices) have
# other peaks and are left out.
CHIPS = (
    Chip("v4", ("TPU v4",), 32 * GIB, 275e12, 1228e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 197e12, 819e9),
    Chip("v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 459e12, 2765e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 918e12, 1640e9),
    Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40 * GIB, 312e12, 1555e9),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 80 * GIB, 312e12, 2039e9),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 80 * GIB, 989e12, 3352e9),
    Chip("h200", ("NVIDIA H200",), 141 * GIB, 989e12, 4800e9),
    Chip("b200", ("NVIDIA B200",), 180 * GIB, 2250e12, 8000e9),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, None for one that is not in the table."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def peak_flops(mesh: Mesh, dtype: str) -> float | None:
    """The FLOP/s that all devices together reach at most, which MFU refers to; None where it is not known.

    In bfloat16 the published peak; in float32 on a CPU what its cores reach here, simulated devices or not.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return product_flops() if dtype == "float32" else None
    chip = find_chip(device.device_kind)
    return mesh.size * chip.flops if chip and dtype == "bfloat16" else None


@cache
def product_flops() -> float:
    """The FLOP/s of JAX's float32 matrix product on the CPU: the fastest of 60, a quarter of a GFLOP each."""
    multiply, a = jax.jit(jnp.matmul), jnp.ones((512, 512), jnp.float32)
    seconds = timeit.repeat(lambda: multiply(a, a).block_until_ready(), number=1, repeat=60)
    return 2 * len(a) ** 3 / min(seconds)
