"""Dropout with masks from a hash, the same ones on every platform.

Element i is kept or dropped by a hash of i and a seed. That takes a dozen integer operations, which the
compiler fuses into the operation that uses the mask, on any device and with any sharding. JAX's threefry
takes about a hundred operations for each element, and TPU programs with it took minutes to compile.
"""

import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, seed_2: jax.Array | None, mask_index: int = 0) -> jax.Array:
    """Set each element to zero with probability `rate` and scale the others by 1 / (1 - rate).

    Args:
        x: any array.
        rate: in [0, 1).
        seed_2: uint32 [2]; None: `x` is returned as it is.
        mask_index: numbers the masks that share a seed.
    """
    if rate == 0 or seed_2 is None:
        return x
    return jnp.where(keep_mask(seed_2, mask_index, rate, x.shape), x / (1 - rate), 0)


def keep_mask(seed_2: jax.Array, mask_index: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Bool of that shape, True with probability 1 - `rate`, independent over elements, seeds, mask indices.

    Element i gets `scramble(i a + b)`, where a and b are hashes of the seed and the mask index. That is
    random enough for dropout; initial parameters and batches use `jax.random`. Element numbers have 32 bits:
    an array of more than 2^32 elements repeats its mask.
    """
    a = scramble(seed_2[0] + jnp.uint32(2 * mask_index))
    b = scramble(seed_2[1] + jnp.uint32(2 * mask_index + 1))
    number = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return scramble(number * (a | 1) + b) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def scramble(x: jax.Array) -> jax.Array:
    """A permutation of uint32 that hashes: Wellons' "lowbias32" (nullprogram.com/blog/2018/07/31)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
