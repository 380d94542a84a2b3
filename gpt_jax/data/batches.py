"""Windows of tokens: shuffled ones for training, all of them in order for evaluation.

A training batch is a pure function of (seed, step): there is no iterator state to save. A source of batches
is a pytree with a method `batch(seed, step)`, which may be traced. `TokenWindows` holds all tokens on the
device. `ReadWindows` holds the windows of a few steps, which `WindowReader` reads from files. Both give the
same batches.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gpt_jax.data.tokens import FileTokens, Tokens
from gpt_jax.errors import UserError
from gpt_jax.jax_settings import default_jax_settings
from gpt_jax.rng import BATCH_STREAM, stream

ON_DEVICE = 2**26  # bytes; a larger training split stays in its files
MAX_ON_DEVICE = 2**31 - 2**20  # tokens: their positions have 32 bits on the device
READ_AT_ONCE = 2**24  # bytes of windows that are read ahead
MAX_WINDOWS = 2**32  # of an epoch: their permutation is computed with 32 bits


class TokenWindows(struct.PyTreeNode):
    """A source of training batches: windows of a text that lies on the device."""

    tokens_N: Any  # integer ids, or their shape where a program is only compiled
    batch_size: int = struct.field(pytree_node=False)  # B
    context: int = struct.field(pytree_node=False)  # T

    def batch(self, seed: int | jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The batch of a step: see `train_batch`."""
        return train_batch(stream(seed, BATCH_STREAM), step, self.tokens_N, self.batch_size, self.context)


def train_batch(
    key: jax.Array, step: jax.Array, tokens_N: jax.Array, batch_size: int, context: int
) -> tuple[jax.Array, jax.Array]:
    """The `batch_size` windows of a step, cut out of the tokens on the device.

    Each epoch cuts the tokens into adjacent windows from a random offset, and takes every window once, in
    random order. So each epoch leaves out T to 2T - 1 tokens at the two ends (fewer where there is only one
    window); tokens at the very ends are rarely seen.

    Returns inputs and targets, int32 [B, T] each; the target of a token is the token after it.
    """
    n_windows, n_offsets = _count_windows(tokens_N.shape[0], context)

    def start(number: jax.Array) -> jax.Array:
        """The first token of window `number`, counted over all epochs."""
        epoch, place = number // n_windows, number % n_windows
        offset, round_keys = _draw(key, epoch, n_offsets)
        return offset + context * shuffled(round_keys, place.astype(jnp.uint32), n_windows).astype(jnp.int32)

    starts_B = jax.vmap(start)(step * batch_size + jnp.arange(batch_size))
    windows_BxT1 = tokens_N[starts_B[:, None] + jnp.arange(context + 1)[None]].astype(jnp.int32)
    return windows_BxT1[:, :-1], windows_BxT1[:, 1:]


def _count_windows(n_tokens: int, context: int) -> tuple[int, int]:
    """The windows of an epoch, and how many offsets it can have."""
    n_windows = max(n_tokens // context - 1, 1)  # one less than fit leaves room for the offset
    return n_windows, n_tokens - n_windows * context


def _draw(key: jax.Array, epoch: int | jax.Array, n_offsets: int) -> tuple[jax.Array, jax.Array]:
    """The offset of an epoch, and what `shuffled` needs for its order."""
    offset_key, order_key = jax.random.split(jax.random.fold_in(key, epoch))
    return jax.random.randint(offset_key, (), 0, n_offsets), jax.random.bits(order_key, (4,), jnp.uint32)


def shuffled(round_keys: Any, place: Any, n: int) -> Any:
    """Elements `place` of a permutation of 0 .. n - 1 that four keys choose, without the other elements.

    Keys and places are uint32, all of them of JAX, with a scalar place, or all of NumPy. A Feistel network
    permutes the 4^h numbers of 2h bits. A result of n or above is permuted again until it is below n, which
    gives a permutation of the numbers below n ("cycle walking", Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains").
    """
    half_bits = max((n - 1).bit_length() + 1, 2) // 2
    low_bits = np.uint32((1 << half_bits) - 1)

    def permute(x: Any) -> Any:
        high, low = x >> np.uint32(half_bits), x & low_bits
        for round_key in round_keys:
            mixed = (low ^ round_key) * np.uint32(0x9E3779B1)
            mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
            high, low = low, high ^ ((mixed ^ (mixed >> np.uint32(13))) & low_bits)
        return (high << np.uint32(half_bits)) | low

    x = permute(place)
    if isinstance(x, jax.Array):
        return jax.lax.while_loop(lambda x: x >= n, permute, x)
    while (outside := x >= n).any():
        x[outside] = permute(x[outside])
    return x


class ReadWindows(struct.PyTreeNode):
    """A source of training batches: the windows of M steps, which were read before."""

    windows_MxBxW: Any  # integer ids, W = T + 1, or their shape where a program is only compiled
    first_step: Any  # int32 scalar, the step of the first of them

    def batch(self, _seed: int | jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets of a step, int32 [B, T] each: those of `train_batch`."""
        windows_BxW = self.windows_MxBxW[step - self.first_step].astype(jnp.int32)
        return windows_BxW[:, :-1], windows_BxW[:, 1:]


class WindowReader:
    """Reads the windows of training batches from token files, the next ones while the device computes.

    Attributes:
        shape: [M, B, T + 1], of the windows that are read at once.
    """

    def __init__(self, tokens: FileTokens, batch_size: int, context: int, seed: int, max_steps: int):
        self.tokens, self.seed = tokens, seed
        n_bytes = batch_size * (context + 1) * tokens.dtype.itemsize
        self.shape = (min(max(READ_AT_ONCE // n_bytes, 1), max_steps), batch_size, context + 1)
        self._read: dict[int, np.ndarray] = {}  # by step
        self._epoch = -1
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[np.ndarray]] | None = None
        if _count_windows(len(tokens), context)[0] > MAX_WINDOWS:
            raise UserError(f"{len(tokens):,} tokens need a longer context than model.context = {context}")

    def read(self, step: int, n_steps: int) -> np.ndarray:
        """The windows of M steps from `step` on, of which `n_steps` are used: ids [M, B, T + 1].

        Raises:
            TokenFileError: a file was changed or cut, or has an id that the tokenizer does not have.
        """
        ahead = self._ahead[1] if self._ahead and self._ahead[0] == step else self._submit(step)
        windows_MxBxW = ahead.result()
        self._ahead = (step + n_steps, self._submit(step + n_steps))
        return windows_MxBxW

    def _submit(self, step: int) -> Future[np.ndarray]:
        return self._thread.submit(self._read_from, step)

    @default_jax_settings()
    def _read_from(self, first: int) -> np.ndarray:
        steps = range(first, first + self.shape[0])
        self._read = {step: self._read[step] if step in self._read else self._batch(step) for step in steps}
        return np.stack(list(self._read.values()))

    def _batch(self, step: int) -> np.ndarray:
        """The windows of a step, [B, T + 1]: in 64 bits, what `train_batch` computes in 32."""
        _, batch_size, width = self.shape
        context = width - 1
        n_windows, n_offsets = _count_windows(len(self.tokens), context)
        numbers_B = step * batch_size + np.arange(batch_size)
        epochs_B, firsts_B = numbers_B // n_windows, np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs_B).tolist():
            if epoch != self._epoch:
                self.tokens.check()
                self._epoch = epoch
            offset, round_keys = _draw_on_host(self.seed, epoch, n_offsets)
            of_epoch = epochs_B == epoch
            places = shuffled(round_keys, (numbers_B[of_epoch] % n_windows).astype(np.uint32), n_windows)
            firsts_B[of_epoch] = offset + context * places.astype(np.int64)
        return np.stack([self.tokens[first : first + width] for first in firsts_B.tolist()])


@lru_cache(maxsize=4)
def _draw_on_host(seed: int, epoch: int, n_offsets: int) -> tuple[int, np.ndarray]:
    offset, round_keys = _draw(stream(seed, BATCH_STREAM), epoch, n_offsets)
    return int(offset), np.asarray(round_keys)


def lies_on_device(tokens: Tokens, setting: str) -> bool:
    """Whether the device holds all tokens of the training split; `setting` is `data.batches`."""
    if isinstance(tokens, np.ndarray):
        return True
    if setting == "device" and len(tokens) > MAX_ON_DEVICE:
        raise UserError(f"data.batches = 'device' holds at most {MAX_ON_DEVICE:,} tokens: leave it at 'auto'")
    return tokens.nbytes <= ON_DEVICE if setting == "auto" else setting == "device"


def eval_windows(
    tokens_N: np.ndarray, context: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut N tokens, 2 or more, into non-overlapping windows: each token but the first is a target once.

    Returns inputs int32 [n, B, T], targets int32 [n, B, T], and a mask bool [n, B, T], true for the N - 1
    targets. The rest is padding, to whole windows and to full batches.
    """
    n_targets = len(tokens_N) - 1
    n_batches = -(-n_targets // (context * batch_size))
    shape = (n_batches, batch_size, context)
    padded = np.zeros(n_batches * batch_size * context + 1, np.int32)
    padded[: len(tokens_N)] = tokens_N
    mask = np.arange(len(padded) - 1) < n_targets
    return padded[:-1].reshape(shape), padded[1:].reshape(shape), mask.reshape(shape)
