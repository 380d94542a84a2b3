"""Windows of tokens: shuffled ones for training, all of them in order for evaluation.

A training batch is a pure function of (key, step): there is no iterator state to save.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import TrainConfig, check_batch_split

CPU_TOKENS = 1024  # about the fastest micro-batch on two CPU cores; 256 to 16,384 tokens were tried


def micro_batch_size(train: TrainConfig, context: int, n_shards: int, platform: str) -> int:
    """Windows in a micro-batch, by `train.grad_accum_steps`, whose default depends on the hardware.

    Args:
        train: the settings.
        context: T.
        n_shards: how many devices share a micro-batch.
        platform: of these devices.

    Raises:
        UserError: they cannot share it equally.
    """
    # mesh.data = 1 always works: mesh.fsdp alone was checked with the settings.
    check_batch_split(train, n_shards, f"{n_shards} devices", "or fewer devices with --config.mesh.data=1")
    size = train.batch_size // max(train.grad_accum_steps, 1)
    if train.grad_accum_steps or platform != "cpu":
        return size
    fitting = max(CPU_TOKENS // context, 1) * n_shards
    return max(n for n in range(n_shards, fitting + 1, n_shards) if size % n == 0)


def train_batch(
    key: jax.Array, step: jax.Array, tokens_N: jax.Array, batch_size: int, context: int
) -> tuple[jax.Array, jax.Array]:
    """The `batch_size` windows of a step, cut out of the tokens on the device.

    Each epoch cuts the tokens into adjacent windows from a random offset, and takes every window once, in
    random order. So each epoch leaves out T to 2T - 1 tokens at the two ends (fewer where there is only one
    window); tokens at the very ends are rarely seen.

    Args:
        key: the stream of batches.
        step: int32 scalar.
        tokens_N: integer ids.
        batch_size: B.
        context: T.

    Returns:
        Inputs and targets, int32 [B, T] each; the target of a token is the token after it.
    """
    n_tokens = tokens_N.shape[0]
    n_windows = max(n_tokens // context - 1, 1)  # one less than fit leaves room for the offset
    n_offsets = n_tokens - n_windows * context

    def start(number: jax.Array) -> jax.Array:
        """The first token of window `number`, counted over all epochs."""
        epoch, place = number // n_windows, number % n_windows
        offset_key, order_key = jax.random.split(jax.random.fold_in(key, epoch))
        offset = jax.random.randint(offset_key, (), 0, n_offsets)
        return offset + context * shuffled(order_key, place, n_windows)

    starts_B = jax.vmap(start)(step * batch_size + jnp.arange(batch_size))
    windows_BxT1 = tokens_N[starts_B[:, None] + jnp.arange(context + 1)[None]].astype(jnp.int32)
    return windows_BxT1[:, :-1], windows_BxT1[:, 1:]


def shuffled(key: jax.Array, place: jax.Array, n: int) -> jax.Array:
    """Element `place` of a random permutation of 0 .. n - 1, computed without the other elements.

    A Feistel network permutes the 4^h numbers of 2h bits. A result of n or above is permuted again until it
    is below n, which gives a permutation of the numbers below n ("cycle walking", Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains").
    """
    half_bits = max((n - 1).bit_length() + 1, 2) // 2
    low_bits = (1 << half_bits) - 1
    round_keys = jax.random.bits(key, (4,), jnp.uint32)

    def permute(x: jax.Array) -> jax.Array:
        high, low = x >> half_bits, x & low_bits
        for round_key in round_keys:
            mixed = (low ^ round_key) * jnp.uint32(0x9E3779B1)
            mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
            high, low = low, high ^ ((mixed ^ (mixed >> 13)) & low_bits)
        return (high << half_bits) | low

    x = permute(place.astype(jnp.uint32))
    return jax.lax.while_loop(lambda x: x >= n, permute, x).astype(jnp.int32)


def eval_windows(
    tokens_N: np.ndarray, context: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut tokens into non-overlapping windows: each token but the first is a target once.

    The last window is padded to T, and the windows are padded to full batches.

    Args:
        tokens_N: integer ids, N of 2 or more.
        context: T.
        batch_size: B; it changes the shapes, not the loss.

    Returns:
        Inputs int32 [n, B, T], targets int32 [n, B, T], and mask bool [n, B, T], true where a target
        counts; it is true N - 1 times.
    """
    n_targets = len(tokens_N) - 1
    n_batches = -(-n_targets // (context * batch_size))
    shape = (n_batches, batch_size, context)
    padded = np.zeros(n_batches * batch_size * context + 1, np.int32)
    padded[: len(tokens_N)] = tokens_N
    mask = np.arange(len(padded) - 1) < n_targets
    return padded[:-1].reshape(shape), padded[1:].reshape(shape), mask.reshape(shape)
