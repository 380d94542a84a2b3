"""What JAX runs on here, and whether it computes rightly."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import UserError


def check_backend() -> None:
    """Refuse a backend that gets a small jitted reduction wrong.

    jaxlib 0.10.2 does on the CPU (jax issue 39103), without a word.

    Raises:
        UserError: it names the version.
    """
    rows = np.arange(32_769 * 3, dtype=np.float32).reshape(-1, 3) % 3  # sums stay exact in float32

    @jax.jit
    def sum_of_squares(matrix: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(lambda row: matrix @ row)(rows) ** 2)

    with jax.default_matmul_precision("highest"):
        got = float(sum_of_squares(jnp.eye(3), jnp.asarray(rows)))
    wanted = float(np.sum(rows.astype(np.float64) ** 2))
    if got != wanted:
        raise UserError(
            f"jax {jax.__version__} computes wrongly on this {jax.default_backend()} "
            f"({got:.0f} for a sum that is {wanted:.0f}): install another version, "
            f"pip install 'jax>=0.9.2,!=0.10.*,!=0.11.0,!=0.11.1'"
        )


def describe_devices() -> str:
    """`1 x NVIDIA H200 (gpu)`: the devices for a person."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
