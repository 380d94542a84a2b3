"""The training loss of a batch, and the reported loss of a whole text."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data.batches import eval_windows
from gpt_jax.model.layers import Params
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import split_batch

LossOfTokens = Callable[..., float]
Announce = Callable[[str], AbstractContextManager[Any]]  # the context in which a named program compiles


def silent(_what: str) -> AbstractContextManager[None]:
    """An `Announce` that prints nothing."""
    return nullcontext()


def token_losses(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Cross-entropy of each target, float32 [B, T], in nats."""
    # Picking the target by a one-hot sum keeps a scatter out of the gradient.
    one_hot_BxTxV = jax.nn.one_hot(targets_BxT, logits_BxTxV.shape[-1], dtype=logits_BxTxV.dtype)
    picked_BxT = jnp.sum(logits_BxTxV * one_hot_BxTxV, axis=-1)
    return jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked_BxT


def batch_loss(
    params: Params,
    model: GPT,
    inputs_BxT: jax.Array,
    targets_BxT: jax.Array,
    dropout_key: jax.Array,
) -> jax.Array:
    """Mean cross-entropy of a batch with dropout on, a float32 scalar in nats a token."""
    logits_BxTxV, _ = model.apply({"params": params}, inputs_BxT, dropout_key=dropout_key)
    return token_losses(logits_BxTxV, targets_BxT).mean()


@partial(jax.jit, static_argnums=0)
def window_losses(model: GPT, params: Params, *windows_nxBxT: jax.Array) -> jax.Array:
    """Summed losses of each of n x B windows, float32 [n, B], in nats.

    Args:
        model, params: as for `make_loss_of_tokens`.
        *windows_nxBxT: inputs, targets and mask, as from `eval_windows`.
    """

    def one_batch(batch: tuple[jax.Array, ...]) -> jax.Array:
        inputs_BxT, targets_BxT, mask_BxT = split_batch(batch, model.mesh)
        logits_BxTxV, _ = model.apply({"params": params}, inputs_BxT)
        return jnp.sum(token_losses(logits_BxTxV, targets_BxT) * mask_BxT, axis=-1)

    return jax.lax.map(one_batch, windows_nxBxT)


def make_loss_of_tokens(model: GPT, batch_size: int) -> LossOfTokens:
    """The headline loss: the mean over *all* of a text, as a function (params, ids, announce) -> float.

    The text is cut into non-overlapping windows of the model's context, so that every token but the first is
    predicted once; no window is drawn at random. The unit is nats per token. A program is compiled for each
    number of windows, in the context that `announce` returns.

    Args:
        model: the model.
        batch_size: windows at a time; it changes the result by rounding at most.
    """
    context = model.config.context
    programs: dict[int, Any] = {}

    def loss_of_tokens(params: Params, tokens_N: np.ndarray, announce: Announce = silent) -> float:
        windows = eval_windows(tokens_N, context, batch_size)
        n_batches = len(windows[0])
        if n_batches not in programs:
            with announce("evaluation"):
                programs[n_batches] = window_losses.lower(model, params, *windows).compile()
        # Sums of windows are added in float64: the batch size changes the result by rounding at most.
        total = np.asarray(programs[n_batches](params, *windows), np.float64).sum()
        return float(total / (len(tokens_N) - 1))

    return loss_of_tokens
