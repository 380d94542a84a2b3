"""Generate text of any length: prefill the prompt in one pass, then decode with a KV cache (`lax.scan`).

Past the context T, the default window "half" does the following: when the cache holds T tokens and one more
is needed, it reads the last T/2 tokens again in one parallel pass and continues from there. Every token is
thus predicted from a contiguous window of T/2 to T tokens, at an amortised cost of about two forward passes
for each. A rolling cache would be a different model: its old keys depend on tokens that have left the window,
and learned positions would be wrong. The window "exact" is nanoGPT's: the last T tokens, computed again for
every token.

Token n of a text is drawn with the key fold_in(key, n), and its window depends on n alone. So the text does
not depend on the chunks that it is generated in: 10 tokens and then 10 more are the same as 20.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model.cache import Cache, empty_cache
from gpt_jax.model.layers import Params, cast_matrices
from gpt_jax.model.params import unstack_layers
from gpt_jax.model.transformer import GPT
from gpt_jax.sampling.rules import SamplingRules, draw

CHUNK = 32  # about how many tokens one call generates
SHORT_PROMPT, MANY_ROWS = 16, 8  # so many texts at once read a prompt of up to 16 tokens without more padding
WINDOWS = ("half", "exact")


def window_start(n: int, context: int) -> int:
    """The first token of the window from which token n is predicted, for the window "half".

    Up to the context T the window is the whole text. Then it shrinks to the last T/2 tokens, grows to T,
    shrinks again, and so on.
    """
    if n <= context:
        return 0
    half = max(context // 2, 1)
    period = context + 1 - half
    return n - half - (n - context - 1) % period


def chunk_length(context: int) -> int:
    """How many tokens one call of `decode` draws: equal chunks that together just fill a period."""
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
    n_before: int = 0,
) -> Iterator[np.ndarray]:
    """Continue each of B prompts of equal length, all at once.

    Args:
        model: the model.
        params: its parameters, stacked.
        prompt_BxP: int32 ids; P is 1 or more and may exceed the context.
        length: how many tokens to generate for each prompt.
        rules: how to draw.
        key: the random stream.
        window: "half" or "exact", as above.
        n_before: tokens before the prompts that were left out. None of them is seen, if P is the context or
            more, but the window and the key of a token depend on its number.

    Yields:
        int32 [B, n] arrays as they are ready, `length` tokens in all.
    """
    context = model.config.context
    params = _unstack(params)  # once: it takes as long as a few tokens
    pieces_of = _half_pieces if window == "half" else _exact_pieces
    n = n_before + prompt_BxP.shape[1]
    end = n + length
    recent_BxR = np.asarray(prompt_BxP, np.int32)[:, -context:]  # no window reaches further back
    while n < end:
        # Each round generates what fits into one window; the next starts from the tokens alone.
        for piece_BxC in pieces_of(model, params, recent_BxR, n, end, rules, key):
            n += piece_BxC.shape[1]
            recent_BxR = np.concatenate([recent_BxR, piece_BxC], axis=1)[:, -context:]
            yield piece_BxC


def _half_pieces(
    model: GPT,
    params: Params,
    recent_BxR: np.ndarray,
    n: int,
    end: int,
    rules: SamplingRules,
    key: jax.Array,
) -> Iterator[np.ndarray]:
    """The tokens from number n on, until number `end`, or until the window shrinks."""
    context = model.config.context
    half = max(context // 2, 1)
    filled = n - window_start(n, context)
    # Few shapes are compiled, not one for each length: half a context, and a whole one. With many texts at
    # once, the padding of a short prompt would take as long as dozens of tokens: it has a shape of its own.
    rows = len(recent_BxR)
    shapes = (half, context) if rows < MANY_ROWS else (min(SHORT_PROMPT, half), half, context)
    window_BxT = np.zeros((max(rows, _min_rows()), next(n for n in shapes if filled <= n)), np.int32)
    window_BxT[:rows, :filled] = recent_BxR[:, -filled:]
    logits_BxV, cache = prefill(model, params, window_BxT, np.int32(filled))

    room = min(context + 1 - filled, end - n)  # with more tokens, the window would be too long
    chunk = chunk_length(context)
    before_BxC = None
    for done in range(0, room, chunk):
        logits_BxV, cache, drawn_BxC = decode(
            model, chunk, params, logits_BxV, cache, rules, key, np.int32(n + done)
        )
        # Read a chunk only when the next one is under way, so that the device always has work.
        if before_BxC is not None:
            yield np.asarray(before_BxC)[:rows]
        before_BxC = drawn_BxC
    # What the last chunk draws beyond the room is dropped.
    yield np.asarray(before_BxC)[:rows, : room - done]


def _exact_pieces(
    model: GPT,
    params: Params,
    recent_BxR: np.ndarray,
    n: int,
    end: int,
    rules: SamplingRules,
    key: jax.Array,
) -> Iterator[np.ndarray]:
    """The next chunk of tokens, or those until number `end`, each from a forward pass over a whole window."""
    window_BxT = np.zeros((len(recent_BxR), model.config.context), np.int32)
    window_BxT[:, : recent_BxR.shape[1]] = recent_BxR
    yield np.asarray(decode_exact(model, params, window_BxT, rules, key, np.int32(n)))[:, : end - n]


@partial(jax.jit, static_argnums=0)
def prefill(model: GPT, params: Params, tokens_BxT: jax.Array, length: jax.Array) -> tuple[jax.Array, Cache]:
    """Read the first `length` of T tokens in one pass; the rest is padding and has no effect.

    Args:
        model: the model.
        params: its parameters, unstacked.
        tokens_BxT: integer ids.
        length: int32 scalar, 1 or more.

    Returns:
        The logits of the next token [B, V], and the cache.
    """
    empty = empty_cache(model.config, model.vocab_size, tokens_BxT.shape[0])
    logits_BxTxV, cache = _read(model, params, tokens_BxT, empty, length)
    # No layer looks ahead, and the padding's keys are overwritten before the mask shows them.
    return logits_BxTxV[:, length - 1], cache


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
    """`n_tokens` times: draw a token, and read it.

    Returns:
        The logits of the token after those, the cache, and the tokens, int32 [B, n_tokens].
    """

    def step(carry: tuple[jax.Array, Cache], index: jax.Array) -> tuple[Any, jax.Array]:
        logits_BxV, cache = carry
        token_B = draw(_keys(key, index, logits_BxV.shape[0]), logits_BxV, rules)
        logits_Bx1xV, cache = _read(model, matrices, token_B[:, None], cache)
        return (logits_Bx1xV[:, 0], cache), token_B

    matrices = cast_matrices(model.config, params)
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
    """`CHUNK` tokens, each from its own forward pass over the last T of the `position` tokens before it."""
    batch_size, context = window_BxT.shape

    def step(window_BxT: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        filled = jnp.minimum(index, context)
        logits_BxTxV, _ = model.apply({"params": matrices}, window_BxT)
        token_B = draw(_keys(key, index, batch_size), logits_BxTxV[:, filled - 1], rules)
        full_BxT = jnp.roll(window_BxT, -1, axis=1).at[:, -1].set(token_B)
        room_BxT = window_BxT.at[:, filled].set(token_B, mode="drop")
        return jnp.where(index < context, room_BxT, full_BxT), token_B

    matrices = cast_matrices(model.config, params)
    _, tokens_CxB = jax.lax.scan(step, window_BxT, position + jnp.arange(CHUNK))
    return tokens_CxB.T


def _read(model: GPT, params: Params, tokens_BxT: jax.Array, cache: Cache, *n_tokens: Any) -> Any:
    return model.apply({"params": params}, tokens_BxT, cache, *n_tokens)


_unstack = jax.jit(unstack_layers)


def _min_rows() -> int:
    """On a CPU, XLA of jax 0.9 multiplies one row by a matrix four to eight times slower than two rows."""
    return 2 if jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10) else 1


def _keys(key: jax.Array, index: jax.Array, batch_size: int) -> jax.Array:
    """A key for each row of token `index`; a row's does not depend on how many rows there are."""
    token_key = jax.random.fold_in(key, index)
    return jax.vmap(partial(jax.random.fold_in, token_key))(jnp.arange(batch_size))
