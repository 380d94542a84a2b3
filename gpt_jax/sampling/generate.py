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

Prompts of unequal lengths are read from the left; then their keys and values move to the right, so that all
rows write the next token to the same place of the cache. A row whose window shrinks is read again by itself,
and takes its place among the others.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gpt_jax.model import cpu
from gpt_jax.model.cache import Cache, empty_cache
from gpt_jax.model.layers import Params
from gpt_jax.model.params import unstack_layers
from gpt_jax.model.transformer import GPT
from gpt_jax.sampling.decode import Drawn, decode, decode_exact, prefill
from gpt_jax.sampling.rules import SamplingRules

CHUNK = 32  # about how many tokens one call generates
MANY_ROWS = 8  # from this many texts on, padding and unused cache cost more than compiling again
SHORT_PROMPT = 16  # many texts read a prompt of up to so many tokens without more padding
SHORT_HALF = 128  # half a context that is not longer than this needs no smaller shapes
LONG_CONTEXT = 1024  # a cache for a longer one begins with a part of it
CACHE_SIZES = 4  # for many texts; the attention of each token reads the whole cache, filled or not
WINDOWS = ("half", "exact")

Prompts = np.ndarray | Sequence[np.ndarray]  # [B, P], or B arrays of unequal lengths


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
    prompts: Prompts,
    length: int,
    rules: SamplingRules,
    key: jax.Array,
    window: str = "half",
) -> Iterator[np.ndarray]:
    """The tokens alone of `generate_pieces`: int32 [B, n] arrays, `length` tokens in all."""
    return (p.tokens_BxN for p in generate_pieces(model, params, prompts, length, rules, key, window))


def generate_pieces(
    model: GPT,
    params: Params,
    prompts: Prompts,
    length: int,
    rules: SamplingRules,
    key: jax.Array,
    window: str = "half",
) -> Iterator[Drawn]:
    """Continue each of B prompts, 1 or more tokens each, all at once.

    Prompts of unequal lengths have their own windows, as if each text were alone. The parameters are stacked;
    `window` is "half" or "exact", as above.

    Yields:
        Pieces as they are ready, `length` tokens in all.
    """
    context = model.config.context
    params = _unstack(params)  # once: it takes as long as a few tokens
    # A program is compiled for where its arguments are. What may be anywhere, as the parameters of an
    # exported model, is bound to its place, like the results of programs: otherwise `decode` compiles twice.
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, params))
    n_B = np.array([len(prompt) for prompt in prompts], np.int32)
    # No window reaches further back than R tokens. The newest are on the right, so that all rows grow there.
    recent_BxR = np.zeros((len(n_B), min(int(n_B.max()), context)), np.int32)
    for row_R, prompt in zip(recent_BxR, prompts, strict=True):
        newest = prompt[-len(row_R) :]
        row_R[len(row_R) - len(newest) :] = newest
    seen_BxV = None if rules.repetition_penalty is None else _seen(prompts, model.vocab_size)
    is_equal, n_left = (n_B == n_B[0]).all(), length
    while n_left:
        # Each round generates what fits into one window, and the next starts from the tokens alone; of
        # prompts of unequal lengths, one round generates all.
        round_ = _exact_pieces if window == "exact" else _pieces if is_equal else _unequal_pieces
        for piece in round_(model, params, recent_BxR, n_B, n_left, (rules, key, seen_BxV)):
            n_B, n_left = n_B + piece.tokens_BxN.shape[1], n_left - piece.tokens_BxN.shape[1]
            recent_BxR = np.concatenate([recent_BxR, piece.tokens_BxN], axis=1)[:, -context:]
            if seen_BxV is not None:
                np.put_along_axis(seen_BxV, piece.tokens_BxN, True, axis=1)
            yield piece


def _seen(prompts: Prompts, vocab_size: int) -> np.ndarray:
    """Which tokens each prompt has: bool [B, V]."""
    seen_BxV = np.zeros((len(prompts), vocab_size), bool)
    for seen_V, prompt in zip(seen_BxV, prompts, strict=True):
        seen_V[prompt] = True
    return seen_BxV


def _left_aligned(recent_BxR: np.ndarray, filled_B: np.ndarray, n_time: int) -> np.ndarray:
    """The newest `filled_B` tokens of each row, each row from column 0 on, and zeros: int32 [B, n_time]."""
    window_BxT = np.zeros((len(filled_B), n_time), np.int32)
    for window_T, row_R, filled in zip(window_BxT, recent_BxR, filled_B, strict=True):
        window_T[:filled] = row_R[len(row_R) - filled :]
    return window_BxT


def _numbers(n_B: np.ndarray, chunk: int) -> np.ndarray:
    """The numbers of the next tokens: int32 [C], or [C, B] where rows differ."""
    numbers_CxB = n_B[None] + np.arange(chunk, dtype=np.int32)[:, None]
    return numbers_CxB[:, 0] if (n_B == n_B[0]).all() else numbers_CxB


def _pieces(
    model: GPT, params: Params, recent_BxR: np.ndarray, n_B: np.ndarray, n_left: int, how: Any
) -> Iterator[Drawn]:
    """At most `n_left` tokens of rows of equal lengths, until the window shrinks."""
    context, chunk, rows = model.config.context, chunk_length(model.config.context), len(n_B)
    rules, key, seen_BxV = how
    more = max(rows, cpu.min_rows() if model.execution.on_cpu else 1) - rows
    if more:  # rows that nobody reads
        recent_BxR, n_B = np.pad(recent_BxR, ((0, more), (0, 0))), np.pad(n_B, (0, more), mode="edge")
        seen_BxV = None if seen_BxV is None else np.pad(seen_BxV, ((0, more), (0, 0)))
    filled_B, (token_B, cache) = _filled(n_B, context), _begin(model, params, recent_BxR, n_B, seen_BxV)
    filled = int(filled_B[0])
    count = min(context + 1 - filled, n_left)  # with more tokens, the window would be too long
    before = None
    for done in range(0, count, chunk):
        room = _room(context, rows, filled - 1 + done + chunk)
        if room > cache.room:
            cache = _enlarge(cache, room)
        token_B, cache, drawn = decode(model, params, token_B, cache, rules, key, _numbers(n_B + done, chunk))
        # Read a chunk only when the next one is under way, so that the device always has work.
        if before is not None:
            yield jax.tree.map(lambda x_BxC: np.asarray(x_BxC)[:rows], before)
        before = drawn
    # What the last chunk draws beyond the count is dropped.
    yield jax.tree.map(lambda x_BxC: np.asarray(x_BxC)[:rows, : count - done], before)


def _begin(
    model: GPT, params: Params, recent_BxR: np.ndarray, n_B: np.ndarray, seen_BxV: np.ndarray | None
) -> tuple[jax.Array, Cache]:
    """The last token of each row, and the cache with those before it in its window."""
    token_B = jax.device_put(recent_BxR[:, -1], _place(params))
    cache = _read_all(model, params, recent_BxR[:, :-1], _filled(n_B, model.config.context) - 1)
    if seen_BxV is not None:
        cache = cache.replace(seen_BxV=jax.device_put(seen_BxV.copy(), _place(params)))
    return token_B, cache


def _filled(n_B: np.ndarray, context: int) -> np.ndarray:
    """How many tokens the window has from which token n of each row is predicted: int32 [B]."""
    return np.array([n - window_start(n, context) for n in n_B.tolist()], np.int32)


def _unequal_pieces(
    model: GPT, params: Params, recent_BxR: np.ndarray, n_B: np.ndarray, n_left: int, how: Any
) -> Iterator[Drawn]:
    """`n_left` tokens of rows of unequal lengths. A row whose window shrinks is read again by itself."""
    context, (rules, key, seen_BxV) = model.config.context, how
    chunk, filled_B = chunk_length(context), _filled(n_B, context)
    token_B, cache = _begin(model, params, recent_BxR, n_B, seen_BxV)
    cache = _align(_enlarge(cache, context), filled_B - 1)
    while n_left:
        count = min(context + 1 - int(filled_B.max()), n_left)
        # No token more is drawn than all windows can take: their keys and values are needed afterwards.
        for size in [chunk] * (count // chunk) + [1] * (count % chunk):
            token_B, cache, drawn = decode(model, params, token_B, cache, rules, key, _numbers(n_B, size))
            piece = jax.tree.map(np.asarray, drawn)
            recent_BxR = np.concatenate([recent_BxR, piece.tokens_BxN], axis=1)[:, -context:]
            n_B = n_B + size
            yield piece
        n_left, before_B, filled_B = n_left - count, filled_B + count, _filled(n_B, context)
        for row in np.flatnonzero(filled_B < before_B) if n_left else ():
            again = _read_all(model, params, recent_BxR[[row], :-1], filled_B[[row]] - 1, context)
            cache = _replace_row(cache, row, again, filled_B - 1)


def _exact_pieces(
    model: GPT, params: Params, recent_BxR: np.ndarray, n_B: np.ndarray, n_left: int, how: Any
) -> Iterator[Drawn]:
    """The next `CHUNK` tokens of each row, or `n_left`, each from the last T before it."""
    context, (rules, key, seen_BxV) = model.config.context, how
    window_BxT = _left_aligned(recent_BxR, np.minimum(n_B, context), context)
    seen_BxV = None if seen_BxV is None else seen_BxV.copy()
    drawn = decode_exact(model, params, window_BxT, rules, key, _numbers(n_B, CHUNK), seen_BxV)
    yield jax.tree.map(lambda x_BxC: np.asarray(x_BxC)[:, :n_left], drawn)


def _read_all(
    model: GPT, params: Params, recent_BxR: np.ndarray, n_tokens_B: np.ndarray, room: int = 0
) -> Cache:
    """The cache with the newest tokens of each row, fewer than the context, and room (0: for a chunk).

    Rows of unequal lengths begin at place 0: see `Cache.align`.
    """
    context, rows, length = model.config.context, len(n_tokens_B), int(n_tokens_B.max())
    room = room or _room(context, rows, length + chunk_length(context))
    if length == 0:
        empty = _empty_cache(model.config, model.execution, model.vocab_size, rows, room)
        return jax.device_put(empty, _place(params))
    # Few shapes are compiled, not one for each length: a context, its half, and if that is long smaller ones.
    # With many texts at once, the padding of a short prompt would take as long as dozens of tokens: it has a
    # shape of its own.
    shapes = _halves(context, SHORT_HALF)
    shapes = shapes if rows < MANY_ROWS else [min(SHORT_PROMPT, shapes[0]), *shapes]
    n_time = next(shape for shape in shapes if length <= shape)
    tokens_BxT, is_equal = _left_aligned(recent_BxR, n_tokens_B, n_time), (n_tokens_B == length).all()
    n_tokens = np.int32(length) if is_equal else n_tokens_B
    return prefill(model, params, tokens_BxT, n_tokens, max(room, _room(context, rows, n_time)))


def _place(params: Params) -> Sharding:
    """Where `decode` finds its first arguments: as its results, on each device that has parameters."""
    sharding = jax.tree.leaves(params)[0].sharding
    is_named = isinstance(sharding, NamedSharding)
    return NamedSharding(sharding.mesh, PartitionSpec()) if is_named else sharding


def _room(context: int, rows: int, needed: int) -> int:
    """The room of a cache for `needed` tokens: the context; if it is long or texts are many, first a part."""
    if rows >= MANY_ROWS:
        sizes = [-(-context * part // CACHE_SIZES) for part in range(1, CACHE_SIZES + 1)]
    else:
        sizes = _halves(context, LONG_CONTEXT) if context > LONG_CONTEXT else []
    return next((size for size in sizes if needed <= size), context)


def _halves(context: int, least: int) -> list[int]:
    """The context, its half, a quarter ... down to the first that is not above `least`; ascending."""
    sizes = [context, max(context // 2, 1)]
    while sizes[-1] > least:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


_unstack = jax.jit(unstack_layers)
_enlarge = jax.jit(Cache.enlarge, static_argnums=1)
_align = jax.jit(Cache.align)
_replace_row = jax.jit(Cache.replace_row, donate_argnums=0)
_empty_cache = jax.jit(empty_cache, static_argnums=(0, 1, 2, 3, 4))
