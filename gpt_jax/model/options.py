"""What a model can have beyond GPT-2: RoPE, a bigram embedding, a convolution, a residual from the embedding.

Sources: RoPE (Su et al. 2021); QK-norm (Henry et al. 2020); a short convolution after q, k and v in Primer
(So et al. 2021), here before the MLP as in "Canon layers" (Allen-Zhu 2025); residual connections from the
embedding to every block (github.com/KellerJordan/modded-nanogpt).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpt_jax.config import ModelConfig
from gpt_jax.model.cache import LayerCache
from gpt_jax.model.layers import normal

MAX_BIGRAMS = 2**14  # rows of a bigram embedding: enough for every pair of 127 characters


def rotate(x_BxHxTxK: jax.Array, positions_T: jax.Array, base: float) -> jax.Array:
    """RoPE: rotate channels i and i + K/2 of a token at position p by the angle p base^(-2i/K)."""
    half = x_BxHxTxK.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_T[:, None].astype(jnp.float32) * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, None], jnp.sin(angles)[None, None]
    a, b = jnp.split(x_BxHxTxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxHxTxK.dtype)


def n_bigram_ids(vocab_size: int) -> int:
    """Rows of the bigram embedding: one for each pair of tokens, up to `MAX_BIGRAMS`."""
    return min((vocab_size + 1) * vocab_size, MAX_BIGRAMS)


def bigram_ids(tokens_BxT: jax.Array, last_B: jax.Array | None, vocab_size: int) -> jax.Array:
    """An id for each token and the one before it, [B, T]; with a large vocabulary, pairs share ids.

    Args:
        tokens_BxT: token ids.
        last_B: the tokens before them, `vocab_size` where there is none; None: these are the first tokens.
        vocab_size: V.
    """
    if last_B is None:
        last_B = jnp.full_like(tokens_BxT[:, 0], vocab_size)
    before_BxT = jnp.concatenate([last_B[:, None], tokens_BxT[:, :-1]], axis=1)
    return (before_BxT * vocab_size + tokens_BxT) % MAX_BIGRAMS


def add_x0(x_BxTxD: jax.Array, x0_BxTxD: jax.Array, gate_D: jax.Array) -> jax.Array:
    """The residual stream plus the embedding, each channel of it times a learned gate."""
    return x_BxTxD + gate_D.astype(x_BxTxD.dtype)[None, None] * x0_BxTxD


class CausalConvolution(nn.Module):
    """A depthwise causal convolution over W tokens, added to its input; initially the identity."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, cache: LayerCache | None, n_tokens: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] to [B, T, D], and the cache with the newest W - 1 of the first `n_tokens` tokens."""
        width, n_time = self.config.conv_width, x_BxTxD.shape[1]
        weights_WxD = self.param("weights", normal(0.0, (None, "embed")), (width, x_BxTxD.shape[2]))
        weights_WxD = weights_WxD.astype(x_BxTxD.dtype)
        if cache is None:
            inputs_BxSxD = jnp.pad(x_BxTxD, ((0, 0), (width - 1, 0), (0, 0)))
        else:
            assert cache.conv_BxSxD is not None  # `empty_cache` makes one
            inputs_BxSxD = jnp.concatenate([cache.conv_BxSxD, x_BxTxD], axis=1)  # S = W - 1 + T
            first = n_time if n_tokens is None else n_tokens
            newest = jax.lax.dynamic_slice_in_dim(inputs_BxSxD, first, width - 1, axis=1)
            cache = cache.replace(conv_BxSxD=newest)
        # The last row of weights belongs to the token itself.
        terms = [weights_WxD[None, i : i + 1] * inputs_BxSxD[:, i : i + n_time] for i in range(width)]
        return x_BxTxD + sum(terms), cache
