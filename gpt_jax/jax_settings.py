"""JAX's own settings: some change random numbers, types, or what may be computed at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax

T = TypeVar("T")


@contextmanager
def default_jax_settings() -> Iterator[None]:
    """JAX's defaults for this thread, whatever the environment or a notebook has set; also as a decorator.

    JAX_ENABLE_X64, JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE change the random numbers of a seed.
    Strict type promotion and a transfer guard forbid operations that the code uses.
    """
    if hasattr(jax, "enable_x64"):
        in_32_bits = jax.enable_x64(False)
    else:  # before jax 0.8
        from jax.experimental import enable_x64  # type: ignore[attr-defined]

        in_32_bits = enable_x64(False)
    with (
        in_32_bits,
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
    ):
        yield


def each_with_default_jax_settings(iterator: Iterator[T]) -> Iterator[T]:
    """The same items; the settings hold while each is computed, and not between them."""
    while True:
        with default_jax_settings():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
