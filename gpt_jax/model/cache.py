"""The KV cache: keys and values of the tokens that a model has read."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gpt_jax.config import ModelConfig
from gpt_jax.model.layers import compute_dtype


class LayerCache(struct.PyTreeNode):
    """The cache of one layer.

    Attributes:
        k_BxHxKxS, v_BxHxSxK: keys and values of up to S tokens. In these layouts the sums over channels and
            over tokens both add contiguous vectors.
        conv_BxSxD: the newest S = W - 1 inputs of the convolution, zeros before the first token; None without
            a convolution.
    """

    k_BxHxKxS: jax.Array
    v_BxHxSxK: jax.Array
    conv_BxSxD: jax.Array | None

    def add_keys(self, k_BxHxTxK: jax.Array, v_BxHxTxK: jax.Array, position: jax.Array) -> "LayerCache":
        """The cache with the keys and values of T tokens from `position` on."""
        k_BxHxKxT = k_BxHxTxK.swapaxes(2, 3)
        new = (
            jax.lax.dynamic_update_slice(self.k_BxHxKxS, k_BxHxKxT, (0, 0, 0, position)),
            jax.lax.dynamic_update_slice(self.v_BxHxSxK, v_BxHxTxK, (0, 0, position, 0)),
        )
        # For one sequence, XLA on a CPU would write them twice, here and fused into their use, each time into
        # a copy of the whole cache: a token of a model of 10.7M parameters took half as long again.
        k_BxHxKxS, v_BxHxSxK = jax.lax.optimization_barrier(new)
        return self.replace(k_BxHxKxS=k_BxHxKxS, v_BxHxSxK=v_BxHxSxK)


class Cache(struct.PyTreeNode):
    """The cache of all layers.

    Attributes:
        layers: one for each layer.
        length: int32 scalar, how many tokens it holds.
        last_B: int32 [B], the newest token; V where there is none.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array
    last_B: jax.Array

    @property
    def room(self) -> int:
        """S, how many tokens it can hold."""
        return self.layers[0].v_BxHxSxK.shape[2]

    def enlarge(self, room: int) -> "Cache":
        """The cache with room for more tokens."""
        more = room - self.room
        layers = tuple(
            layer.replace(
                k_BxHxKxS=jnp.pad(layer.k_BxHxKxS, ((0, 0), (0, 0), (0, 0), (0, more))),
                v_BxHxSxK=jnp.pad(layer.v_BxHxSxK, ((0, 0), (0, 0), (0, more), (0, 0))),
            )
            for layer in self.layers
        )
        return self.replace(layers=layers)

    def add(self, tokens_BxT: jax.Array, layers: tuple[Any, ...], n_tokens: jax.Array | None) -> "Cache":
        """The cache after the first `n_tokens` of T tokens (None: all), with the layers' new caches."""
        n = tokens_BxT.shape[1] if n_tokens is None else n_tokens
        return Cache(layers, self.length + n, tokens_BxT[:, n - 1])


def empty_cache(config: ModelConfig, vocab_size: int, batch_size: int, room: int | None = None) -> Cache:
    """A cache with room for `room` tokens (None: `config.context`), which holds none."""
    B, S, W = batch_size, room or config.context, config.conv_width
    zeros = partial(jnp.zeros, dtype=compute_dtype(config))
    layers = tuple(
        LayerCache(
            k_BxHxKxS=zeros((B, config.n_head, config.d_head, S)),
            v_BxHxSxK=zeros((B, config.n_head, S, config.d_head)),
            conv_BxSxD=zeros((B, W - 1, config.d_model)) if W else None,
        )
        for _ in range(config.n_layer)
    )
    return Cache(layers, length=jnp.int32(0), last_B=jnp.full(batch_size, vocab_size, jnp.int32))
