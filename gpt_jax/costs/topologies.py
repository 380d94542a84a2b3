"""Absent accelerators to compile for: TPU slices by libtpu, NVIDIA GPUs by JAX's CUDA plugin."""

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

from gpt_jax.costs.chips import CHIPS, Chip
from gpt_jax.errors import UserError

TPUS = ("v4", "v5e", "v5p", "v6e")
OLDEST_JAX = (0, 8, 0)

# What XLA needs to know about a GPU, besides the values that all of these share: major compute capability,
# streaming multiprocessors, clock in GHz, bytes of L2 cache, shared memory of a multiprocessor and the most
# of it for one block, float32 units of a multiprocessor. NVIDIA's data sheets and the CUDA C++ programming
# guide ("Compute Capabilities").
_GPUS = {
    "a100": (8, 108, 1.41, 41943040, 167936, 166912, 64),
    "h100": (9, 132, 1.98, 52428800, 233472, 232448, 128),
    "h200": (9, 132, 1.98, 52428800, 233472, 232448, 128),
    "b200": (10, 148, 1.965, 132120576, 233472, 232448, 128),
}
# For libtpu: do not look for this machine's TPU, do not lock it, and do not complain that there is none.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_EXAMPLES = "v5e:1x1, v5e:2x4, v6e:2x2, v4:2x2x1, h100:1, h100:8"


def describe_topology(topology: str) -> tuple[Chip, Sequence[Any]]:
    """The chip and the devices of a topology such as "v5e:2x4" or "h100:8".

    Raises:
        UserError: it is unknown, or what compiles for it is not installed or too old.
    """
    name, _, shape = topology.partition(":")
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    if chip is None or name not in (*TPUS, *_GPUS):
        known = ", ".join((*TPUS, *_GPUS))
        raise UserError(f"topology = {topology!r}: unknown chip {name!r}; known: {known}; e.g. {_EXAMPLES}")
    if not re.fullmatch(r"\d+(x\d+){1,2}" if name in TPUS else r"[1-9]\d{0,3}", shape):
        what = f"shape, such as {_EXAMPLES}" if name in TPUS else f"number of GPUs, such as {name}:8"
        raise UserError(f"topology = {topology!r} must end in a {what}")
    if jax.__version_info__ < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise UserError(
            f"compiling for an absent device needs JAX {oldest} or newer; this is {jax.__version__}"
        )
    options = _tpu_options(topology, shape) if name in TPUS else _gpu_options(chip, shape)
    try:
        devices = topologies.get_topology_desc(**options).devices
    except Exception as error:  # the plugins raise many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"topology = {topology!r}: {reason}; e.g. {_EXAMPLES}") from None
    if name == "v4" and len(devices) == 2 * math.prod(map(int, shape.split("x"))):
        # Here JAX has a device for each of the two cores of a chip.
        chip = replace(
            chip, name="v4 core", memory=chip.memory / 2, flops=chip.flops / 2, bandwidth=chip.bandwidth / 2
        )
    return chip, devices


def _tpu_options(topology: str, shape: str) -> dict[str, Any]:
    if find_spec("libtpu") is None:
        raise UserError("libtpu, which compiles for TPUs, is not installed: pip install -e '.[aot]'")
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    # A slice of one chip is a part of a host, which must be said.
    is_one = all(int(n) <= 1 for n in shape.split("x"))
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if is_one else {}
    return {"platform": "tpu", "topology_name": topology, **bounds}


def _gpu_options(chip: Chip, count: str) -> dict[str, Any]:
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda12") is None:
        raise UserError(
            "JAX's CUDA plugin, which compiles for NVIDIA GPUs, is not installed: "
            "pip install -e '.[aot-cuda]'"
        )
    logger = logging.getLogger("jax._src.xla_bridge")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the CUDA plugin complains that there is no GPU
    jax.devices()  # JAX loads plugins with its first backend, which is the CPU's here
    logger.setLevel(level)
    # A `GpuTargetConfigProto` as text: without some of these, XLA ends with a segmentation fault.
    capability, cores, clock, l2, shared, shared_block, units = _GPUS[chip.name]
    shape = f"1x1x{count}"
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {shared}
          shared_memory_per_block_optin: {shared_block}
          core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {l2} device_memory_size: {chip.memory:.0f}
          cuda_compute_capability {{ major: {capability} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{chip.name}"
          driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
          dnn_version: "9.10.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
    """
    return {"platform": "cuda", "topology_name": shape, "topology": shape, "target_config": target}
