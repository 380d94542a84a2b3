"""The transformer: a decoder-only stack of blocks, GPT-2's by default, a modern one by config.

Shapes stand in names: `B` batch, `T` time, `S` time of the keys, `D` model width, `H` heads,
`K` head width, `F` MLP width, `V` vocabulary, `L` layers, `W` width of the convolution, `P` = W - 1 + S and
`R` = W - 1 + T the rows that it reads.

Sources: "Attention Is All You Need" (Vaswani et al. 2017); GPT-2 (Radford et al. 2019) for the order of
norms and the scaled initialisation; RoPE (Su et al. 2021); RMSNorm (Zhang and Sennrich 2019); SwiGLU
(Shazeer 2020); squared ReLU (So et al. 2021, "Primer"); QK-norm (Henry et al. 2020); a short convolution,
which Primer has after q, k and v, before the MLP as in "Canon layers" (Allen-Zhu 2025).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from gpt_jax import backend
from gpt_jax.config import ModelConfig
from gpt_jax.dropout import dropout
from gpt_jax.sharding import split_batch

Params = Any  # a nested dictionary of arrays
MOST_BIGRAMS = 2**14  # rows of a table of pairs of tokens; enough for each pair of 127 characters


class LayerCache(struct.PyTreeNode):
    """What one layer remembers of the tokens that it has read, S at most.

    Attributes:
        k_BxHxSxK, v_BxHxSxK: their keys and values.
        conv_in_BxPxD: what its convolution has read, after the W - 1 zeros that stand before a text. All of
            it: where a padded text ends is known only after it was read. None without a convolution.
    """

    k_BxHxSxK: jax.Array
    v_BxHxSxK: jax.Array
    conv_in_BxPxD: jax.Array | None


class Cache(struct.PyTreeNode):
    """What a model remembers of the tokens that it has read.

    Attributes:
        layers: one for each layer.
        length: int32 scalar, the tokens it holds.
        last_B: int32 [B], the last of them; V where there is none.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array
    last_B: jax.Array


def compute_dtype(config: ModelConfig) -> Any:
    """The type that activations are computed in; "auto" becomes what suits the first device."""
    return jnp.dtype(backend.resolve_dtype(config.dtype))


def empty_cache(config: ModelConfig, vocab_size: int, batch_size: int) -> Cache:
    """A cache with room for `config.context` tokens that holds none."""
    B, S, W = batch_size, config.context, config.conv_width
    zeros = partial(jnp.zeros, dtype=compute_dtype(config))
    layers = tuple(
        LayerCache(
            k_BxHxSxK=zeros((B, config.n_head, S, config.d_head)),
            v_BxHxSxK=zeros((B, config.n_head, S, config.d_head)),
            conv_in_BxPxD=zeros((B, W - 1 + S, config.d_model)) if W else None,
        )
        for _ in range(config.n_layer)
    )
    return Cache(layers, length=jnp.int32(0), last_B=jnp.full(batch_size, vocab_size, jnp.int32))


def in_compute_dtype(config: ModelConfig, params: Params) -> Params:
    """Kernels and embeddings in the type that they are multiplied in.

    A model casts them at each use; what is used in a loop is better cast once, before it.
    """
    dtype = compute_dtype(config)
    return jax.tree.map(lambda leaf, cast: leaf.astype(dtype) if cast else leaf, params, is_matrix(params))


def is_matrix(params: Params) -> Params:
    """True for kernels and embeddings, in the structure of `params`.

    False for what weighs each channel by itself: biases, norms, convolutions, parts of the embedding. By
    name, since stacking the layers gives every array an axis more.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


class GPT(nn.Module):
    """Token ids to the logits of the token that follows each.

    Attributes:
        config: the shape of the model.
        vocab_size: V.
        stacked: whether the layers' parameters lie in one tree with a leading axis L, run by a scan
            (training), or in one tree a layer (decoding, where cutting a layer out of a stack at
            every token would cost more than the arithmetic).
        mesh: the devices that share a batch; None leaves it to the compiler where activations lie.
    """

    config: ModelConfig
    vocab_size: int
    stacked: bool = True
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, cache: Cache | None = None, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Run the model.

        Args:
            tokens_BxT: integer ids; T is at most `config.context`.
            cache: what came before these tokens (only with `stacked=False`); None: nothing did.
            dropout_key: what the dropout masks follow; None: no dropout.

        Returns:
            Logits, float32 [B, T, V], and the cache with these tokens added (None without one).
        """
        if compute_dtype(self.config) != jnp.float32:
            return self._logits(tokens_BxT, cache, dropout_key)
        # By default a TPU or GPU would round float32 factors to bfloat16 or TensorFloat-32.
        with jax.default_matmul_precision("float32"):
            return self._logits(tokens_BxT, cache, dropout_key)

    def _logits(
        self, tokens_BxT: jax.Array, cache: Cache | None, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        dtype = compute_dtype(config)
        embed = nn.Embed(
            self.vocab_size,
            config.d_model,
            dtype=dtype,
            embedding_init=_init(config.init_std, ("vocab", "embed")),
            name="token_embedding",
        )
        positions_T = jnp.arange(tokens_BxT.shape[1]) + (0 if cache is None else cache.length)
        x_BxTxD = embed(tokens_BxT)
        if config.position == "learned":
            x_BxTxD += nn.Embed(
                config.context,
                config.d_model,
                dtype=dtype,
                embedding_init=_init(config.init_std, ("time", "embed")),
                name="position_embedding",
            )(positions_T)[None]
        if config.bigram:
            n_pairs = (self.vocab_size + 1) * self.vocab_size
            x_BxTxD += nn.Embed(
                min(n_pairs, MOST_BIGRAMS),
                config.d_model,
                dtype=dtype,
                embedding_init=_init(0.0, ("vocab", "embed")),
                name="bigram_embedding",
            )(self._pairs(tokens_BxT, cache))
        seeds_Lx2 = first_seed_2 = None
        if dropout_key is not None:
            # One draw for all layers: on a TPU each would cost dozens of small kernels.
            seeds = jax.random.bits(dropout_key, (1 + config.n_layer, 2))
            first_seed_2, seeds_Lx2 = seeds[0], seeds[1:]
        x_BxTxD = split_batch(dropout(x_BxTxD, config.dropout, first_seed_2), self.mesh)

        if self.stacked:
            if cache is not None:
                raise ValueError("a cache needs GPT(stacked=False)")
            x_BxTxD, _ = self._stacked_blocks()(x_BxTxD, x_BxTxD, positions_T, None, seeds_Lx2)
        else:
            embedding_BxTxD = x_BxTxD
            layers: list[Any] = []
            for i in range(config.n_layer):
                layer = None if cache is None else cache.layers[i]
                seed_2 = None if seeds_Lx2 is None else seeds_Lx2[i]
                block = Block(config, self.mesh, name=f"block_{i}")
                x_BxTxD, layer = block(x_BxTxD, embedding_BxTxD, positions_T, layer, seed_2)
                layers.append(layer)
            if cache is not None:
                cache = Cache(tuple(layers), cache.length + tokens_BxT.shape[1], tokens_BxT[:, -1])

        x_BxTxD = make_norm(config, "final_norm")(x_BxTxD)
        # The products are added up in float32 either way; here the sums also stay in it, unrounded.
        if config.tied_embedding:
            embedding_VxD = embed.embedding.astype(dtype)
            logits_BxTxV = jnp.dot(x_BxTxD, embedding_VxD.T, preferred_element_type=jnp.float32)
        else:
            logits_BxTxV = nn.Dense(
                self.vocab_size,
                use_bias=False,
                dtype=dtype,
                dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
                kernel_init=_init(0.0 if config.zero_init else config.init_std, ("embed", "vocab")),
                name="head",
            )(x_BxTxD)
        return logits_BxTxV, cache

    def _pairs(self, tokens_BxT: jax.Array, cache: Cache | None) -> jax.Array:
        """A number for each token and the one before it; pairs of a large vocabulary share numbers."""
        last_B = jnp.full_like(tokens_BxT[:, 0], self.vocab_size) if cache is None else cache.last_B
        before_BxT = jnp.concatenate([last_B[:, None], tokens_BxT[:, :-1]], axis=1)
        return (before_BxT * self.vocab_size + tokens_BxT) % MOST_BIGRAMS

    def _stacked_blocks(self) -> nn.Module:
        config = self.config
        how = backend.resolve_model(config, *backend.first_device(self.mesh))
        block: Any = Block
        if how.remat != "nothing":
            products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = products if how.remat == "elementwise" else None
            # Inside a loop the compiler cannot merge the two forward passes; unrolled, it could.
            block = nn.remat(block, prevent_cse=how.unroll == "yes", policy=policy)
        return nn.scan(
            block,
            length=config.n_layer,
            unroll=config.n_layer if how.unroll == "yes" else 1,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.mesh, name="blocks")


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream; a convolution before the MLP."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        embedding_BxTxD: jax.Array,
        positions_T: jax.Array,
        cache: LayerCache | None,
        seed_2: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The residual stream after this layer, [B, T, D], and this layer's cache."""
        config = self.config
        if config.embedding_skip:
            part_D = self.param("embedding_skip", _init(0.0, ("embed",)), (config.d_model,))
            x_BxTxD += part_D.astype(x_BxTxD.dtype)[None, None] * embedding_BxTxD
        attention = CausalSelfAttention(config, self.mesh, name="attention")
        y_BxTxD, cache = attention(make_norm(config, "attention_norm")(x_BxTxD), positions_T, cache, seed_2)
        x_BxTxD = split_batch(x_BxTxD + dropout(y_BxTxD, config.dropout, seed_2, 0), self.mesh)
        y_BxTxD = make_norm(config, "mlp_norm")(x_BxTxD)
        if config.conv_width:
            y_BxTxD, cache = CausalConvolution(config, name="convolution")(y_BxTxD, positions_T, cache)
        y_BxTxD = MLP(config, name="mlp")(y_BxTxD)
        return split_batch(x_BxTxD + dropout(y_BxTxD, config.dropout, seed_2, 1), self.mesh), cache


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        positions_T: jax.Array,
        cache: LayerCache | None,
        seed_2: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """What each token gathers, [B, T, D], and the cache with these tokens' keys and values."""
        config, dtype = self.config, compute_dtype(self.config)
        qkv_BxTx3xHxK = nn.DenseGeneral(
            (3, config.n_head, config.d_head),
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=_init(config.init_std, ("embed", None, "heads", None)),
            bias_init=_init(0.0, (None, "heads", None)),
            name="qkv",
        )(x_BxTxD)
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = jnp.einsum("btchk->cbhtk", qkv_BxTx3xHxK)
        if config.qk_norm:
            q_BxHxTxK = _rms_norm(dtype, "q_norm")(q_BxHxTxK)
            k_BxHxTxK = _rms_norm(dtype, "k_norm")(k_BxHxTxK)
        if config.position == "rope":
            q_BxHxTxK = rotate(q_BxHxTxK, positions_T, config.rope_base)
            k_BxHxTxK = rotate(k_BxHxTxK, positions_T, config.rope_base)

        if cache is None:
            k_BxHxSxK, v_BxHxSxK = k_BxHxTxK, v_BxHxTxK
        else:
            start = (0, 0, positions_T[0], 0)
            k_BxHxSxK = jax.lax.dynamic_update_slice(cache.k_BxHxSxK, k_BxHxTxK, start)
            v_BxHxSxK = jax.lax.dynamic_update_slice(cache.v_BxHxSxK, v_BxHxTxK, start)
            cache = cache.replace(k_BxHxSxK=k_BxHxSxK, v_BxHxSxK=v_BxHxSxK)
        # In a cache, places after the last token hold leftovers; the mask hides them too.
        mask_TxS = positions_T[:, None] >= jnp.arange(k_BxHxSxK.shape[2])[None, :]

        def drop(weights_BxHxTxS: jax.Array, block: int) -> jax.Array:
            return dropout(weights_BxHxTxS, config.attention_dropout, seed_2, 2 + block)

        drops_weights = config.attention_dropout > 0 and seed_2 is not None
        if cache is not None:
            y_BxHxTxK = attend(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, mask_TxS)
        elif not drops_weights and backend.has_cudnn_attention(config, *backend.first_device(self.mesh)):
            y_BxHxTxK = attend_fused(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK)
        else:
            blocks = config.query_blocks
            y_BxHxTxK = attend_in_blocks(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, mask_TxS, blocks, drop)
        y_BxTxD = nn.DenseGeneral(
            config.d_model,
            axis=(1, 3),
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=_residual_init(config, ("heads", None, "embed")),
            bias_init=_init(0.0, ("embed",)),
            name="out",
        )(y_BxHxTxK)
        return y_BxTxD, cache


class CausalConvolution(nn.Module):
    """Adds to each channel of a token a learned mix of that channel in the W newest tokens, at first 0."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, positions_T: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] to [B, T, D], and the cache with these tokens."""
        width, n_time = self.config.conv_width, x_BxTxD.shape[1]
        weights_WxD = self.param("weights", _init(0.0, (None, "embed")), (width, x_BxTxD.shape[2]))
        weights_WxD = weights_WxD.astype(x_BxTxD.dtype)
        if cache is None:
            read_BxRxD = jnp.pad(x_BxTxD, ((0, 0), (width - 1, 0), (0, 0)))
        else:
            assert cache.conv_in_BxPxD is not None  # `empty_cache` sees to it
            # Row p + W - 1 holds token p, so the W - 1 tokens before token p begin at row p.
            start = positions_T[0]
            conv_in_BxPxD = jax.lax.dynamic_update_slice(
                cache.conv_in_BxPxD, x_BxTxD, (0, start + width - 1, 0)
            )
            read_BxRxD = jax.lax.dynamic_slice_in_dim(conv_in_BxPxD, start, width - 1 + n_time, axis=1)
            cache = cache.replace(conv_in_BxPxD=conv_in_BxPxD)
        # The last row of weights is the token's own.
        terms = [weights_WxD[None, i : i + 1] * read_BxRxD[:, i : i + n_time] for i in range(width)]
        return x_BxTxD + sum(terms), cache


class MLP(nn.Module):
    """Each token by itself: up to width F, a non-linearity, down again."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        config, dtype = self.config, compute_dtype(self.config)
        gates = 2 if config.activation == "swiglu" else 1
        h_BxTxGxF = nn.DenseGeneral(
            (gates, config.mlp_width),
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=_init(config.init_std, ("embed", None, "mlp")),
            bias_init=_init(0.0, (None, "mlp")),
            name="up",
        )(x_BxTxD)
        match config.activation:
            case "gelu":
                h_BxTxF = nn.gelu(h_BxTxGxF[:, :, 0])
            case "relu2":
                h_BxTxF = jnp.square(nn.relu(h_BxTxGxF[:, :, 0]))
            case "swiglu":
                h_BxTxF = nn.silu(h_BxTxGxF[:, :, 0]) * h_BxTxGxF[:, :, 1]
        return nn.Dense(
            config.d_model,
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=_residual_init(config, ("mlp", "embed")),
            bias_init=_init(0.0, ("embed",)),
            name="down",
        )(h_BxTxF)


def attend_in_blocks(
    q_BxHxTxK: jax.Array,
    k_BxHxTxK: jax.Array,
    v_BxHxTxK: jax.Array,
    mask_TxT: jax.Array,
    n_blocks: int,
    drop: Callable[..., jax.Array],
) -> jax.Array:
    """`attend`, a block of queries at a time, each without the keys after its last query.

    The mask hides nearly half of all keys. The more blocks, the more of these are not computed at all; but
    each block costs a little, and more to compile. `drop` is applied to the attention weights of each block,
    with the block's number.
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
    """`attend` with the causal mask, by a kernel that keeps the weights [T, T] out of memory."""
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (x.swapaxes(1, 2) for x in (q_BxHxTxK, k_BxHxTxK, v_BxHxTxK))
    return backend.causal_cudnn(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK).swapaxes(1, 2)


def attend(
    q_BxHxTxK: jax.Array,
    k_BxHxSxK: jax.Array,
    v_BxHxSxK: jax.Array,
    mask_TxS: jax.Array,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """Scaled dot-product attention: softmax(q k^T / sqrt(K)) v, the softmax in float32.

    Written out, since `jax.nn.dot_product_attention` knows no dropout of the weights, and made the step
    of a small model 8 to 10% slower on a CPU.

    Args:
        q_BxHxTxK, k_BxHxSxK, v_BxHxSxK: queries, keys and values.
        mask_TxS: true where a query may look at a key.
        drop: applied to the attention weights [B, H, T, S].

    Returns:
        [B, H, T, K] in the type of the queries.
    """
    scale = q_BxHxTxK.shape[-1] ** -0.5
    scores_BxHxTxS = jnp.einsum(
        "bhtk,bhsk->bhts", q_BxHxTxK * scale, k_BxHxSxK, preferred_element_type=jnp.float32
    )
    scores_BxHxTxS = jnp.where(mask_TxS[None, None], scores_BxHxTxS, jnp.finfo(jnp.float32).min)
    weights_BxHxTxS = drop(jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(q_BxHxTxK.dtype))
    return jnp.einsum("bhts,bhsk->bhtk", weights_BxHxTxS, v_BxHxSxK)


def rotate(x_BxHxTxK: jax.Array, positions_T: jax.Array, base: float) -> jax.Array:
    """RoPE: turn channel pair (i, i + K/2) of a token at position p by the angle p base^(-2i/K)."""
    half = x_BxHxTxK.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_T[:, None].astype(jnp.float32) * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, None], jnp.sin(angles)[None, None]
    a, b = jnp.split(x_BxHxTxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxHxTxK.dtype)


def make_norm(config: ModelConfig, name: str) -> nn.Module:
    """The norm that the config names; its statistics are float32."""
    dtype = compute_dtype(config)
    if config.norm == "rmsnorm":
        return _rms_norm(dtype, name)
    return nn.LayerNorm(
        epsilon=1e-5,
        use_bias=config.bias,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)),
        bias_init=_init(0.0, (None,)),
        name=name,
    )


def _rms_norm(dtype: Any, name: str) -> nn.Module:
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
    return nn.RMSNorm(epsilon=1e-6, dtype=dtype, scale_init=scale_init, name=name)


def _init(std: float, logical_axes: tuple[str | None, ...]) -> Any:
    """Normal with deviation `std`, its axes named for `sharding.py`."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), logical_axes)


def _residual_init(config: ModelConfig, logical_axes: tuple[str | None, ...]) -> Any:
    """GPT-2's: each of 2L projections adds to the residual stream, so each starts 1/sqrt(2L) as large."""
    std = 0.0 if config.zero_init else config.init_std / (2 * config.n_layer) ** 0.5
    return _init(std, logical_axes)
