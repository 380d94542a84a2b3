"""Attention: the formula, and the ways to compute it. All give the same result up to rounding.

Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.1.
"""

from functools import partial

import jax
import jax.numpy as jnp

from gpt_jax.model import cpu
from gpt_jax.model.cache import LayerCache
from gpt_jax.model.layers import dropout
from gpt_jax.parallel.execution import Execution, attend_by_cudnn


def causal_mask(positions_T: jax.Array, n_keys: int) -> jax.Array:
    """Bool [T, S], true where a query at position p may read a key at a position up to p."""
    return positions_T[:, None] >= jnp.arange(n_keys)[None, :]


def attend(
    q_BxHxTxK: jax.Array,
    k_BxHxSxK: jax.Array,
    v_BxHxSxK: jax.Array,
    mask: jax.Array,
    rate: float = 0.0,
    seed_2: jax.Array | None = None,
    block: int = 0,
    keys: str = "bhsk",
) -> jax.Array:
    """Scaled dot-product attention: softmax(q k^T / sqrt(K)) v, [B, H, T, K] in the type of the queries.

    A query reads the keys where the mask is true, [T, S] or [B, T, S]. `rate` and `seed_2` drop weights, each
    `block` of queries with a mask of its own; `keys` is the order of the axes of the keys, which is another
    in the cache. Keys and values may have fewer heads (grouped-query attention, Ainslie et al. 2023): then
    each is read by the same number of heads of queries that are side by side.
    """
    # `jax.nn.dot_product_attention` cannot drop weights, and made a small model's step 8% slower on a CPU.
    weights_BxHxTxS = attention_weights(q_BxHxTxK, k_BxHxSxK, mask, keys).astype(q_BxHxTxK.dtype)
    weights_BxHxTxS = dropout(weights_BxHxTxS, rate, seed_2, 2 + block)  # masks 0 and 1 are those of `Block`
    y_BxHxTxK = jnp.einsum("bhts,bhsk->bhtk", _join_groups(weights_BxHxTxS, v_BxHxSxK.shape[1]), v_BxHxSxK)
    return y_BxHxTxK.reshape(q_BxHxTxK.shape)


def attention_weights(
    q_BxHxTxK: jax.Array, k_BxHxSxK: jax.Array, mask: jax.Array, keys: str = "bhsk"
) -> jax.Array:
    """How much each query reads of each key: float32 [B, H, T, S], each row sums to 1; as in `attend`."""
    n_time = q_BxHxTxK.shape[2]
    q_BxHxTxK = q_BxHxTxK * q_BxHxTxK.shape[-1] ** -0.5  # not in place: NumPy would change the caller's
    axes, q_BxHxTxK = f"bhtk,{keys}->bhts", _join_groups(q_BxHxTxK, k_BxHxSxK.shape[1])
    scores_BxHxTxS = jnp.einsum(axes, q_BxHxTxK, k_BxHxSxK, preferred_element_type=jnp.float32)
    scores_BxHxTxS = scores_BxHxTxS.reshape(len(scores_BxHxTxS), -1, n_time, scores_BxHxTxS.shape[-1])
    mask_Bx1xTxS = mask.reshape(-1, 1, *mask.shape[-2:])
    scores_BxHxTxS = jnp.where(mask_Bx1xTxS, scores_BxHxTxS, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores_BxHxTxS, axis=-1)


def _join_groups(x_BxHxTxC: jax.Array, n_heads: int) -> jax.Array:
    """[B, H, T, C] to `n_heads` heads: those that share keys and values as one, with all their queries.

    So one product reads each key once for all of them, and no key is copied.
    """
    n_batch, _, _, n_channels = x_BxHxTxC.shape
    return x_BxHxTxC.reshape(n_batch, n_heads, -1, n_channels)


def attend_within(
    execution: Execution,
    q_BxHxTxK: jax.Array,
    k_BxHxTxK: jax.Array,
    v_BxHxTxK: jax.Array,
    positions_T: jax.Array,
    rate: float,
    seed_2: jax.Array | None,
) -> jax.Array:
    """Causal attention of T tokens to each other, [B, H, T, K]: by cuDNN, in blocks of queries, or plain."""
    if execution.attention == "cudnn" and rate == 0:
        return attend_by_cudnn(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK)
    attend_here = partial(attend, rate=rate, seed_2=seed_2)
    if execution.query_blocks > 1:
        attend_here = partial(cpu.attend_in_blocks, attend_here, execution.query_blocks)
    return attend_here(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, causal_mask(positions_T, len(positions_T)))


def attend_to_cache(
    execution: Execution, q_BxHxTxK: jax.Array, cache: LayerCache, places_T: jax.Array
) -> jax.Array:
    """Causal attention of the tokens at some places of a cache to all before them, [B, H, T, K]."""
    n_queries = len(places_T) * q_BxHxTxK.shape[1] // cache.v_BxHxSxK.shape[1]  # of a head of keys
    by_sums = execution.on_cpu and cpu.sums_are_faster(n_queries, cache.v_BxHxSxK.size)
    attend_here = cpu.attend_by_sums if by_sums else partial(attend, keys="bhks")
    return attend_here(q_BxHxTxK, cache.k_BxHxKxS, cache.v_BxHxSxK, cache.mask(places_T))
