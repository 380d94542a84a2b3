"""Building blocks of the transformer: linear layers, embeddings, norms, initialisers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpt_jax.config import ModelConfig
from gpt_jax.parallel.devices import resolve_dtype

Params = Any  # a nested dictionary of arrays


def compute_dtype(config: ModelConfig) -> Any:
    """The type that activations are computed in; "auto" becomes what suits the first device."""
    return jnp.dtype(resolve_dtype(config.dtype))


def make_linear(
    config: ModelConfig,
    features: int | Sequence[int],
    axes: tuple[str | None, ...],
    name: str,
    axis: int | Sequence[int] = -1,
    std: float | None = None,
) -> nn.DenseGeneral:
    """A linear layer, with a bias if `config.bias`.

    Args:
        config: of the model.
        features: the shape of the output.
        axes: logical names of the kernel's axes, inputs first, for `parallel/mesh.py`.
        name: of the parameters.
        axis: which axes of the input are summed over.
        std: of the initial kernel; None: `config.init_std`.
    """
    n_in = 1 if isinstance(axis, int) else len(axis)
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=config.bias,
        dtype=compute_dtype(config),
        kernel_init=normal(config.init_std if std is None else std, axes),
        bias_init=normal(0.0, axes[n_in:]),
        name=name,
    )


def make_embedding(
    config: ModelConfig, rows: int, axis: str, name: str, std: float | None = None
) -> nn.Embed:
    """A table of `rows` vectors of width D; `axis` is the logical name of its rows."""
    return nn.Embed(
        rows,
        config.d_model,
        dtype=compute_dtype(config),
        embedding_init=normal(config.init_std if std is None else std, (axis, "embed")),
        name=name,
    )


def make_norm(config: ModelConfig, name: str) -> nn.Module:
    """The norm that the config names; its statistics are float32."""
    dtype = compute_dtype(config)
    if config.norm == "rmsnorm":
        return rms_norm(dtype, name)
    return nn.LayerNorm(
        epsilon=1e-5,
        use_bias=config.bias,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)),
        bias_init=normal(0.0, (None,)),
        name=name,
    )


def rms_norm(dtype: Any, name: str) -> nn.Module:
    """RMSNorm (Zhang and Sennrich 2019)."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
    return nn.RMSNorm(epsilon=1e-6, dtype=dtype, scale_init=scale_init, name=name)


def normal(std: float, axes: tuple[str | None, ...]) -> Any:
    """An initialiser: normal with standard deviation `std`, its axes named for `parallel/mesh.py`."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def residual_std(config: ModelConfig) -> float:
    """Initial deviation of the 2L projections that add to the residual stream: GPT-2 divides by sqrt(2L)."""
    return 0.0 if config.zero_init else config.init_std / (2 * config.n_layer) ** 0.5


def cast_matrices(config: ModelConfig, params: Params) -> Params:
    """Kernels and embeddings in the type that they are multiplied in.

    The model casts them at each use. What a loop uses is better cast once, before the loop.
    """
    dtype = compute_dtype(config)
    return jax.tree.map(lambda leaf, cast: leaf.astype(dtype) if cast else leaf, params, is_matrix(params))


def is_matrix(params: Params) -> Params:
    """True for kernels and embeddings, in the structure of `params`.

    False for parameters of single channels: biases, norms, convolutions, x0 gates. The names decide, since
    stacking the layers gives every array one more axis.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
