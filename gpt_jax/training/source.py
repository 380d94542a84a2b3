"""Where the batches of a run come from: tokens on the device, or files that are read while it computes."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import numpy as np

from gpt_jax.data.batches import ReadWindows, TokenWindows, WindowReader, lies_on_device
from gpt_jax.data.tokens import Corpus, FileTokens
from gpt_jax.parallel.mesh import batch_axis_split, replicated
from gpt_jax.plan import Plan
from gpt_jax.training.loop import MAX_STEPS_PER_CALL
from gpt_jax.training.step import Source

SourceAt: TypeAlias = Callable[[int, int], Source]  # from a step and a number of steps


def open_source(plan: Plan, corpus: Corpus) -> tuple[SourceAt, int]:
    """A function that gives the source of the next steps, and how many steps one call may make.

    A small training split is copied to the device once. Of a larger one, the windows of the next steps are
    read from its files while the device computes.
    """
    train, context, everywhere = plan.config.train, plan.config.model.context, replicated(plan.mesh)
    if lies_on_device(corpus.train, plan.config.data.batches):
        source = TokenWindows(jax.device_put(corpus.train[:], everywhere), train.batch_size, context)
        return lambda _step, _n_steps: source, MAX_STEPS_PER_CALL
    reader = _reader(plan, corpus)
    by_window = batch_axis_split(plan.mesh, 1)

    def source_at(step: int, n_steps: int) -> Source:
        windows_MxBxW = jax.device_put(reader.read(step, n_steps), by_window)
        return ReadWindows(windows_MxBxW, jax.device_put(np.int32(step), everywhere))

    return source_at, reader.shape[0]


def abstract_source(plan: Plan, corpus: Corpus) -> tuple[Source, int]:
    """The same for devices that may be absent: shapes in place of arrays."""
    train, context, everywhere = plan.config.train, plan.config.model.context, replicated(plan.mesh)
    dtype = corpus.train.dtype
    if lies_on_device(corpus.train, plan.config.data.batches):
        tokens_N = jax.ShapeDtypeStruct(corpus.train.shape, dtype, sharding=everywhere)
        return TokenWindows(tokens_N, train.batch_size, context), MAX_STEPS_PER_CALL
    shape = _reader(plan, corpus).shape
    windows_MxBxW = jax.ShapeDtypeStruct(shape, dtype, sharding=batch_axis_split(plan.mesh, 1))
    return ReadWindows(windows_MxBxW, jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)), shape[0]


def _reader(plan: Plan, corpus: Corpus) -> WindowReader:
    assert isinstance(corpus.train, FileTokens)
    batch_size, context = plan.config.train.batch_size, plan.config.model.context
    return WindowReader(corpus.train, batch_size, context, plan.config.seed, MAX_STEPS_PER_CALL)
