"""The KV cache: keys and values of the tokens that a model has read."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gpt_jax.config import ModelConfig
from gpt_jax.model import cpu
from gpt_jax.parallel.execution import Execution


class LayerCache(struct.PyTreeNode):
    """The cache of one layer, for up to S tokens."""

    # In these layouts the sums over channels and over tokens both add contiguous vectors.
    k_BxHxKxS: jax.Array
    v_BxHxSxK: jax.Array
    # The newest S = W - 1 inputs of the convolution, zeros before the first token; None without one.
    conv_BxSxD: jax.Array | None
    # int32, unused places before the first token of each row; None: all rows have their first token at 0.
    padding_B: jax.Array | None = None

    def positions(self, places_T: jax.Array) -> jax.Array:
        """The position in its row of each place of the cache: int32 [B, T], or [1, T] without padding."""
        if self.padding_B is None:
            return places_T[None]
        return jnp.maximum(places_T[None] - self.padding_B[:, None], 0)

    def mask(self, places_T: jax.Array) -> jax.Array:
        """Bool [B, T, S] (B is 1 without padding), true where the token at a place may read key s.

        It hides later keys, stale ones with them, and the padding.
        """
        keys_S = jnp.arange(self.v_BxHxSxK.shape[2])
        mask_1xTxS = (places_T[:, None] >= keys_S[None])[None]
        if self.padding_B is None:
            return mask_1xTxS
        return mask_1xTxS & (keys_S[None] >= self.padding_B[:, None])[:, None]

    def add_keys(
        self, k_BxHxTxK: jax.Array, v_BxHxTxK: jax.Array, position: jax.Array, execution: Execution
    ) -> "LayerCache":
        """The cache with the keys and values of T tokens from `position` on."""
        update = jax.lax.dynamic_update_slice
        k_BxHxKxS = update(self.k_BxHxKxS, k_BxHxTxK.swapaxes(2, 3), (0, 0, 0, position))
        v_BxHxSxK = update(self.v_BxHxSxK, v_BxHxTxK, (0, 0, position, 0))
        if execution.on_cpu:
            k_BxHxKxS, v_BxHxSxK = cpu.write_once((k_BxHxKxS, v_BxHxSxK))
        return self.replace(k_BxHxKxS=k_BxHxKxS, v_BxHxSxK=v_BxHxSxK)


class Cache(struct.PyTreeNode):
    """The cache of all layers."""

    layers: tuple[LayerCache, ...]
    length: jax.Array  # int32 scalar, how many tokens it holds, the padding of rows included
    last_B: jax.Array  # int32, the newest token; V where there is none
    seen_BxV: jax.Array | None = None  # bool, the tokens of each text for `repetition_penalty`; None without

    @property
    def room(self) -> int:
        """S, how many tokens it can hold."""
        return self.layers[0].v_BxHxSxK.shape[2]

    def positions(self, places_T: jax.Array) -> jax.Array:
        """See `LayerCache.positions`."""
        return self.layers[0].positions(places_T)

    def enlarge(self, room: int) -> "Cache":
        """The cache with room for more tokens."""
        none, more = (0, 0), (0, room - self.room)

        def enlarge(layer: LayerCache) -> LayerCache:
            k_BxHxKxS = jnp.pad(layer.k_BxHxKxS, (none, none, none, more))
            v_BxHxSxK = jnp.pad(layer.v_BxHxSxK, (none, none, more, none))
            return layer.replace(k_BxHxKxS=k_BxHxKxS, v_BxHxSxK=v_BxHxSxK)

        return self.replace(layers=tuple(map(enlarge, self.layers)))

    def add(self, tokens_BxT: jax.Array, layers: tuple[Any, ...], n_tokens: jax.Array | None) -> "Cache":
        """The cache after the first `n_tokens` of T tokens (None: all), with the layers' new caches."""
        n: Any = tokens_BxT.shape[1] if n_tokens is None else n_tokens
        if jnp.ndim(n) == 0:
            return self.replace(layers=layers, length=self.length + n, last_B=tokens_BxT[:, n - 1])
        last_B = jnp.take_along_axis(tokens_BxT, jnp.maximum(n[:, None] - 1, 0), axis=1)[:, 0]
        last_B = jnp.where(n > 0, last_B, self.last_B)
        return self.replace(layers=layers, length=self.length + jnp.max(n), last_B=last_B)

    def align(self, n_tokens_B: jax.Array) -> "Cache":
        """Move the `n_tokens_B` tokens of each row, so that the last ones are side by side.

        All rows then write their next token to the same place, and the longest has no padding.
        """
        length = jnp.max(n_tokens_B)

        def align(layer: LayerCache) -> LayerCache:
            padding_B = length - n_tokens_B
            shift_B = padding_B - (0 if layer.padding_B is None else layer.padding_B)
            k_BxHxKxS = jax.vmap(partial(jnp.roll, axis=2))(layer.k_BxHxKxS, shift_B)
            v_BxHxSxK = jax.vmap(partial(jnp.roll, axis=1))(layer.v_BxHxSxK, shift_B)
            return layer.replace(k_BxHxKxS=k_BxHxKxS, v_BxHxSxK=v_BxHxSxK, padding_B=padding_B)

        return self.replace(layers=tuple(map(align, self.layers)), length=length)

    def replace_row(self, row: jax.Array, other: "Cache", n_tokens_B: jax.Array) -> "Cache":
        """The cache with another cache's only row in a row of it, then aligned to `n_tokens_B` tokens.

        Both have the same room; the row comes without padding.
        """
        layers = [layer.replace(padding_B=jnp.zeros(1, jnp.int32)) for layer in other.layers]
        mine, others = (self.layers, self.last_B), (tuple(layers), other.last_B)
        layers_and_last = jax.tree.map(lambda x, y: x.at[row].set(y[0]), mine, others)
        return self.replace(layers=layers_and_last[0], last_B=layers_and_last[1]).align(n_tokens_B)


def empty_cache(
    config: ModelConfig, execution: Execution, vocab_size: int, batch_size: int, room: int | None = None
) -> Cache:
    """A cache with room for `room` tokens (None: `config.context`), which holds none."""
    B, S, W = batch_size, room or config.context, config.conv_width
    H = config.n_head // config.n_groups
    zeros = partial(jnp.zeros, dtype=execution.dtype)
    layers = tuple(
        LayerCache(
            k_BxHxKxS=zeros((B, H, config.head_width, S)),
            v_BxHxSxK=zeros((B, H, S, config.head_width)),
            conv_BxSxD=zeros((B, W - 1, config.d_model)) if W else None,
        )
        for _ in range(config.n_layer)
    )
    return Cache(layers, length=jnp.int32(0), last_B=jnp.full(batch_size, vocab_size, jnp.int32))
