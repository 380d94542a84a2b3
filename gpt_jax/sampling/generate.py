"""Generate text of any length: prefill the prompt in one pass, then decode with a KV cache (`lax.scan`).

The last token of the prompt is left to the decoder, which reads a token and draws the next. So a prompt of
one token, as a text from nothing has, needs no other program.

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
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gpt_jax.model.cache import Cache, empty_cache
from gpt_jax.model.layers import Params, cast_matrices
from gpt_jax.model.params import unstack_layers
from gpt_jax.model.transformer import GPT
from gpt_jax.sampling.rules import SamplingRules, draw

CHUNK = 32  # about how many tokens one call generates
MANY_ROWS = 8  # from so many texts on, padding and empty places of the cache cost more than compiling
SHORT_PROMPT = 16  # many texts read a prompt of up to so many tokens without more padding
CACHE_SIZES = 4  # for many texts; the attention of each token reads the whole cache, filled or not
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
    # A program is compiled for where its arguments are. What may be anywhere, as the parameters of an
    # exported model, is bound to its place, like the results of programs: otherwise `decode` compiles twice.
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, params))
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
    context, chunk, rows = model.config.context, chunk_length(model.config.context), len(recent_BxR)
    filled = n - window_start(n, context)
    window_BxT = np.zeros((max(rows, _min_rows()), filled), np.int32)
    window_BxT[:rows] = recent_BxR[:, -filled:]
    token_B = jax.device_put(window_BxT[:, -1], _place(params))
    cache = _read_all(model, params, window_BxT[:, :-1])

    count = min(context + 1 - filled, end - n)  # with more tokens, the window would be too long
    before_BxC = None
    for done in range(0, count, chunk):
        room = _room(context, rows, filled - 1 + done + chunk)
        if room > cache.room:
            cache = _enlarge(cache, room)
        token_B, cache, drawn_BxC = decode(
            model, chunk, params, token_B, cache, rules, key, np.int32(n + done)
        )
        # Read a chunk only when the next one is under way, so that the device always has work.
        if before_BxC is not None:
            yield np.asarray(before_BxC)[:rows]
        before_BxC = drawn_BxC
    # What the last chunk draws beyond the count is dropped.
    yield np.asarray(before_BxC)[:rows, : count - done]


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


def _read_all(model: GPT, params: Params, tokens_BxT: np.ndarray) -> Cache:
    """The cache with T tokens, fewer than the context, or none at all, and room for a chunk more."""
    context, (rows, length) = model.config.context, tokens_BxT.shape
    room = _room(context, rows, length + chunk_length(context))
    if length == 0:
        return jax.device_put(_empty_cache(model.config, model.vocab_size, rows, room), _place(params))
    # Few shapes are compiled, not one for each length: half a context, and a whole one. With many texts at
    # once, the padding of a short prompt would take as long as dozens of tokens: it has a shape of its own.
    half = max(context // 2, 1)
    shapes = (half, context) if rows < MANY_ROWS else (min(SHORT_PROMPT, half), half, context)
    n_time = next(shape for shape in shapes if length <= shape)
    padded_BxT = np.pad(tokens_BxT, ((0, 0), (0, n_time - length)))
    return prefill(model, params, padded_BxT, np.int32(length), max(room, _room(context, rows, n_time)))


def _place(params: Params) -> Sharding:
    """Where `decode` finds its first arguments: as its results, on each device that has parameters."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _room(context: int, rows: int, needed: int) -> int:
    """The room of a cache for `needed` tokens: the whole context; for many texts, at first a part of it."""
    parts = CACHE_SIZES if rows >= MANY_ROWS else 1
    sizes = [-(-context * part // parts) for part in range(1, parts + 1)]
    return next((size for size in sizes if needed <= size), context)


@partial(jax.jit, static_argnums=(0, 4))
def prefill(
    model: GPT, params: Params, tokens_BxT: jax.Array, length: jax.Array, room: int | None = None
) -> Cache:
    """Read the first `length` of T tokens in one pass; the rest is padding and has no effect.

    Args:
        model: the model.
        params: its parameters, unstacked.
        tokens_BxT: integer ids.
        length: int32 scalar, 1 or more.
        room: how many tokens the cache can hold; None: the context.
    """
    empty = empty_cache(model.config, model.vocab_size, tokens_BxT.shape[0], room)
    # No layer looks ahead, and the padding's keys are overwritten before the mask shows them.
    return _read(model, params, tokens_BxT, empty, length)[1]


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def decode(
    model: GPT,
    n_tokens: int,
    params: Params,
    token_B: jax.Array,
    cache: Cache,
    rules: SamplingRules,
    key: jax.Array,
    position: jax.Array,
) -> tuple[jax.Array, Cache, jax.Array]:
    """`n_tokens` times: read a token, and draw the next.

    Args:
        model: the model.
        n_tokens: C, how many to draw.
        params: its parameters, unstacked.
        token_B: int32, the last token of each text, which is not in the cache yet.
        cache: with the tokens before it. It is donated.
        rules: how to draw.
        key: the random stream.
        position: int32 scalar, the number of the first token to draw.

    Returns:
        The last token drawn, the cache with those before it, and the tokens, int32 [B, C].
    """

    def step(carry: tuple[jax.Array, Cache], index: jax.Array) -> tuple[Any, jax.Array]:
        token_B, cache = carry
        logits_Bx1xV, cache = _read(model, matrices, token_B[:, None], cache)
        token_B = draw(_keys(key, index, len(token_B)), logits_Bx1xV[:, 0], rules)
        return (token_B, cache), token_B

    matrices = cast_matrices(model.config, params)
    indices = position + jnp.arange(n_tokens)
    (token_B, cache), tokens_CxB = jax.lax.scan(step, (token_B, cache), indices)
    return token_B, cache, tokens_CxB.T


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
_enlarge = jax.jit(Cache.enlarge, static_argnums=1)
_empty_cache = jax.jit(empty_cache, static_argnums=(0, 1, 2, 3))


def _min_rows() -> int:
    """On a CPU, XLA of jax 0.9 multiplies one row by a matrix four to eight times slower than two rows."""
    return 2 if jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10) else 1


def _keys(key: jax.Array, index: jax.Array, batch_size: int) -> jax.Array:
    """A key for each row of token `index`; a row's does not depend on how many rows there are."""
    token_key = jax.random.fold_in(key, index)
    return jax.vmap(partial(jax.random.fold_in, token_key))(jnp.arange(batch_size))
