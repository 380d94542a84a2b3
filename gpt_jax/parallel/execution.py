"""How a model is computed on given devices: every "auto" of its settings decided, in one place."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax.config import Dtype, ModelConfig
from gpt_jax.parallel.devices import auto_dtype, first_device, has_bfloat16


@dataclass(frozen=True)
class Execution:
    """What the model's code needs to know of devices. It changes rounding and costs, not what is computed."""

    mesh: Mesh | None  # the devices that a batch is split over; None leaves it to the compiler
    on_cpu: bool  # do what only a CPU needs, see `model/cpu.py`
    dtype: Dtype  # of the activations
    remat: Literal["nothing", "elementwise", "block"]  # see `ModelConfig.remat`
    unroll: bool  # the loop over layers
    query_blocks: int  # attention is computed in so many blocks of queries
    attention: Literal["plain", "cudnn"]  # "cudnn": its fused kernel, where attention weights are not dropped


def resolve_execution(config: ModelConfig, mesh: Mesh | None = None, dtype: Dtype | None = None) -> Execution:
    """Decide every "auto" for the first device of `mesh`, which may be absent (None: of this machine).

    `dtype` is that of the activations, whatever the settings say; None: as they say.
    """
    platform, compute_capability = first_device(mesh)
    on_cpu = platform == "cpu"
    if dtype is None:
        dtype = auto_dtype(platform, compute_capability) if config.dtype == "auto" else config.dtype
    remat = ("nothing" if on_cpu else "elementwise") if config.remat == "auto" else config.remat
    unroll = on_cpu if config.unroll == "auto" else config.unroll == "yes"
    on_cudnn = platform == "gpu" and has_bfloat16(compute_capability) and _cudnn_attends(config, dtype)
    attention: Literal["plain", "cudnn"] = "cudnn" if on_cudnn else "plain"
    return Execution(mesh, on_cpu, dtype, remat, unroll, config.query_blocks, attention)


def attend_by_cudnn(q_BxHxTxK: jax.Array, k_BxHxTxK: jax.Array, v_BxHxTxK: jax.Array) -> jax.Array:
    """Causal attention [B, H, T, K] by a kernel of NVIDIA's that does not store the weights [T, T].

    It knows grouped queries: keys and values may have fewer heads.
    """
    qkv = (x_BxHxTxK.swapaxes(1, 2) for x_BxHxTxK in (q_BxHxTxK, k_BxHxTxK, v_BxHxTxK))
    y_BxTxHxK = jax.nn.dot_product_attention(*qkv, is_causal=True, implementation="cudnn")
    return y_BxTxHxK.swapaxes(1, 2)


def _cudnn_attends(config: ModelConfig, dtype: Dtype) -> bool:
    """Whether cuDNN can attend on a GPU for this model: in bfloat16, with heads of up to 128 channels.

    On TPUs no fused kernel is used: Pallas' splash attention moved more bytes (docs/accelerators.md).
    """
    if config.query_blocks > 1 or config.head_width > 128:
        return False
    n_heads = (config.n_head, *[config.n_head // config.n_groups] * 2)
    shapes = [(1, n, config.context, config.head_width) for n in n_heads]
    try:
        jax.eval_shape(attend_by_cudnn, *(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes))
    except (RuntimeError, NotImplementedError, ValueError):  # what JAX raises for what cuDNN cannot do
        return False
    return True
