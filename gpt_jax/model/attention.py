"""Causal self-attention: the module, and how it is computed, which depends on hardware and caller."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from gpt_jax.config import ModelConfig
from gpt_jax.model.cache import LayerCache
from gpt_jax.model.dropout import dropout
from gpt_jax.model.layers import compute_dtype, make_linear, residual_std, rms_norm
from gpt_jax.model.options import rotate
from gpt_jax.parallel.devices import causal_cudnn, first_device, has_cudnn_attention, has_parallel_sums

MIN_CACHE_FOR_SUMS = 2**19  # numbers; with fewer, waking the other cores takes longer than it saves


class CausalSelfAttention(nn.Module):
    """Every token reads from itself and the tokens before it."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, positions_T: jax.Array, seed_2: jax.Array | None, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The attention output of each token, [B, T, D], and the cache with these tokens' keys and values."""
        config, dtype = self.config, compute_dtype(self.config)
        heads = (3, config.n_head, config.d_head)
        qkv_BxTx3xHxK = make_linear(config, heads, ("embed", None, "heads", None), "qkv")(x_BxTxD)
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = jnp.einsum("btchk->cbhtk", qkv_BxTx3xHxK)
        if config.qk_norm:
            q_BxHxTxK = rms_norm(dtype, "q_norm")(q_BxHxTxK)
            k_BxHxTxK = rms_norm(dtype, "k_norm")(k_BxHxTxK)
        if config.position == "rope":
            q_BxHxTxK = rotate(q_BxHxTxK, positions_T, config.rope_base)
            k_BxHxTxK = rotate(k_BxHxTxK, positions_T, config.rope_base)
        if cache is not None:
            cache = cache.add_keys(k_BxHxTxK, v_BxHxTxK, positions_T[0])
        record = self._record if self.is_mutable_collection("intermediates") else None
        y_BxHxTxK = causal_attention(
            config, q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, positions_T, cache, seed_2, self.mesh, record
        )
        out = make_linear(
            config, config.d_model, ("heads", None, "embed"), "out", axis=(1, 3), std=residual_std(config)
        )
        return out(y_BxHxTxK), cache

    def _record(self, weights_BxHxTxS: jax.Array) -> None:
        self.sow("intermediates", "weights_BxHxTxS", weights_BxHxTxS)


def causal_attention(
    config: ModelConfig,
    q_BxHxTxK: jax.Array,
    k_BxHxTxK: jax.Array,
    v_BxHxTxK: jax.Array,
    positions_T: jax.Array,
    cache: LayerCache | None,
    seed_2: jax.Array | None,
    mesh: Mesh | None,
    record: Callable[[jax.Array], None] | None,
) -> jax.Array:
    """The attention output of each query, [B, H, T, K].

    Args:
        config: of the model.
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK: queries, keys and values of the same tokens.
        positions_T: their positions in the window.
        cache: all keys and values so far, these included; None: there are no others.
        seed_2: of the dropout masks; None: no dropout.
        mesh: the devices.
        record: called with the attention weights [B, H, T, S]; None: they are not needed.
    """

    def drop(weights_BxHxTxS: jax.Array, block: int = 0) -> jax.Array:
        return dropout(weights_BxHxTxS, config.attention_dropout, seed_2, 2 + block)

    if cache is not None:
        # Positions of the cache after the last token hold stale keys; the mask hides them too.
        mask_TxS = causal_mask(positions_T, cache.v_BxHxSxK.shape[2])
        is_large = cache.v_BxHxSxK.size >= MIN_CACHE_FOR_SUMS
        by_sums = len(positions_T) == 1 and is_large and has_parallel_sums(*first_device(mesh))
        return attend_to_cache(q_BxHxTxK, cache.k_BxHxKxS, cache.v_BxHxSxK, mask_TxS, by_sums)
    mask_TxT = causal_mask(positions_T, k_BxHxTxK.shape[2])
    if record is not None:
        return attend(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, mask_TxT, record=record)
    drops_weights = config.attention_dropout > 0 and seed_2 is not None
    if not drops_weights and has_cudnn_attention(config, *first_device(mesh)):
        return attend_fused(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK)
    return attend_in_blocks(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, mask_TxT, config.query_blocks, drop)


def causal_mask(positions_T: jax.Array, n_keys: int) -> jax.Array:
    """Bool [T, S], true where a query at position p may read a key at a position up to p."""
    return positions_T[:, None] >= jnp.arange(n_keys)[None, :]


def attend(
    q_BxHxTxK: jax.Array,
    k_BxHxSxK: jax.Array,
    v_BxHxSxK: jax.Array,
    mask_TxS: jax.Array,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
    record: Callable[[jax.Array], None] = lambda weights: None,
) -> jax.Array:
    """Scaled dot-product attention: softmax(q k^T / sqrt(K)) v, with the softmax in float32.

    It does not use `jax.nn.dot_product_attention`, which has no dropout of the weights, and which made the
    step of a small model 8 to 10% slower on a CPU.

    Args:
        q_BxHxTxK, k_BxHxSxK, v_BxHxSxK: queries, keys and values.
        mask_TxS: true where a query may read a key.
        drop: applied to the attention weights [B, H, T, S].
        record: called with the attention weights, float32, before dropout.

    Returns:
        [B, H, T, K] in the type of the queries.
    """
    scale = q_BxHxTxK.shape[-1] ** -0.5
    scores_BxHxTxS = jnp.einsum(
        "bhtk,bhsk->bhts", q_BxHxTxK * scale, k_BxHxSxK, preferred_element_type=jnp.float32
    )
    scores_BxHxTxS = jnp.where(mask_TxS[None, None], scores_BxHxTxS, jnp.finfo(jnp.float32).min)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
    record(weights_BxHxTxS)
    weights_BxHxTxS = drop(weights_BxHxTxS.astype(q_BxHxTxK.dtype))
    return jnp.einsum("bhts,bhsk->bhtk", weights_BxHxTxS, v_BxHxSxK)


def attend_to_cache(
    q_BxHxTxK: jax.Array, k_BxHxKxS: jax.Array, v_BxHxSxK: jax.Array, mask_TxS: jax.Array, by_sums: bool
) -> jax.Array:
    """`attend`, with the keys as the cache holds them.

    Args:
        q_BxHxTxK: queries.
        k_BxHxKxS, v_BxHxSxK: keys and values.
        mask_TxS: true where a query may read a key.
        by_sums: compute with sums in place of matrix products; for one query only. The products of one query
            and the keys of many heads are as many products of a vector and a small matrix. XLA computes them
            on one core of a CPU, one after the other, but sums on all cores.
    """
    q_BxHxTxK *= q_BxHxTxK.shape[-1] ** -0.5
    if by_sums:
        q_BxHxKxT = q_BxHxTxK.swapaxes(2, 3).astype(jnp.float32)
        scores_BxHxTxS = jnp.sum(q_BxHxKxT * k_BxHxKxS.astype(jnp.float32), axis=2, keepdims=True)
    else:
        scores_BxHxTxS = jnp.einsum(
            "bhtk,bhks->bhts", q_BxHxTxK, k_BxHxKxS, preferred_element_type=jnp.float32
        )
    scores_BxHxTxS = jnp.where(mask_TxS[None, None], scores_BxHxTxS, jnp.finfo(jnp.float32).min)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
    if by_sums:
        products_BxHxSxK = weights_BxHxTxS.swapaxes(2, 3) * v_BxHxSxK.astype(jnp.float32)
        return jnp.sum(products_BxHxSxK, axis=2, keepdims=True).astype(v_BxHxSxK.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights_BxHxTxS.astype(v_BxHxSxK.dtype), v_BxHxSxK)


def attend_in_blocks(
    q_BxHxTxK: jax.Array,
    k_BxHxTxK: jax.Array,
    v_BxHxTxK: jax.Array,
    mask_TxT: jax.Array,
    n_blocks: int,
    drop: Callable[..., jax.Array],
) -> jax.Array:
    """`attend`, one block of queries at a time, each without the keys after its last query.

    The causal mask hides nearly half of all keys. With more blocks, more of these are not computed at all,
    but each block takes a little time, and more to compile. `drop` is applied to the attention weights of
    each block, with the number of the block.
    """
    n_time = q_BxHxTxK.shape[2]
    bounds = sorted({n_time * i // n_blocks for i in range(n_blocks + 1)})
    blocks = [
        attend(
            q_BxHxTxK[:, :, start:end],
            k_BxHxTxK[:, :, :end],
            v_BxHxTxK[:, :, :end],
            mask_TxT[start:end, :end],
            partial(drop, block=block),
        )
        for block, (start, end) in enumerate(pairwise(bounds))
    ]
    return jnp.concatenate(blocks, axis=2)


def attend_fused(q_BxHxTxK: jax.Array, k_BxHxTxK: jax.Array, v_BxHxTxK: jax.Array) -> jax.Array:
    """`attend` with the causal mask, by a cuDNN kernel that does not store the weights [T, T]."""
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (x.swapaxes(1, 2) for x in (q_BxHxTxK, k_BxHxTxK, v_BxHxTxK))
    return causal_cudnn(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK).swapaxes(1, 2)
