"""What JAX runs on here, and whether it computes rightly."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import UserError


def check_backend() -> None:
    """Refuse a backend that gets the square lengths of some vectors wrong.

    jaxlib 0.10.2 does on the CPU (jax issue 39103), without a word.

    Raises:
        UserError: it names the version.
    """
    numbers_N = np.arange(32_769, dtype=np.float32)  # no fewer: the fault shows from here on
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
            f"jax {jax.__version__} computes wrongly on this {jax.default_backend()} "
            f"({got_N[n]:.0f} for {n} squared): install another version, "
            f"pip install 'jax>=0.9.2,!=0.10.*,!=0.11.0,!=0.11.1'"
        )


def make_deterministic() -> None:
    """Make runs repeatable bit for bit, at the price of speed. Call it before JAX starts its backend.

    A GPU gets no kernels whose sums depend on timing. A CPU gets one thread: a compiled program returns
    other bits with another number of threads, and may with more than one (jax issue 39741).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    os.environ["PJRT_NPROC"] = "1"  # threads of JAX's CPU client, and of nothing else


def describe_devices() -> str:
    """`1 x NVIDIA H200 (gpu)`: the devices for a person."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
