"""What JAX runs on: the precision that suits the devices, and whether they compute correctly."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import clear_backends
from jax.sharding import Mesh

from gpt_jax.config import Dtype
from gpt_jax.errors import UserError

# What installs a platform that JAX_PLATFORMS can name.
INSTALL = {name: 'pip install "jax[cuda12]"' for name in ("cuda", "gpu")} | {"tpu": 'pip install "jax[tpu]"'}


def local_devices() -> list[jax.Device]:
    """JAX's devices; a UserError where it finds none of the platform that JAX_PLATFORMS asks for."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:  # JAX raises any of these
        wanted = jax.config.jax_platforms
        if not wanted:
            raise UserError(f"JAX finds no device: {' '.join(str(error).split())[:300]}") from None
    try:
        jax.config.update("jax_platforms", "")
        found = describe_devices()
    finally:
        jax.config.update("jax_platforms", wanted)
        clear_backends()  # else JAX would go on with the devices found
    install = next((f", or install it: {INSTALL[name]}" for name in wanted.split(",") if name in INSTALL), "")
    raise UserError(f"JAX_PLATFORMS = {wanted!r}: JAX finds only {found}; unset JAX_PLATFORMS{install}")


def auto_dtype(platform: str, compute_capability: str = "") -> Dtype:
    """What `model.dtype = "auto"` stands for: bfloat16 where the hardware multiplies in it, else float32."""
    return "bfloat16" if platform != "cpu" and has_bfloat16(compute_capability) else "float32"


def has_bfloat16(compute_capability: str) -> bool:
    """Whether a GPU multiplies in bfloat16: NVIDIA's do from compute capability 8.0 on ("" : another GPU)."""
    major = compute_capability.split(".")[0]
    return not major.isdecimal() or int(major) >= 8


def describe_dtype(dtype: str, platform: str, compute_capability: str = "") -> str:
    """The dtype in words, with the reason if it is not the expected one."""
    if dtype == "float32" and not has_bfloat16(compute_capability):
        return "float32 (a GPU below compute capability 8.0 does not support bfloat16)"
    if dtype == "float32" and platform != "cpu":
        return "float32 (the model's matrix products in full float32)"
    return dtype


def first_device(mesh: Mesh | None = None) -> tuple[str, str]:
    """The first device of a mesh, or of this machine: ("gpu", "9.0").

    "cpu", "gpu" or "tpu"; the compute capability is "" if it is not an NVIDIA GPU.
    """
    device = local_devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform, str(getattr(device, "compute_capability", ""))


def check_backend() -> None:
    """Raise a UserError if JAX computes the squared norms of some vectors wrongly.

    jaxlib 0.10.2 does so on CPUs, without an error (jax issue 39103).
    """
    local_devices()
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


def describe_devices(mesh: Mesh | None = None) -> str:
    """`1 x NVIDIA H200 (gpu)`: the devices of a mesh, or of this machine, in words."""
    devices = local_devices() if mesh is None else list(mesh.devices.flat)
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
