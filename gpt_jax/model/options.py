"""What a model can have beyond GPT-2, each option off by default. `W` is the width of the convolution.

Sources: grouped-query attention (Ainslie et al. 2023); RoPE (Su et al. 2021); QK-norm (Henry et al. 2020);
SwiGLU (Shazeer 2020); squared ReLU, and a short convolution after q, k and v in Primer (So et al. 2021), here
before the MLP as in "Canon layers" (Allen-Zhu 2025); residual connections from the embedding to every block
(github.com/KellerJordan/modded-nanogpt).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpt_jax.config import ModelConfig
from gpt_jax.model.cache import Cache, LayerCache
from gpt_jax.model.layers import make_embedding, make_linear, normal, rms_norm, scramble
from gpt_jax.parallel.execution import Execution

MAX_BIGRAMS = 2**14  # rows of a bigram embedding: enough for every pair of 127 characters


def embed_bigrams(
    config: ModelConfig, execution: Execution, tokens_BxT: jax.Array, cache: Cache | None, vocab_size: int
) -> jax.Array:
    """An embedding of each token together with the one before it, [B, T, D]; initially zero."""
    rows, last_B = n_bigram_ids(vocab_size), None if cache is None else cache.last_B
    embed = make_embedding(config, execution, rows, "vocab", "bigram_embedding", std=0)
    return embed(bigram_ids(tokens_BxT, last_B, vocab_size))


def n_bigram_ids(vocab_size: int) -> int:
    """Rows of the bigram embedding: one for each pair of tokens, up to `MAX_BIGRAMS`."""
    return min((vocab_size + 1) * vocab_size, MAX_BIGRAMS)


def bigram_ids(tokens_BxT: jax.Array, last_B: jax.Array | None, vocab_size: int) -> jax.Array:
    """An id for each token and the one before it, int32 [B, T]: where there are more pairs than ids, a hash.

    `last_B` are the tokens before these, V where there is none; None: these are the first tokens.
    """
    if last_B is None:
        last_B = jnp.full_like(tokens_BxT[:, 0], vocab_size)
    before_BxT = jnp.concatenate([last_B[:, None], tokens_BxT[:, :-1]], axis=1)
    if (vocab_size + 1) * vocab_size <= MAX_BIGRAMS:
        return before_BxT * vocab_size + tokens_BxT
    # Multiples of 2^32 / golden ratio lie far apart: no two pairs of a vocabulary like GPT-2's get the same
    # number before it is scrambled, and few pairs of a larger one.
    number_BxT = before_BxT.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + tokens_BxT.astype(jnp.uint32)
    return (scramble(number_BxT) % MAX_BIGRAMS).astype(jnp.int32)


def grouped_heads(
    config: ModelConfig, execution: Execution, x_BxTxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, H, T, K], and keys and values of fewer heads (grouped-query attention)."""
    width, n_kv = config.head_width, config.n_head // config.n_groups
    q_axes, kv_axes = ("embed", "heads", None), ("embed", None, "heads", None)
    q_BxTxHxK = make_linear(config, execution, (config.n_head, width), q_axes, "q")(x_BxTxD)
    kv_BxTx2xHxK = make_linear(config, execution, (2, n_kv, width), kv_axes, "kv")(x_BxTxD)
    return q_BxTxHxK.swapaxes(1, 2), *jnp.einsum("btchk->cbhtk", kv_BxTx2xHxK)


def norm_and_rotate(
    config: ModelConfig,
    execution: Execution,
    q_BxHxTxK: jax.Array,
    k_BxHxTxK: jax.Array,
    positions_BxT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys after QK-norm and RoPE, where the model has them."""
    if config.qk_norm:
        epsilon = config.norm_eps or 1e-6
        q_BxHxTxK = rms_norm(execution, "q_norm", epsilon)(q_BxHxTxK)
        k_BxHxTxK = rms_norm(execution, "k_norm", epsilon)(k_BxHxTxK)
    if config.position == "rope":
        q_BxHxTxK = rotate(q_BxHxTxK, positions_BxT, config.rope_base)
        k_BxHxTxK = rotate(k_BxHxTxK, positions_BxT, config.rope_base)
    return q_BxHxTxK, k_BxHxTxK


def rotate(x_BxHxTxK: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """RoPE: rotate channels i and i + K/2 of a token at position p by the angle p base^(-2i/K).

    `positions` are [B, T], or [1, T] or [T] where all rows have the same.
    """
    half = x_BxHxTxK.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions_Bx1xTx1 = positions.reshape(-1, 1, x_BxHxTxK.shape[2], 1).astype(jnp.float32)
    angles_Bx1xTxK = positions_Bx1xTx1 * frequencies[None, None, None]
    cos, sin = jnp.cos(angles_Bx1xTxK), jnp.sin(angles_Bx1xTxK)
    a, b = jnp.split(x_BxHxTxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxHxTxK.dtype)


def activate(config: ModelConfig, h_BxTxGxF: jax.Array) -> jax.Array:
    """The MLP's non-linearity where it is not GPT-2's, [B, T, F]."""
    if config.activation == "gelu_exact":
        return nn.gelu(h_BxTxGxF[:, :, 0], approximate=False)
    if config.activation == "relu2":
        return jnp.square(nn.relu(h_BxTxGxF[:, :, 0]))
    return nn.silu(h_BxTxGxF[:, :, 0]) * h_BxTxGxF[:, :, 1]  # swiglu


def add_x0(block: nn.Module, x_BxTxD: jax.Array, x0_BxTxD: jax.Array) -> jax.Array:
    """The residual stream plus the embedding, each channel of it times a learned gate of the block."""
    gate_D = block.param("x0_residual", normal(0.0, ("embed",)), (x_BxTxD.shape[-1],))
    return x_BxTxD + gate_D.astype(x_BxTxD.dtype)[None, None] * x0_BxTxD


class Head(nn.Module):
    """The matrix of an output head that is not tied to the embedding."""

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """[V, D], float32."""
        width, std = self.config.d_model, 0.0 if self.config.zero_init else self.config.init_std
        return self.param("kernel", normal(std, ("embed", "vocab")), (width, self.vocab_size)).T


class CausalConvolution(nn.Module):
    """A depthwise causal convolution over W tokens, added to its input; initially the identity."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, cache: LayerCache | None, n_tokens: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] to [B, T, D], and the cache with the newest W - 1 of the first `n_tokens` tokens.

        `n_tokens` is a scalar, or int32 [B] for rows of unequal lengths.
        """
        width, n_time = self.config.conv_width, x_BxTxD.shape[1]
        weights_WxD = self.param("weights", normal(0.0, (None, "embed")), (width, x_BxTxD.shape[2]))
        weights_WxD = weights_WxD.astype(x_BxTxD.dtype)
        if cache is None:
            inputs_BxSxD = jnp.pad(x_BxTxD, ((0, 0), (width - 1, 0), (0, 0)))
        else:
            assert cache.conv_BxSxD is not None  # `empty_cache` makes one
            inputs_BxSxD = jnp.concatenate([cache.conv_BxSxD, x_BxTxD], axis=1)  # S = W - 1 + T
            first: Any = n_time if n_tokens is None else n_tokens
            if jnp.ndim(first) == 0:
                newest_BxSxD = jax.lax.dynamic_slice_in_dim(inputs_BxSxD, first, width - 1, axis=1)
            else:
                rows_BxS = first[:, None] + jnp.arange(width - 1)[None]
                newest_BxSxD = jnp.take_along_axis(inputs_BxSxD, rows_BxS[:, :, None], axis=1)
            cache = cache.replace(conv_BxSxD=newest_BxSxD)
        # The last row of weights belongs to the token itself.
        terms = [weights_WxD[None, i : i + 1] * inputs_BxSxD[:, i : i + n_time] for i in range(width)]
        return x_BxTxD + sum(terms), cache
