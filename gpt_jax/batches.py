"""Windows of tokens: random ones to train on, all of them in order to evaluate on.

A training batch is a pure function of (key, step). No iterator state exists, so a resumed run
cannot lose any.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError

CPU_TOKENS = 1024  # about the fastest micro-batch on two CPU cores, of 256 to 16,384 tokens tried


def micro_batch_size(train: TrainConfig, context: int, n_shards: int) -> int:
    """Windows in a micro-batch, as `train.accumulate` says; the default depends on the hardware.

    Args:
        train: the settings.
        context: T.
        n_shards: how many devices share a micro-batch.

    Raises:
        UserError: they cannot share it equally.
    """
    size = train.batch_size // max(train.accumulate, 1)
    if size % n_shards:
        raise UserError(
            f"train.batch_size = {train.batch_size} in train.accumulate = {train.accumulate} parts leaves "
            f"{size} windows, which {n_shards} devices cannot share equally: choose another batch, or "
            f"fewer devices with mesh.data"
        )
    if train.accumulate or jax.default_backend() != "cpu":
        return size
    fitting = max(CPU_TOKENS // context, 1) * n_shards
    return max(n for n in range(n_shards, fitting + 1, n_shards) if size % n == 0)


def train_batch(
    key: jax.Array, step: jax.Array, tokens_N: jax.Array, batch_size: int, context: int
) -> tuple[jax.Array, jax.Array]:
    """Cut `batch_size` windows at uniformly random places out of the tokens, on the device.

    Args:
        key: the stream of batches.
        step: int32 scalar.
        tokens_N: integer ids.
        batch_size: B.
        context: T.

    Returns:
        Inputs and targets, int32 [B, T] each; the target of a token is the token after it.
    """
    n_starts = tokens_N.shape[0] - context
    starts_B = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, n_starts)
    windows_BxT1 = tokens_N[starts_B[:, None] + jnp.arange(context + 1)[None]].astype(jnp.int32)
    return windows_BxT1[:, :-1], windows_BxT1[:, 1:]


def eval_windows(
    tokens_N: np.ndarray, context: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut tokens into non-overlapping windows, so that each token but the first is a target once.

    The last window may be short: it is padded, and so are the windows, to full batches.

    Args:
        tokens_N: integer ids, N of 2 or more.
        context: T.
        batch_size: B, of the evaluation; it changes the shapes, not the loss.

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
