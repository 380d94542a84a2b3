"""The training loss of a batch, and the reported loss of a whole text.

GPT-2's logits of 64 windows of 1,024 tokens take 13 GB, and their gradient as much. So many are computed in
pieces of the time axis, one after another. A piece has all logits of its tokens, so the gradient of its loss
is known together with the loss: no logits are kept for the backward pass, and none are computed twice.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data.batches import eval_windows
from gpt_jax.data.tokens import Tokens
from gpt_jax.errors import UserError
from gpt_jax.model import cpu
from gpt_jax.model.layers import Params
from gpt_jax.model.transformer import GPT, to_logits
from gpt_jax.parallel.execution import Execution
from gpt_jax.parallel.mesh import count_shards, gather, split_batch

MAX_LOGITS = 2**28  # at once on a device, 1 GiB; smaller pieces moved more bytes and saved no memory


def token_losses(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Cross-entropy of each target, float32 [B, T], in nats."""
    # Picking the target by a one-hot sum keeps a scatter out of the gradient.
    one_hot_BxTxV = jax.nn.one_hot(targets_BxT, logits_BxTxV.shape[-1], dtype=logits_BxTxV.dtype)
    picked_BxT = jnp.sum(logits_BxTxV * one_hot_BxTxV, axis=-1)
    return jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked_BxT


def losses_in_pieces(
    targets_BxT: jax.Array, execution: Execution, x_BxTxD: jax.Array, head_VxD: jax.Array
) -> jax.Array:
    """`token_losses` of `to_logits`, float32 [B, T]; in pieces where the logits are many."""

    def losses(_: None, piece: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        x_BxTxD, targets_BxT = piece
        return None, token_losses(to_logits(execution, x_BxTxD, head_VxD), targets_BxT)

    n_pieces = count_pieces(execution, targets_BxT, len(head_VxD))
    if n_pieces > 1:
        head_VxD = gather(head_VxD.astype(execution.dtype), execution.mesh)  # once, not for each piece
    return scan_pieces(losses, None, n_pieces, (x_BxTxD, targets_BxT))[1]


def mean_in_pieces(
    targets_BxT: jax.Array, execution: Execution, x_BxTxD: jax.Array, head_VxD: jax.Array
) -> jax.Array:
    """The mean of `losses_in_pieces`, whose gradient is computed in pieces too, in the forward pass."""
    n_pieces = count_pieces(execution, targets_BxT, len(head_VxD))
    if n_pieces == 1:
        return losses_in_pieces(targets_BxT, execution, x_BxTxD, head_VxD).mean()

    @jax.custom_vjp
    def mean(x_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
        return losses_in_pieces(targets_BxT, execution, x_BxTxD, head_VxD).mean()

    def mean_and_gradients(x_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array) -> Any:
        n_vocab, n_targets = len(head_VxD), targets_BxT.size
        head_VxD = gather(head_VxD.astype(execution.dtype), execution.mesh)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)

        def add(d_head_VxD: jax.Array, piece: tuple[jax.Array, jax.Array]) -> Any:
            x_BxTxD, targets_BxT = piece
            logits_BxTxV = to_logits(execution, x_BxTxD, head_VxD)
            losses_BxT = token_losses(logits_BxTxV, targets_BxT)
            # The gradient of a cross-entropy: the probabilities, less 1 at the target. It is rounded like the
            # other factors: a GPU multiplies bfloat16 faster.
            d_logits_BxTxV = jax.nn.softmax(logits_BxTxV) - jax.nn.one_hot(targets_BxT, n_vocab)
            d_logits_BxTxV = (d_logits_BxTxV / n_targets).astype(execution.dtype)
            factors = cpu.widen(execution, d_logits_BxTxV, x_BxTxD, head_VxD)
            d_head_VxD += product("btv,btd->vd", factors[0], factors[1])
            d_x_BxTxD = product("btv,vd->btd", factors[0], factors[2])
            return d_head_VxD, (losses_BxT, d_x_BxTxD.astype(execution.dtype))

        zeros_VxD = jnp.zeros(head_VxD.shape)
        d_head_VxD, results = scan_pieces(add, zeros_VxD, n_pieces, (x_BxTxD, targets_BxT))
        return results[0].mean(), (results[1], d_head_VxD)

    def scale(gradients: tuple[jax.Array, jax.Array], d_mean: jax.Array) -> Any:
        return *(d * d_mean.astype(d.dtype) for d in gradients), None

    mean.defvjp(mean_and_gradients, scale)
    return mean(x_BxTxD, head_VxD, targets_BxT)


def count_pieces(execution: Execution, targets_BxT: jax.Array, n_vocab: int) -> int:
    """P: into how many pieces of the time axis a loss is cut, so that each has `MAX_LOGITS` or fewer."""
    n_shards = 1 if execution.mesh is None else count_shards(execution.mesh)
    return min(ceil(targets_BxT.size / n_shards * n_vocab / MAX_LOGITS), targets_BxT.shape[1])


def scan_pieces(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, n_pieces: int, arrays_BxT: tuple[jax.Array, ...]
) -> tuple[Any, Any]:
    """`jax.lax.scan` over P pieces of arrays [B, T, ...]: the carry, and the results joined to [B, T, ...].

    Zeros fill up the last piece.
    """
    if n_pieces == 1:
        return step(carry, arrays_BxT)
    n_batch, n_time = arrays_BxT[0].shape[:2]

    def split(x_BxT: jax.Array) -> jax.Array:
        x_BxT = jnp.pad(x_BxT, [(0, 0), (0, -n_time % n_pieces)] + [(0, 0)] * (x_BxT.ndim - 2))
        return x_BxT.reshape(n_batch, n_pieces, -1, *x_BxT.shape[2:]).swapaxes(0, 1)

    def join(x_PxBxT: jax.Array) -> jax.Array:
        return x_PxBxT.swapaxes(0, 1).reshape(n_batch, -1, *x_PxBxT.shape[3:])[:, :n_time]

    carry, results = jax.lax.scan(step, carry, jax.tree.map(split, arrays_BxT))
    return carry, jax.tree.map(join, results)


def next_token_loss(
    params: Params, model: GPT, batch: tuple[jax.Array, jax.Array], dropout_key: jax.Array
) -> jax.Array:
    """The objective of a language model: mean cross-entropy with dropout on, float32, in nats a token.

    A batch is inputs and targets, integer ids [B, T] each.
    """
    inputs_BxT, targets_BxT = batch
    loss_of = partial(mean_in_pieces, targets_BxT)
    return model.apply({"params": params}, inputs_BxT, dropout_key=dropout_key, output=loss_of)[0]


@partial(jax.jit, static_argnums=0, static_argnames="each")
def window_losses(model: GPT, params: Params, *windows_BxT: jax.Array, each: bool = False) -> jax.Array:
    """The loss of each window of `eval_windows`, summed, float32 [B], or `each` target's [B, T], in nats."""
    inputs_BxT, targets_BxT, mask_BxT = split_batch(windows_BxT, model.execution.mesh)
    losses_BxT, _ = model.apply({"params": params}, inputs_BxT, output=partial(losses_in_pieces, targets_BxT))
    return losses_BxT * mask_BxT if each else jnp.sum(losses_BxT * mask_BxT, axis=-1)


def loss_of_tokens(
    model: GPT,
    params: Params,
    tokens_N: Tokens,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> float:
    """The reported loss, called `val_loss`: the mean over *all* of a text, in nats per token.

    The text is cut into non-overlapping windows of the model's context, so that every token but the first is
    predicted once; no window is drawn at random. `batch_size` windows are computed at once, which changes
    rounding only. `between` is called before each batch; what it raises ends the evaluation.
    """
    batches = losses_of_batches(model, params, tokens_N, batch_size, between)
    return float(sum(np.asarray(sums_B, np.float64).sum() for sums_B in batches) / (len(tokens_N) - 1))


def losses_of_batches(
    model: GPT, params: Params, tokens_N: Tokens, batch_size: int, between: Any, each: bool = False
) -> Iterator[np.ndarray]:
    """The `window_losses` of each batch of a text; see `loss_of_tokens`. A `UserError` for a single token."""
    if len(tokens_N) < 2:
        raise UserError(f"text of {len(tokens_N)} token(s) must have 2 or more for a loss")
    context, running = model.config.context, np.zeros((0, model.config.context), np.float32)
    for start in range(0, len(tokens_N) - 1, batch_size * context):
        between()
        batch_N = tokens_N[start : start + batch_size * context + 1]
        windows_BxT = [part[0] for part in eval_windows(batch_N, context, batch_size)]
        # Read a result only when the next batch is under way, so that the device always has work, but never
        # more than two batches of it: `between` can end the evaluation soon.
        before, running = running, window_losses(model, params, *windows_BxT, each=each)
        yield np.asarray(before)
    yield np.asarray(running)
