"""The transformer: a decoder-only stack of blocks, GPT-2's by default.

Shapes stand in names: `B` batch, `T` time, `S` time of the keys, `D` model width, `H` heads, `K` head width,
`F` MLP width, `G` projections into the MLP (two for a gated one), `V` vocabulary, `L` layers, `W` width of
the convolution. What GPT-2 does not have is in `options.py`.

Sources: "Attention Is All You Need" (Vaswani et al. 2017); GPT-2 (Radford et al. 2019) for the order of norms
and the scaled initialisation; SwiGLU (Shazeer 2020); squared ReLU (So et al. 2021, "Primer").
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from gpt_jax.config import ModelConfig
from gpt_jax.model.attention import CausalSelfAttention
from gpt_jax.model.cache import Cache, LayerCache
from gpt_jax.model.dropout import dropout
from gpt_jax.model.layers import (
    compute_dtype,
    make_embedding,
    make_linear,
    make_norm,
    normal,
    residual_std,
)
from gpt_jax.model.options import CausalConvolution, add_x0, bigram_ids, n_bigram_ids
from gpt_jax.model.stack import stack
from gpt_jax.parallel.devices import first_device, resolve_model
from gpt_jax.parallel.mesh import split_batch


class GPT(nn.Module):
    """Token ids to the logits of the token that follows each.

    The parameters of the layers are stacked along a leading axis L, and one compiled layer runs L times
    (`nn.scan`). The model also takes unstacked parameters (`params.unstack_layers`): the decoder uses these,
    since slicing a layer out of the stack for each token takes longer than the token's arithmetic.

    Attributes:
        config: the shape of the model.
        vocab_size: V.
        mesh: the devices that a batch is split over; None leaves it to the compiler.
    """

    config: ModelConfig
    vocab_size: int
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        cache: Cache | None = None,
        n_tokens: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the model.

        Args:
            tokens_BxT: integer ids; T is at most `config.context`.
            cache: KV cache of the earlier tokens; needs unstacked parameters. None: no earlier tokens.
            n_tokens: with a cache, how many of the T tokens count; the rest is padding. None: all of them.
            dropout_key: decides the dropout masks; None: no dropout.

        Returns:
            Logits, float32 [B, T, V], and the cache with these tokens added (None without one).
        """
        # By default a TPU or GPU would round float32 factors to bfloat16 or TensorFloat-32.
        exact = compute_dtype(self.config) == jnp.float32
        with jax.default_matmul_precision("float32") if exact else nullcontext():
            embed = make_embedding(self.config, self.vocab_size, "vocab", "token_embedding")
            x_BxTxD, cache = self._run_blocks(embed(tokens_BxT), tokens_BxT, cache, n_tokens, dropout_key)
            return self._logits(make_norm(self.config, "final_norm")(x_BxTxD), embed), cache

    def _run_blocks(
        self, x_BxTxD: jax.Array, tokens_BxT: jax.Array, cache: Cache | None, n_tokens: Any, dropout_key: Any
    ) -> tuple[jax.Array, Cache | None]:
        """From the embedded tokens to the residual stream after the last block, and the cache."""
        config = resolve_model(self.config, *first_device(self.mesh))
        positions_T = jnp.arange(tokens_BxT.shape[1]) + (0 if cache is None else cache.length)
        if config.position == "learned":
            positions = make_embedding(config, config.context, "time", "position_embedding")
            x_BxTxD += positions(positions_T)[None]
        if config.bigram:
            last_B = None if cache is None else cache.last_B
            bigrams = make_embedding(
                config, n_bigram_ids(self.vocab_size), "vocab", "bigram_embedding", std=0
            )
            x_BxTxD += bigrams(bigram_ids(tokens_BxT, last_B, self.vocab_size))
        seed_2 = seeds_Lx2 = None
        if dropout_key is not None:
            # One draw for all layers: on a TPU each would cost dozens of small kernels.
            seeds = jax.random.bits(dropout_key, (1 + config.n_layer, 2))
            seed_2, seeds_Lx2 = seeds[0], seeds[1:]
        x_BxTxD = split_batch(dropout(x_BxTxD, config.dropout, seed_2), self.mesh)

        if not self.has_variable("params", "block_0"):
            if cache is not None:
                raise ValueError("a cache needs unstacked parameters: unstack_layers(params)")
            return stack(Block, config, self.mesh)(x_BxTxD, x_BxTxD, positions_T, seeds_Lx2)[0], None
        x0_BxTxD, layers = x_BxTxD, []
        for i in range(config.n_layer):
            seed_2 = None if seeds_Lx2 is None else seeds_Lx2[i]
            layer = None if cache is None else cache.layers[i]
            block = Block(config, self.mesh, name=f"block_{i}")
            x_BxTxD, layer = block(x_BxTxD, x0_BxTxD, positions_T, seed_2, layer, n_tokens)
            layers.append(layer)
        return x_BxTxD, None if cache is None else cache.add(tokens_BxT, tuple(layers), n_tokens)

    def _logits(self, x_BxTxD: jax.Array, embed: nn.Embed) -> jax.Array:
        """The output head, float32 [B, T, V]: its sums are in float32 and stay unrounded."""
        config, dtype = self.config, compute_dtype(self.config)
        if config.tied_embedding:
            embedding_VxD = embed.embedding.astype(dtype)
            return jnp.dot(x_BxTxD, embedding_VxD.T, preferred_element_type=jnp.float32)
        return nn.Dense(
            self.vocab_size,
            use_bias=False,
            dtype=dtype,
            dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            kernel_init=normal(0.0 if config.zero_init else config.init_std, ("embed", "vocab")),
            name="head",
        )(x_BxTxD)


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream."""

    config: ModelConfig
    mesh: Mesh | None = None

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

        Args:
            x_BxTxD: the residual stream.
            x0_BxTxD: the residual stream before the first layer.
            positions_T: the positions of the tokens in the window.
            seed_2: of the dropout masks, uint32 [2]; None: no dropout.
            cache: of this layer; None: no earlier tokens.
            n_tokens: as in `GPT`.
        """
        config = self.config
        if config.x0_residual:
            gate_D = self.param("x0_residual", normal(0.0, ("embed",)), (config.d_model,))
            x_BxTxD = add_x0(x_BxTxD, x0_BxTxD, gate_D)
        attention = CausalSelfAttention(config, self.mesh, name="attention")
        y_BxTxD, cache = attention(make_norm(config, "attention_norm")(x_BxTxD), positions_T, seed_2, cache)
        x_BxTxD = split_batch(x_BxTxD + dropout(y_BxTxD, config.dropout, seed_2, 0), self.mesh)
        y_BxTxD = make_norm(config, "mlp_norm")(x_BxTxD)
        if config.conv_width:
            y_BxTxD, cache = CausalConvolution(config, name="convolution")(y_BxTxD, cache, n_tokens)
        y_BxTxD = MLP(config, name="mlp")(y_BxTxD)
        return split_batch(x_BxTxD + dropout(y_BxTxD, config.dropout, seed_2, 1), self.mesh), cache


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them, applied to each token."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        config = self.config
        shape = (2 if config.activation == "swiglu" else 1, config.mlp_width)
        h_BxTxGxF = make_linear(config, shape, ("embed", None, "mlp"), "up")(x_BxTxD)
        match config.activation:
            case "gelu":
                h_BxTxF = nn.gelu(h_BxTxGxF[:, :, 0])
            case "relu2":
                h_BxTxF = jnp.square(nn.relu(h_BxTxGxF[:, :, 0]))
            case "swiglu":
                h_BxTxF = nn.silu(h_BxTxGxF[:, :, 0]) * h_BxTxGxF[:, :, 1]
        down = make_linear(config, config.d_model, ("mlp", "embed"), "down", std=residual_std(config))
        return down(h_BxTxF)
