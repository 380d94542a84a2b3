"""Generate tokens: prefill in one parallel pass, then a KV-cached `lax.scan`, for any length.

Past the context T, the default window ("half") works so: when T tokens are in the cache and one more is
to follow, the last T/2 are read again in one parallel pass and generation goes on from there. Every token
is thus predicted from a true, contiguous window of T/2 to T tokens, at about two forward passes a token.
A rolling cache would not do: its old keys carry what has left the window, and with learned positions
they stand at the wrong places. The window "exact" is nanoGPT's: the last T tokens, computed anew for
every token.

Token n of a text is drawn with the key fold_in(key, n), and its window depends on n alone. So a text is
the same however its generation is cut up: generating 10 tokens and then 10 more gives the same 20.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model import GPT, Cache, Params, empty_cache, in_compute_dtype
from gpt_jax.sampling import SamplingRules, draw

CHUNK = 32  # about so many tokens appear at a time


def window_start(n: int, context: int) -> int:
    """Where the window begins from which token n is predicted, in the window "half".

    Tokens up to the context T have them all; then the window falls back to the last T/2 tokens, grows
    to T, falls back, and so on.
    """
    if n <= context:
        return 0
    half = max(context // 2, 1)
    period = context + 1 - half
    return n - half - (n - context - 1) % period


def chunk_length(context: int) -> int:
    """How many tokens a call of `decode` draws: equal chunks that fill a period, nearly to the token."""
    period = context + 1 - max(context // 2, 1)
    return -(-period // -(-period // CHUNK))


def generate_tokens(
    model: GPT,
    params: Params,
    prompt_BxP: np.ndarray,
    length: int,
    rules: SamplingRules,
    key: jax.Array,
    window: str = "half",
) -> Iterator[np.ndarray]:
    """Continue each of B prompts of equal length, all at once.

    Args:
        model: a `GPT(stacked=False)`.
        params: its parameters, one tree a layer (`unstack_layers`).
        prompt_BxP: int32 ids, P of 1 or more, longer than the context too.
        length: how many tokens to generate for each prompt.
        rules: how to draw.
        key: the random stream.
        window: "half" or "exact", as above.

    Yields:
        int32 [B, n] arrays as they are ready, `length` tokens in all.
    """
    context = model.config.context
    pieces_of = _half_pieces if window == "half" else _exact_pieces
    n = prompt_BxP.shape[1]
    end = n + length
    recent_BxR = np.asarray(prompt_BxP, np.int32)[:, -context:]  # no window reaches further back
    while n < end:
        # Each round goes as far as one window can, and the next begins from the tokens alone.
        for piece_BxC in pieces_of(model, params, recent_BxR, n, rules, key):
            piece_BxC = piece_BxC[:, : end - n]
            n += piece_BxC.shape[1]
            recent_BxR = np.concatenate([recent_BxR, piece_BxC], axis=1)[:, -context:]
            yield piece_BxC
            if n == end:
                return


def _half_pieces(
    model: GPT,
    params: Params,
    recent_BxR: np.ndarray,
    n: int,
    rules: SamplingRules,
    key: jax.Array,
) -> Iterator[np.ndarray]:
    """The tokens from number n on, up to where the window falls back."""
    context = model.config.context
    half = max(context // 2, 1)
    filled = n - window_start(n, context)
    # Two shapes are compiled, not one for each length: half a context, and a whole one.
    rows = len(recent_BxR)
    window_BxW = np.zeros((max(rows, _least_rows()), half if filled <= half else context), np.int32)
    window_BxW[:rows, :filled] = recent_BxR[:, -filled:]
    logits_BxV, cache = prefill(model, params, window_BxW, np.int32(filled))

    room = context + 1 - filled  # tokens to predict before the window is too long
    chunk = chunk_length(context)
    for done in range(0, room, chunk):
        logits_BxV, cache, drawn_BxC = decode(
            model, chunk, params, logits_BxV, cache, rules, key, np.int32(n + done)
        )
        # What a last chunk draws beyond its room is thrown away.
        yield np.asarray(drawn_BxC)[:rows, : room - done]


def _exact_pieces(
    model: GPT,
    params: Params,
    recent_BxR: np.ndarray,
    n: int,
    rules: SamplingRules,
    key: jax.Array,
) -> Iterator[np.ndarray]:
    """The next chunk of tokens, each from a forward pass over the last `context` tokens."""
    window_BxT = np.zeros((len(recent_BxR), model.config.context), np.int32)
    window_BxT[:, : recent_BxR.shape[1]] = recent_BxR
    yield np.asarray(decode_exact(model, params, window_BxT, rules, key, np.int32(n)))


@partial(jax.jit, static_argnums=0)
def prefill(model: GPT, params: Params, tokens_BxW: jax.Array, length: jax.Array) -> tuple[jax.Array, Cache]:
    """Read the first `length` of W tokens at once; what is padding after them leaves no trace.

    Returns:
        The logits of the next token [B, V], and the cache.
    """
    empty = empty_cache(model.config, model.vocab_size, tokens_BxW.shape[0])
    logits_BxWxV, cache = _read(model, params, tokens_BxW, empty)
    # No layer looks ahead, and what the cache holds of the padding is overwritten before it is looked at.
    return logits_BxWxV[:, length - 1], cache.replace(length=length, last_B=tokens_BxW[:, length - 1])


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def decode(
    model: GPT,
    n_tokens: int,
    params: Params,
    logits_BxV: jax.Array,
    cache: Cache,
    rules: SamplingRules,
    key: jax.Array,
    position: jax.Array,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Draw a token, read it, and again, `n_tokens` times.

    Returns:
        The logits of the token after those, the cache, and the tokens, int32 [B, n_tokens].
    """

    def step(carry: tuple[jax.Array, Cache], index: jax.Array) -> tuple[Any, jax.Array]:
        logits_BxV, cache = carry
        token_B = draw(_keys(key, index, logits_BxV.shape[0]), logits_BxV, rules)
        logits_Bx1xV, cache = _read(model, matrices, token_B[:, None], cache)
        return (logits_Bx1xV[:, 0], cache), token_B

    matrices = in_compute_dtype(model.config, params)
    indices = position + jnp.arange(n_tokens)
    (logits_BxV, cache), tokens_CxB = jax.lax.scan(step, (logits_BxV, cache), indices)
    return logits_BxV, cache, tokens_CxB.T


@partial(jax.jit, static_argnums=0)
def decode_exact(
    model: GPT,
    params: Params,
    window_BxT: jax.Array,
    rules: SamplingRules,
    key: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """`CHUNK` tokens, each from its whole window: the last T of the `position` tokens before it."""
    batch_size, context = window_BxT.shape

    def step(window_BxT: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        filled = jnp.minimum(index, context)
        logits_BxTxV, _ = model.apply({"params": matrices}, window_BxT)
        token_B = draw(_keys(key, index, batch_size), logits_BxTxV[:, filled - 1], rules)
        full_BxT = jnp.roll(window_BxT, -1, axis=1).at[:, -1].set(token_B)
        room_BxT = window_BxT.at[:, filled].set(token_B, mode="drop")
        return jnp.where(index < context, room_BxT, full_BxT), token_B

    matrices = in_compute_dtype(model.config, params)
    _, tokens_CxB = jax.lax.scan(step, window_BxT, position + jnp.arange(CHUNK))
    return tokens_CxB.T


def _read(model: GPT, params: Params, tokens_BxT: jax.Array, cache: Cache) -> tuple[jax.Array, Any]:
    return model.apply({"params": params}, tokens_BxT, cache)


def _least_rows() -> int:
    """XLA of jax 0.9 multiplies one row by a matrix on a CPU four to eight times slower than two rows."""
    return 2 if jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10) else 1


def _keys(key: jax.Array, index: jax.Array, batch_size: int) -> jax.Array:
    """A key for each row of token `index`; a row's does not depend on how many rows there are."""
    token_key = jax.random.fold_in(key, index)
    return jax.vmap(partial(jax.random.fold_in, token_key))(jnp.arange(batch_size))
