"""Independent streams of random numbers, each a function of the seed."""

import jax

# Each is folded into the key of the seed.
INIT_STREAM, BATCH_STREAM, DROPOUT_STREAM, SAMPLE_STREAM = range(4)


def stream(seed: int | jax.Array, name: int) -> jax.Array:
    """The random stream `name` of a run."""
    return jax.random.fold_in(jax.random.key(seed), name)
