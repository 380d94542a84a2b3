"""The transformer: a decoder-only stack of blocks, GPT-2's by default.

Embedding, head, block, attention and MLP from top to bottom; what a head computes is in `attention.py`. What
GPT-2 does not have is in `options.py`, the KV cache in `cache.py`, what only a CPU needs in `cpu.py`.

Names end in shapes: `B` batch, `T` time, `S` time of the keys, `D` model width, `H` heads, `K` head width,
`F` MLP width, `G` projections into the MLP (two for a gated one), `V` vocabulary, `L` layers.

Sources: "Attention Is All You Need" (Vaswani et al. 2017); GPT-2 (Radford et al. 2019).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpt_jax.config import ModelConfig
from gpt_jax.model import cpu, options
from gpt_jax.model.attention import attend_to_cache, attend_within, attention_weights, causal_mask
from gpt_jax.model.cache import Cache, LayerCache
from gpt_jax.model.layers import dropout, dropout_seeds, make_embedding, make_linear, make_norm, make_stack
from gpt_jax.parallel.execution import Execution
from gpt_jax.parallel.mesh import split_batch


class GPT(nn.Module):
    """Token ids to the logits of the token that follows each.

    The parameters of the layers are stacked along a leading axis L, and one compiled layer runs L times
    (`nn.scan`). The model also takes unstacked parameters (`params.unstack_layers`): the decoder uses these,
    since slicing a layer out of the stack for each token takes longer than the token's arithmetic.
    """

    config: ModelConfig
    vocab_size: int  # V
    execution: Execution  # how it is computed, from `resolve_execution`

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        cache: Cache | None = None,
        n_tokens: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        output: Callable[..., jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Logits, float32 [B, T, V], and the cache with these tokens added (None without one).

        Args:
            tokens_BxT: integer ids; T is at most `config.context`.
            cache: of the earlier tokens; needs unstacked parameters. None: no earlier tokens.
            n_tokens: with a cache, how many of the T tokens count (a scalar or int32 [B]); the rest is
                padding. None: all of them.
            dropout_key: decides the dropout masks; None: no dropout.
            output: what to compute in place of the logits, from what `to_logits` takes: their loss, say.
        """
        config, execution = self.config, self.execution
        # By default a TPU or GPU would round float32 factors to bfloat16 or TensorFloat-32.
        with jax.default_matmul_precision("float32" if execution.dtype == "float32" else None):
            embed = make_embedding(config, execution, self.vocab_size, "vocab", "token_embedding")
            x_BxTxD = embed(tokens_BxT)
            positions_T = jnp.arange(tokens_BxT.shape[1]) + (0 if cache is None else cache.length)
            if config.position == "learned":
                positions = make_embedding(config, execution, config.context, "time", "position_embedding")
                x_BxTxD += positions(positions_T[None] if cache is None else cache.positions(positions_T))
            if config.bigram:
                x_BxTxD += options.embed_bigrams(config, execution, tokens_BxT, cache, self.vocab_size)
            seed_2, seeds_Lx2 = dropout_seeds(dropout_key, config.n_layer)
            x_BxTxD = x0_BxTxD = split_batch(dropout(x_BxTxD, config.dropout, seed_2), execution.mesh)

            if self.has_variable("params", "block_0"):
                layers: list[Any] = [None] * config.n_layer if cache is None else list(cache.layers)
                for i in range(config.n_layer):
                    seed_2 = None if seeds_Lx2 is None else seeds_Lx2[i]
                    block = Block(config, execution, name=f"block_{i}")
                    x_BxTxD, layers[i] = block(x_BxTxD, x0_BxTxD, positions_T, seed_2, layers[i], n_tokens)
                cache = None if cache is None else cache.add(tokens_BxT, tuple(layers), n_tokens)
            elif cache is None:
                x_BxTxD, _ = make_stack(Block, config, execution)(x_BxTxD, x0_BxTxD, positions_T, seeds_Lx2)
            else:
                raise ValueError("a cache needs unstacked parameters: unstack_layers(params)")

            x_BxTxD = make_norm(config, execution, "final_norm")(x_BxTxD)
            tied = config.tied_embedding
            head_VxD = embed.embedding if tied else options.Head(config, self.vocab_size, name="head")()
            return (output or to_logits)(execution, x_BxTxD, head_VxD), cache


def to_logits(execution: Execution, x_BxTxD: jax.Array, head_VxD: jax.Array) -> jax.Array:
    """The output head: logits, float32 [B, T, V]. Their sums are in float32 and stay unrounded."""
    x_BxTxD, head_DxV = cpu.widen(execution, x_BxTxD, head_VxD.astype(execution.dtype).T)
    return jnp.dot(x_BxTxD, head_DxV, preferred_element_type=jnp.float32)


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        x0_BxTxD: jax.Array,
        positions_T: jax.Array,
        seed_2: jax.Array | None,
        cache: LayerCache | None = None,
        n_tokens: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The residual stream after this layer, [B, T, D], and this layer's cache.

        `x0_BxTxD` is the residual stream before the first layer; `seed_2`, uint32 [2], of the dropout masks.
        """
        config, execution = self.config, self.execution
        if config.x0_residual:
            x_BxTxD = options.add_x0(self, x_BxTxD, x0_BxTxD)
        attention = CausalSelfAttention(config, execution, name="attention")
        y_BxTxD = make_norm(config, execution, "attention_norm")(x_BxTxD)
        y_BxTxD, cache = attention(y_BxTxD, positions_T, seed_2, cache)
        x_BxTxD = split_batch(x_BxTxD + dropout(y_BxTxD, config.dropout, seed_2, 0), execution.mesh)
        y_BxTxD = make_norm(config, execution, "mlp_norm")(x_BxTxD)
        if config.conv_width:
            y_BxTxD, cache = options.CausalConvolution(config, name="convolution")(y_BxTxD, cache, n_tokens)
        y_BxTxD = MLP(config, execution, name="mlp")(y_BxTxD)
        return split_batch(x_BxTxD + dropout(y_BxTxD, config.dropout, seed_2, 1), execution.mesh), cache


class CausalSelfAttention(nn.Module):
    """Every token reads from itself and the tokens before it."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, positions_T: jax.Array, seed_2: jax.Array | None, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The attention output of each token, [B, T, D], and the cache with these tokens' keys and values."""
        config, execution = self.config, self.execution
        if config.n_groups > 1:
            q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = options.grouped_heads(config, execution, x_BxTxD)
        else:
            axes, shape = ("embed", None, "heads", None), (3, config.n_head, config.head_width)
            qkv_BxTx3xHxK = make_linear(config, execution, shape, axes, "qkv")(x_BxTxD)
            q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = jnp.einsum("btchk->cbhtk", qkv_BxTx3xHxK)
        positions_BxT = positions_T[None] if cache is None else cache.positions(positions_T)
        q_BxHxTxK, k_BxHxTxK = options.norm_and_rotate(config, execution, q_BxHxTxK, k_BxHxTxK, positions_BxT)
        rate = 0.0 if seed_2 is None else config.attention_dropout
        if cache is None:
            y_BxHxTxK = attend_within(execution, q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, positions_T, rate, seed_2)
        else:
            cache = cache.add_keys(k_BxHxTxK, v_BxHxTxK, positions_T[0], execution)
            y_BxHxTxK = attend_to_cache(execution, q_BxHxTxK, cache, positions_T)
        if cache is None and self.is_mutable_collection("intermediates"):  # somebody looks at the weights
            mask_TxT = causal_mask(positions_T, len(positions_T))
            self.sow("intermediates", "weights_BxHxTxS", attention_weights(q_BxHxTxK, k_BxHxTxK, mask_TxT))
        out_axes = ("heads", None, "embed")
        out = make_linear(config, execution, config.d_model, out_axes, "out", axis=(1, 3), residual=True)
        return out(y_BxHxTxK), cache


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them, applied to each token."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        config, execution = self.config, self.execution
        shape = (2 if config.activation == "swiglu" else 1, config.mlp_width)
        h_BxTxGxF = make_linear(config, execution, shape, ("embed", None, "mlp"), "up")(x_BxTxD)
        is_gelu = config.activation == "gelu"
        h_BxTxF = nn.gelu(h_BxTxGxF[:, :, 0]) if is_gelu else options.activate(config, h_BxTxGxF)
        axes = ("mlp", "embed")
        return make_linear(config, execution, config.d_model, axes, "down", residual=True)(h_BxTxF)
