"""What JAX runs on: the precision that suits the devices, and whether they compute correctly."""

import os
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import Dtype, ModelConfig
from gpt_jax.errors import UserError


def auto_dtype(platform: str, compute_capability: str = "") -> Dtype:
    """What `model.dtype = "auto"` stands for: bfloat16 where the hardware multiplies in it, else float32.

    Args:
        platform: as JAX names it: "cpu", "gpu", "tpu".
        compute_capability: of an NVIDIA GPU, such as "7.5"; below 8.0 they have no bfloat16 units.
    """
    if platform == "cpu" or _major(compute_capability) < 8:
        return "float32"
    return "bfloat16"


def resolve_dtype(dtype: Dtype | Literal["auto"]) -> Dtype:
    """The setting `model.dtype`, with "auto" replaced by what suits the first device."""
    return auto_dtype(*first_device()) if dtype == "auto" else dtype


def resolve_model(config: ModelConfig, platform: str, compute_capability: str = "") -> ModelConfig:
    """Settings with each "auto" replaced by what suits a device of this platform."""
    on_cpu = platform == "cpu"
    dtype = auto_dtype(platform, compute_capability) if config.dtype == "auto" else config.dtype
    unroll = ("yes" if on_cpu else "no") if config.unroll == "auto" else config.unroll
    remat = ("nothing" if on_cpu else "elementwise") if config.remat == "auto" else config.remat
    return replace(config, dtype=dtype, unroll=unroll, remat=remat)


def has_cudnn_attention(config: ModelConfig, platform: str, compute_capability: str = "") -> bool:
    """Whether cuDNN's fused attention can be used for this model, where there is no attention dropout.

    It can in bfloat16 on NVIDIA GPUs of compute capability 8.0 or above, for heads of up to 128 channels. On
    TPUs no fused kernel is used: with 256 tokens and heads of 64 channels, Pallas' splash attention made the
    compiled step move more bytes than plain attention (docs/accelerators.md).
    """
    if platform != "gpu" or _major(compute_capability) < 8 or config.query_blocks > 1 or config.d_head > 128:
        return False
    dtype = jnp.dtype(auto_dtype(platform, compute_capability) if config.dtype == "auto" else config.dtype)
    qkv = [jax.ShapeDtypeStruct((1, config.context, config.n_head, config.d_head), dtype)] * 3
    try:
        jax.eval_shape(causal_cudnn, *qkv)
    except (RuntimeError, NotImplementedError, ValueError):  # what JAX raises for what cuDNN cannot do
        return False
    return True


def has_parallel_sums(platform: str, compute_capability: str = "") -> bool:
    """Whether sums, but not products of one row, are spread over the cores: on a CPU since jax 0.11."""
    return platform == "cpu" and jax.__version_info__ >= (0, 11)


causal_cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def describe_dtype(dtype: str, platform: str, compute_capability: str = "") -> str:
    """The type of the computation for a person, with the reason where it may surprise."""
    if dtype == "float32" and _major(compute_capability) < 8:
        return "float32 (a GPU below compute capability 8.0 does not support bfloat16)"
    if dtype == "float32" and platform != "cpu":
        return "float32 (the model's matrix products in full float32)"
    return dtype


def first_device(mesh: Mesh | None = None) -> tuple[str, str]:
    """Platform and compute capability of the first device of a mesh, or of this machine.

    The compute capability is "" where the device is not an NVIDIA GPU.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform, str(getattr(device, "compute_capability", ""))


def check_backend() -> None:
    """Fail where JAX computes the squared norms of some vectors wrongly.

    jaxlib 0.10.2 does so on CPUs, without an error (jax issue 39103).

    Raises:
        UserError: it names the version.
    """
    numbers_N = np.arange(32_769, dtype=np.float32)  # the error begins at this length
    rows_Nx3 = np.stack([numbers_N, 0 * numbers_N, 0 * numbers_N], axis=1)
    identity = jnp.eye(3)

    @jax.jit
    def square_lengths(rows_Nx3: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: jnp.sum(jnp.square(identity @ row)))(rows_Nx3)

    with jax.default_matmul_precision("highest"):
        got_N = np.asarray(square_lengths(rows_Nx3))
    wrong = np.flatnonzero(~np.isclose(got_N, numbers_N**2, rtol=1e-5))
    if wrong.size:
        n = wrong[-1]
        raise UserError(
            f"jax {jax.__version__} gives wrong results on this {jax.default_backend()} "
            f"({got_N[n]:.0f} for {n} squared): install another version, "
            f"pip install 'jax>=0.7.2,!=0.10.*,!=0.11.0,!=0.11.1'"
        )


def make_deterministic() -> None:
    """Make runs repeatable bit for bit, but slower. Call it before JAX starts its backend.

    On a GPU it avoids kernels whose sums depend on timing. On a CPU it uses one thread: the bits of a
    compiled program depend on the number of threads, and may differ from run to run with more than one (jax
    issue 39741).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    os.environ["PJRT_NPROC"] = "1"  # threads of JAX's CPU client


def describe_devices() -> str:
    """`1 x NVIDIA H200 (gpu)`: the devices for a person."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"


def _major(compute_capability: str) -> int:
    """7 of "7.5"; a large number where the device is not an NVIDIA GPU."""
    major = compute_capability.split(".")[0]
    return int(major) if major.isdecimal() else 999
