"""Building blocks of the transformer: linear layers, embeddings, norms, the stack of layers, dropout."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpt_jax.config import ModelConfig
from gpt_jax.model import cpu
from gpt_jax.parallel.execution import Execution

Params = Any  # a nested dictionary of arrays
_ONES = nn.with_logical_partitioning(nn.initializers.ones, (None,))


def make_linear(
    config: ModelConfig,
    execution: Execution,
    features: int | Sequence[int],
    axes: tuple[str | None, ...],
    name: str,
    axis: int | Sequence[int] = -1,
    residual: bool = False,
) -> nn.DenseGeneral:
    """A linear layer from the input's axes `axis` to the shape `features`, with a bias if `config.bias`.

    `axes` are logical names of the kernel's axes, inputs first, for `parallel/mesh.py`. `residual`: the
    output is added to the residual stream. There are 2L such layers; GPT-2 divides the initial deviation of
    their kernels by sqrt(2L).
    """
    std = config.init_std / ((2 * config.n_layer) ** 0.5 if residual else 1)
    n_in = 1 if isinstance(axis, int) else len(axis)
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=config.bias,
        dtype=execution.dtype,
        # A remat policy keeps what plain products return; it cannot see inside a custom VJP.
        dot_general=cpu.linear_product if execution.remat == "nothing" else None,
        kernel_init=normal(0.0 if residual and config.zero_init else std, axes),
        bias_init=normal(0.0, axes[n_in:]),
        name=name,
    )


def make_embedding(
    config: ModelConfig, execution: Execution, rows: int, axis: str, name: str, std: float | None = None
) -> nn.Embed:
    """A table of `rows` vectors of width D; `axis` is the logical name of its rows."""
    return nn.Embed(
        rows,
        config.d_model,
        dtype=execution.dtype,
        embedding_init=normal(config.init_std if std is None else std, (axis, "embed")),
        name=name,
    )


def make_norm(config: ModelConfig, execution: Execution, name: str | None) -> nn.Module:
    """The norm that the config names; its statistics are float32."""
    if config.norm == "rmsnorm":
        return rms_norm(execution, name, config.epsilon)
    inits = {"scale_init": _ONES, "bias_init": normal(0.0, (None,))}
    return nn.LayerNorm(config.epsilon, use_bias=config.bias, dtype=execution.dtype, name=name, **inits)


def rms_norm(execution: Execution, name: str | None, epsilon: float) -> nn.Module:
    """RMSNorm (Zhang and Sennrich 2019)."""
    return nn.RMSNorm(epsilon, dtype=execution.dtype, scale_init=_ONES, name=name)


def make_stack(block: Any, config: ModelConfig, execution: Execution) -> nn.Module:
    """A module that runs `block`, a module class, L times, by a scan over parameters with a leading axis L.

    Its arguments are those of `block`; the last one, too, has a leading axis L.
    """
    if execution.remat != "nothing":
        products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = products if execution.remat == "elementwise" else None
        # Inside a loop the compiler cannot merge the two forward passes; unrolled, it could.
        block = nn.remat(block, prevent_cse=execution.unroll, policy=policy)
    return nn.scan(
        block,
        length=config.n_layer,
        unroll=config.n_layer if execution.unroll else 1,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, execution, name="blocks")


def normal(std: float, axes: tuple[str | None, ...]) -> Any:
    """An initialiser: normal with standard deviation `std`, its axes named for `parallel/mesh.py`."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def dropout_seeds(key: jax.Array | None, n_layer: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Seeds of the dropout masks, uint32: of the embedding [2], and of the layers [L, 2]; None without a key.

    One draw for all: on a TPU each would cost dozens of small kernels.
    """
    if key is None:
        return None, None
    seeds = jax.random.bits(key, (1 + n_layer, 2))
    return seeds[0], seeds[1:]


def dropout(x: jax.Array, rate: float, seed_2: jax.Array | None, mask_index: int = 0) -> jax.Array:
    """Set each element to zero with probability `rate` and scale the others by 1 / (1 - rate).

    Element i is kept or dropped by a hash of i and a seed, the same on every platform. That takes a dozen
    integer operations, which the compiler fuses into the operation that uses the mask, on any device and with
    any sharding. JAX's threefry takes about a hundred operations for each element, and TPU programs with it
    took minutes to compile. `mask_index` numbers the masks that share a seed; without a seed, nothing is
    dropped.
    """
    if rate == 0 or seed_2 is None:
        return x
    return jnp.where(keep_mask(seed_2, mask_index, rate, x.shape), x / (1 - rate), 0)


def keep_mask(seed_2: jax.Array, mask_index: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Bool of that shape, True with probability 1 - `rate`, independent over elements, seeds, mask indices.

    Element i gets `scramble(i a + b)`, where a and b are hashes of the seed and the mask index. That is
    random enough for dropout; initial parameters and batches use `jax.random`. Element numbers have 32 bits:
    an array of more than 2^32 elements repeats its mask.
    """
    a = scramble(seed_2[0] + jnp.uint32(2 * mask_index))
    b = scramble(seed_2[1] + jnp.uint32(2 * mask_index + 1))
    number = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return scramble(number * (a | 1) + b) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def scramble(x: jax.Array) -> jax.Array:
    """A permutation of uint32 that hashes: Wellons' "lowbias32" (nullprogram.com/blog/2018/07/31)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
