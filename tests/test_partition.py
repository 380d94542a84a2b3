"""What devices exchange: read from the programs that the compiler made, since losses do not show it."""

import importlib.util
import re
from contextlib import contextmanager, nullcontext
from functools import cache

import jax
import numpy as np
import pytest
from conftest import some
from jax.experimental.compilation_cache import compilation_cache

from gpt_jax.config import Config
from gpt_jax.costs.counts import read_costs
from gpt_jax.costs.topologies import describe_topology
from gpt_jax.data.batches import TokenWindows
from gpt_jax.model.loss import next_token_loss, window_losses
from gpt_jax.model.params import name_leaves
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import replicated
from gpt_jax.plan import make_plan
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.state import abstract_state
from gpt_jax.training.step import make_train_steps

# Activations alone have an axis that is a multiple of the context, as a flat batch of tokens is, too:
# positions are rotated, not learned, and no width is a multiple of 7. The vocabulary is smaller than the
# context: where a device looks up fewer tokens than the table has rows, the compiler moves what was found
# instead of the table, which is less.
BATCH, CONTEXT, VOCAB = 16, 56, 40
MODEL = {
    "n_layer": 3, "n_head": 4, "d_model": 64, "d_mlp": 160, "context": CONTEXT, "position": "rope",
    "dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
MESHES = {
    "data": {"data": 8},
    "tensor": {"data": 4, "tensor": 2},
    "fsdp": {"fsdp": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
PLATFORMS = ["cpu", pytest.param("tpu", marks=TPU)]
VARIANTS = {
    "": {},
    "rolled": {"model": {"unroll": "no", "remat": "elementwise"}},
    "micro-batches": {"model": {"unroll": "no"}, "train": {"grad_accum_steps": 2}},
    "modern": {
        "model": {
            "unroll": "no",
            "norm": "rmsnorm",
            "activation": "relu2",
            "qk_norm": True,
            "conv_width": 3,
            "x0_residual": True,
            "tied_embedding": False,
            "attention_dropout": 0.0,
        },
        "optimizer": {"name": "muon"},
    },
}
# A TPU keeps the activations of so small a model on the chip and pads its narrow shards: memory is compared
# with this one.
WIDE = {
    "model": {"n_layer": 6, "n_head": 4, "d_model": 256, "d_mlp": 1024, "context": 256, "dtype": "bfloat16",
              "unroll": "no", "remat": "elementwise"},
    "train": {"batch_size": 256},
}  # fmt: skip


@contextmanager
def no_compilation_cache():
    """It cannot read programs that cannot be run here. JAX looks at the setting once, then after a reset."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def compiled(platform, mesh_name, variant="", evaluation=False):
    """The program for eight devices, and the abstract state."""
    with no_compilation_cache() if platform == "tpu" else nullcontext():
        return compile_for(platform, mesh_name, variant, evaluation)


@cache
def compile_for(platform, mesh_name, variant, evaluation):
    plan, model, state = make_parts(platform, mesh_name, variant)
    mesh = plan.mesh
    tokens = jax.ShapeDtypeStruct((10_000,), np.uint8, sharding=replicated(mesh))
    if evaluation:
        windows = jax.ShapeDtypeStruct((BATCH, CONTEXT), np.int32, sharding=replicated(mesh))
        return window_losses.lower(model, state.params, *[windows] * 3).compile(), state
    steps = make_train_steps(plan, model, next_token_loss, state, 10)
    config = plan.config
    source = TokenWindows(tokens, config.train.batch_size, config.model.context)
    return steps.lower(state, source, np.uint32(0), np.int32(1), np.int32(10)).compile(), state


def make_parts(platform, mesh_name, variant):
    """The plan, the model and the abstract state on eight devices."""
    devices = jax.devices() if platform == "cpu" else describe_topology("v5e:2x4")[1]
    more = WIDE if variant == "wide" else VARIANTS[variant]
    config = Config.from_dict({
        "model": MODEL | {"unroll": "yes", "dtype": "float32"} | more.get("model", {}),
        "train": {"batch_size": BATCH, "grad_accum_steps": 1} | more.get("train", {}),
        "optimizer": more.get("optimizer", {}),
        "mesh": MESHES[mesh_name],
    })  # fmt: skip
    plan = make_plan(config, devices=devices)
    model = GPT(plan.config.model, VOCAB, plan.execution)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return plan, model, abstract_state(model, optimizer, plan.mesh)


def exchanged(program):
    """(kind, dimensions) of each array of floating-point numbers that a program exchanges."""
    arrays = set()
    for kind, shapes in read_costs(program.as_text()).collectives:
        for shape in shapes.split():
            dtype, dims = shape.rstrip("]").split("[") if "[" in shape else ("", "")
            if dtype in ("f32", "bf16"):
                arrays.add((kind, tuple(int(n) for n in dims.split(","))))
    return arrays


def activations(program):
    """Of these, those with an axis of the tokens of one window or of several."""
    return {(kind, dims) for kind, dims in exchanged(program) if any(n % CONTEXT == 0 for n in dims)}


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("variant", some("modern", "", "rolled", "micro-batches"))
def test_data_copies_exchange_gradients_alone(platform, variant):
    program, _ = compiled(platform, "data", variant)
    assert not activations(program)
    kinds = {kind for kind, _ in exchanged(program)}
    assert kinds == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("variant", some("modern", "", "rolled", "micro-batches"))
def test_fsdp_gathers_parameters_and_moves_no_activation(platform, variant):
    program, _ = compiled(platform, "fsdp", variant)
    assert not activations(program)
    gathering = {"all-gather", "collective-permute"}  # a TPU gathers in a ring, while it multiplies
    assert gathering & {kind for kind, _ in exchanged(program)}
    assert not any(kind == "all-to-all" for kind, _ in exchanged(program))


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("mesh_name, share", [("all", 4), ("tensor", 4)])
@pytest.mark.parametrize("variant", some("modern", "", "rolled", "micro-batches"))
def test_split_layers_sum_activations_of_their_own_windows(platform, mesh_name, share, variant):
    program, _ = compiled(platform, mesh_name, variant)
    windows = BATCH // share // VARIANTS[variant].get("train", {}).get("grad_accum_steps", 1)
    moved = activations(program)
    assert moved and {kind for kind, _ in moved} <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert all(windows in dims and BATCH not in dims for _, dims in moved), moved


@pytest.mark.parametrize("platform", PLATFORMS)
def test_evaluation_moves_no_activation(platform):
    for mesh_name in ("data", "fsdp"):
        program, _ = compiled(platform, mesh_name, evaluation=True)
        assert not activations(program)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("variant", ["modern", ""])
def test_fsdp_splits_every_matrix_and_its_moments(platform, variant):
    _, _, state = make_parts(platform, "fsdp", variant)
    n_matrices = 0
    for name, leaf in name_leaves(state).items():
        if re.search("kernel|embedding$", name) and leaf.ndim > 1 and leaf.size > VOCAB:
            n_matrices += 1
            assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape, name
    assert n_matrices >= 2 * 5  # parameters and a moment


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["modern", ""])
def test_fsdp_gives_each_device_a_part_of_the_state(variant):
    program, state = compiled("cpu", "fsdp", variant)  # a TPU pads: see WIDE
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().argument_size_in_bytes < 0.16 * n_bytes + 20_000


@pytest.mark.slow
@pytest.mark.parametrize("platform, variant", [("cpu", ""), pytest.param("tpu", "wide", marks=TPU)])
def test_fsdp_takes_hardly_more_memory_than_data_copies(platform, variant):
    def temporaries(mesh_name):
        return compiled(platform, mesh_name, variant)[0].memory_analysis().temp_size_in_bytes

    assert temporaries("fsdp") <= 1.3 * temporaries("data")


@TPU
def test_fsdp_scatters_gradients():
    """Of narrow arrays a TPU sums all and keeps a part, as a CPU does of every array."""
    program, _ = compiled("tpu", "fsdp", "wide")
    summed = {dims for kind, dims in exchanged(program) if kind == "all-reduce"}
    assert not any(WIDE["model"]["d_mlp"] in dims for dims in summed), summed
