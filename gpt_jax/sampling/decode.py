"""The compiled programs of the sampler: prefill a prompt, and decode with a KV cache or without one."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.model.cache import Cache, empty_cache
from gpt_jax.model.layers import Params
from gpt_jax.model.params import cast_matrices
from gpt_jax.model.transformer import GPT
from gpt_jax.sampling.rules import SamplingRules, draw, log_probability


class Drawn(NamedTuple):
    """The newest tokens of each text, and their log probabilities under the model's own distribution."""

    tokens_BxN: Any  # int32
    logprobs_BxN: Any  # float32; None unless `SamplingRules.logprobs`


@partial(jax.jit, static_argnums=(0, 4))
def prefill(
    model: GPT, params: Params, tokens_BxT: jax.Array, length: jax.Array, room: int | None = None
) -> Cache:
    """Read the first `length` of T tokens, 1 or more, in one pass; the rest is padding and has no effect.

    With an int32 [B] each row has its own length, 0 or more: `Cache.align` then puts their ends side by side.
    The parameters are unstacked; the cache can hold `room` tokens (None: the context).
    """
    empty = empty_cache(model.config, model.execution, model.vocab_size, len(tokens_BxT), room)
    # No layer looks ahead, and the padding's keys are overwritten before the mask shows them.
    return _read(model, params, tokens_BxT, empty, length)[1]


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def decode(
    model: GPT,
    params: Params,
    token_B: jax.Array,
    cache: Cache,
    rules: SamplingRules,
    key: jax.Array,
    numbers: jax.Array,
) -> tuple[jax.Array, Cache, Drawn]:
    """C times: read a token, and draw the next; `numbers`, [C] or [C, B], are the indices of those to draw.

    The parameters are unstacked. `token_B` is the last token of each text, which is not in the cache yet. The
    cache is donated.

    Returns:
        The last token drawn, the cache with those before it, and the C tokens.
    """

    def step(carry: tuple[jax.Array, Cache], number: jax.Array) -> tuple[Any, Any]:
        token_B, cache = carry
        logits_Bx1xV, cache = _read(model, matrices, token_B[:, None], cache)
        drawn = _draw(logits_Bx1xV[:, 0], rules, key, number, cache.seen_BxV)
        return (drawn[0], cache.replace(seen_BxV=_with_token(cache.seen_BxV, drawn[0]))), drawn

    matrices = cast_matrices(params, model.execution.dtype)
    (token_B, cache), drawn_CxB = jax.lax.scan(step, (token_B, cache), numbers)
    return token_B, cache, Drawn(*jax.tree.map(jnp.transpose, drawn_CxB))


@partial(jax.jit, static_argnums=0)
def decode_exact(
    model: GPT,
    params: Params,
    window_BxT: jax.Array,
    rules: SamplingRules,
    key: jax.Array,
    numbers: jax.Array,
    seen_BxV: jax.Array | None = None,
) -> Drawn:
    """The C tokens of these numbers, [C] or [C, B], each from its own pass over the last T before it."""
    batch_size, context = window_BxT.shape
    rows_B = jnp.arange(batch_size)

    def step(carry: tuple[jax.Array, Any], number: jax.Array) -> tuple[Any, Any]:
        window_BxT, seen_BxV = carry
        number_B = jnp.broadcast_to(number, batch_size)
        filled_B = jnp.minimum(number_B, context)
        logits_BxTxV, _ = model.apply({"params": matrices}, window_BxT)
        drawn = _draw(logits_BxTxV[rows_B, filled_B - 1], rules, key, number, seen_BxV)
        full_BxT = jnp.roll(window_BxT, -1, axis=1).at[:, -1].set(drawn[0])
        room_BxT = window_BxT.at[rows_B, filled_B].set(drawn[0], mode="drop")
        window_BxT = jnp.where(number_B[:, None] < context, room_BxT, full_BxT)
        return (window_BxT, _with_token(seen_BxV, drawn[0])), drawn

    matrices = cast_matrices(params, model.execution.dtype)
    _, drawn_CxB = jax.lax.scan(step, (window_BxT, seen_BxV), numbers)
    return Drawn(*jax.tree.map(jnp.transpose, drawn_CxB))


def _draw(
    logits_BxV: jax.Array, rules: SamplingRules, key: jax.Array, number: jax.Array, seen_BxV: Any
) -> tuple[jax.Array, jax.Array | None]:
    """A token of each row, and its log probability where the rules ask for it."""
    token_B = draw(_keys(key, number, len(logits_BxV)), logits_BxV, rules, seen_BxV)
    return token_B, log_probability(logits_BxV, token_B) if rules.logprobs else None


def _with_token(seen_BxV: jax.Array | None, token_B: jax.Array) -> jax.Array | None:
    return None if seen_BxV is None else seen_BxV.at[jnp.arange(len(token_B)), token_B].set(True)


def _read(model: GPT, params: Params, tokens_BxT: jax.Array, cache: Cache, *n_tokens: Any) -> Any:
    return model.apply({"params": params}, tokens_BxT, cache, *n_tokens)


def _keys(key: jax.Array, number: jax.Array, batch_size: int) -> jax.Array:
    """A key for each row, of the number of its token (a scalar or [B]), whatever rows are beside it."""
    fold_in = jax.random.fold_in
    if number.ndim == 0:
        return jax.vmap(partial(fold_in, fold_in(key, number)))(jnp.arange(batch_size))
    return jax.vmap(lambda n, row: fold_in(fold_in(key, n), row))(number, jnp.arange(batch_size))
