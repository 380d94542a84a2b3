"""The training loss of a batch, and the reported loss of a whole text."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data.batches import eval_windows
from gpt_jax.model.layers import Params
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import split_batch

Announce = Callable[[str], AbstractContextManager[Any]]  # the context in which a named program compiles


class LossOfTokens(Protocol):
    """See `make_loss_of_tokens`."""

    def __call__(
        self,
        params: Params,
        tokens_N: np.ndarray,
        announce: Announce = ...,
        between: Callable[[], None] = ...,
    ) -> float:
        """Nats per token."""


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
def window_losses(model: GPT, params: Params, *windows_BxT: jax.Array) -> jax.Array:
    """The summed loss of each window of a batch, float32 [B], in nats.

    Args:
        model, params: as for `make_loss_of_tokens`.
        *windows_BxT: inputs, targets and mask, as from `eval_windows`.
    """
    inputs_BxT, targets_BxT, mask_BxT = split_batch(windows_BxT, model.mesh)
    logits_BxTxV, _ = model.apply({"params": params}, inputs_BxT)
    return jnp.sum(token_losses(logits_BxTxV, targets_BxT) * mask_BxT, axis=-1)


def make_loss_of_tokens(model: GPT, batch_size: int) -> LossOfTokens:
    """The headline loss: the mean over *all* of a text, as a function (params, ids, announce, between).

    The text is cut into non-overlapping windows of the model's context, so that every token but the first is
    predicted once; no window is drawn at random. The unit is nats per token. One program, for a batch of
    windows, serves every text; it is compiled at the first call, in the context that `announce` returns.
    `between` is called before each batch; what it raises ends the evaluation.

    Args:
        model: the model.
        batch_size: B, windows at a time; it changes the result by rounding at most.
    """
    tokens_per_batch = batch_size * model.config.context
    programs: list[Any] = []

    def loss_of_tokens(
        params: Params,
        tokens_N: np.ndarray,
        announce: Announce = silent,
        between: Callable[[], None] = lambda: None,
    ) -> float:
        total, running = 0.0, None
        for start in range(0, len(tokens_N) - 1, tokens_per_batch):
            between()
            batch_N = tokens_N[start : start + tokens_per_batch + 1]
            windows_BxT = [part[0] for part in eval_windows(batch_N, model.config.context, batch_size)]
            if not programs:
                with announce("evaluation"):
                    programs.append(window_losses.lower(model, params, *windows_BxT).compile())
            # Read a result only when the next batch is under way, so that the device always has work, but
            # never more than two batches of it: `between` can end the evaluation soon.
            before, running = running, programs[0](params, *windows_BxT)
            total += _sum(before)
        return float((total + _sum(running)) / (len(tokens_N) - 1))

    return loss_of_tokens


def _sum(losses_B: jax.Array | None) -> float:
    # In float64: the batch size changes the result by rounding at most.
    return 0.0 if losses_B is None else np.asarray(losses_B, np.float64).sum()
