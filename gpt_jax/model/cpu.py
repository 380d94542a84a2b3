"""What only a CPU needs. Each function says why; without most of them the model is only slower.

XLA on a CPU is quick at large matrix products, but it spreads some operations over no more than one core,
and copies or transposes what other backends read in place.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.parallel.execution import Execution

FEW_ROWS = 6  # so many vectors are multiplied one by one
MIN_CACHE_FOR_SUMS = 2**19  # numbers; with fewer, waking the other cores takes longer than it saves


def linear_product(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """`jax.lax.dot_general` of inputs and a kernel, with another order in the product that is its gradient.

    The gradient of a kernel is the product of x and dy over all tokens. XLA on a CPU transposes the left
    factor first, together with the element-wise operations before it, which is slow. So the smaller factor is
    put on the left; JAX always puts dy there. A step of a model of 10.7M parameters takes 0.82 times as long.
    There is no forward-mode derivative (`jax.jvp`).
    """
    (x_axes, kernel_axes), _ = dimensions  # in ascending order, as linen has them
    precision = precision or jax.config.jax_default_matmul_precision  # the gradient is traced in no context
    x_kept = tuple(i for i in range(x.ndim) if i not in x_axes)  # batch and time
    kernel_kept = tuple(i for i in range(kernel.ndim) if i not in kernel_axes)  # features

    @jax.custom_vjp
    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = split_few_rows(x, x_axes)
        products = [jax.lax.dot_general(row, kernel, dimensions, precision) for row in rows]
        return products[0] if len(products) == 1 else jnp.concatenate(products)

    def product_and_factors(*factors: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return product(*factors), factors

    def gradients(factors: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = factors
        tokens, features = tuple(range(len(x_kept))), tuple(range(len(x_kept), dy.ndim))  # axes of dy
        dx = jax.lax.dot_general(dy, kernel, ((features, kernel_kept), ((), ())), precision)
        if x.size <= dy.size:
            d_kernel = jax.lax.dot_general(x, dy, ((x_kept, tokens), ((), ())), precision)
            order = (*kernel_axes, *kernel_kept)
        else:
            d_kernel = jax.lax.dot_general(dy, x, ((tokens, x_kept), ((), ())), precision)
            order = (*kernel_kept, *kernel_axes)
        return dx.transpose(np.argsort((*x_kept, *x_axes))), d_kernel.transpose(np.argsort(order))

    product.defvjp(product_and_factors, gradients)
    return product(x, kernel)


def split_few_rows(x: jax.Array, summed_axes: tuple[int, ...]) -> list[jax.Array]:
    """`x`, or its rows along axis 0 where they are a few vectors: a few texts that are decoded together.

    XLA copies a kernel into another order before it multiplies two rows or more by it, which takes longer
    than a few products of one row each. A token of four texts takes 0.80 of the time at 10.7M parameters, and
    0.51 at 1.9M; each row takes about a second longer to compile.
    """
    n_rows, n_vectors = x.shape[0], math.prod(n for i, n in enumerate(x.shape) if i not in summed_axes)
    is_few = 1 < n_vectors == n_rows <= FEW_ROWS and min_rows() == 1
    return [x[i : i + 1] for i in range(n_rows)] if is_few else [x]


def attend_in_blocks(
    attend: Callable[..., jax.Array],
    n_blocks: int,
    q_BxHxTxK: jax.Array,
    k_BxHxTxK: jax.Array,
    v_BxHxTxK: jax.Array,
    mask_TxT: jax.Array,
) -> jax.Array:
    """`attend`, one block of queries at a time, each without the keys after its last query.

    The causal mask hides nearly half of all keys. With more blocks, more of these are not computed at all,
    but each block takes a little time, and more to compile. With four blocks, a step of a model with 4 heads
    took 0.86 times as long (128 channels wide) or 0.93 times (256). `attend` is told the number of the block.
    """
    n_time = q_BxHxTxK.shape[2]
    bounds = sorted({n_time * i // n_blocks for i in range(n_blocks + 1)})
    blocks = [
        attend(
            q_BxHxTxK[:, :, start:end],
            k_BxHxTxK[:, :, :end],
            v_BxHxTxK[:, :, :end],
            mask_TxT[start:end, :end],
            block=block,
        )
        for block, (start, end) in enumerate(pairwise(bounds))
    ]
    return jnp.concatenate(blocks, axis=2)


def sums_are_faster(n_queries: int, cache_size: int) -> bool:
    """Whether `attend_by_sums` pays for a cache of so many numbers: for one query, since jax 0.11."""
    return n_queries == 1 and cache_size >= MIN_CACHE_FOR_SUMS and jax.__version_info__ >= (0, 11)


def attend_by_sums(
    q_BxHx1xK: jax.Array, k_BxHxKxS: jax.Array, v_BxHxSxK: jax.Array, mask: jax.Array
) -> jax.Array:
    """`attend` of one query, [B, H, 1, K], with sums in place of matrix products.

    The products of one query and the keys of many heads are as many products of a vector and a small matrix.
    XLA computes them on one core of a CPU, one after the other, but sums on all cores.
    """
    q_BxHxKx1 = (q_BxHx1xK * q_BxHx1xK.shape[-1] ** -0.5).swapaxes(2, 3).astype(jnp.float32)
    scores_BxHx1xS = jnp.sum(q_BxHxKx1 * k_BxHxKxS.astype(jnp.float32), axis=2, keepdims=True)
    mask_Bx1x1xS = mask.reshape(-1, 1, *mask.shape[-2:])
    scores_BxHx1xS = jnp.where(mask_Bx1x1xS, scores_BxHx1xS, jnp.finfo(jnp.float32).min)
    weights_BxHxSx1 = jax.nn.softmax(scores_BxHx1xS, axis=-1).swapaxes(2, 3)
    products_BxHxSxK = weights_BxHxSx1 * v_BxHxSxK.astype(jnp.float32)
    return jnp.sum(products_BxHxSxK, axis=2, keepdims=True).astype(v_BxHxSxK.dtype)


def min_rows() -> int:
    """Texts to decode at once: XLA of jax 0.9 multiplies one row four to eight times slower than two."""
    return 2 if jax.__version_info__ < (0, 10) else 1


def write_once(arrays: Any) -> Any:
    """The same arrays, of a cache, which XLA will not compute a second time where they are used.

    For one sequence, XLA on a CPU would write them twice, here and fused into their use, each time into a
    copy of the whole cache: a token of a model of 10.7M parameters took half as long again.
    """
    return jax.lax.optimization_barrier(arrays)


def largest(scores_BxV: jax.Array) -> jax.Array:
    """`argmax` along V, int32 [B], by `top_k`, which XLA calls from a library. (It orders -0 below 0.)

    Without a library call, XLA compiles the loop of a single text into one single-threaded function, which
    takes about three times as long to compile. A token of a small model takes 1.2 times as long with the
    call, of a model of 10.7M parameters 0.92 times.
    """
    return jax.lax.top_k(scores_BxV, 1)[1][:, 0]


def widen(execution: Execution, *factors: jax.Array) -> tuple[jax.Array, ...]:
    """On a CPU, cast the operands of a matmul with float32 output to float32: the result is the same.

    This works around an XLA bug: on CPUs with AVX512-BF16, JAX 0.7 cannot multiply bfloat16 to float32.
    """
    return tuple(x.astype(jnp.float32) for x in factors) if execution.on_cpu else factors
