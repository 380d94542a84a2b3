"""Compile a run's programs ahead of time, for absent accelerators, and print what they cost there.

    python -m gpt_jax.compile --config configs/shakespeare.py --topology v5e:1x1
    python -m gpt_jax.compile --config configs/shakespeare.py --topology h100:8 --config.mesh.fsdp=8

TPU slices need libtpu (pip install -e '.[aot]'), NVIDIA GPUs JAX's CUDA plugin ('.[aot-cuda]'), both Linux.
Nothing is run: times are what the peak arithmetic and the peak bandwidth of the chip would need.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from gpt_jax.commands.flags import parse
from gpt_jax.commands.paths import text_file
from gpt_jax.config import Config, MeshConfig
from gpt_jax.costs.chips import GIB, Chip, min_seconds
from gpt_jax.costs.hlo import Costs, Program
from gpt_jax.costs.topologies import describe_topology
from gpt_jax.data.corpus import Corpus, load_corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.model.layers import Params
from gpt_jax.model.loss import window_losses
from gpt_jax.model.params import abstract_params, flops_per_token, unstack_layers
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.parallel.devices import resolve_model
from gpt_jax.parallel.mesh import make_mesh, platform_of, replicated
from gpt_jax.sampling.generate import chunk_length, decode, prefill
from gpt_jax.sampling.rules import make_rules
from gpt_jax.training.loop import MAX_STEPS_PER_CALL
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.resume import resolve
from gpt_jax.training.state import abstract_state
from gpt_jax.training.step import make_train_steps

PROGRAMS = ("train", "evaluation", "prefill", "decode")

flags.declare_key_flag("config")
flags.DEFINE_string(
    "topology", None, "The absent devices: v5e:1x1, v5e:2x4, v6e:2x2, v4:2x2x1, h100:1, h100:8 ..."
)
flags.DEFINE_integer("rows", 1, "Texts that are sampled at once.", lower_bound=1)
flags.DEFINE_list("programs", list(PROGRAMS), "Which programs.")
flags.DEFINE_string("json", None, "A file for the numbers.")


@dataclass(frozen=True)
class Job:
    """One program of a run, to be compiled.

    Attributes:
        name: of the program.
        unit: what FLOPs, bytes and kernels are counted for: "a step", "a token" ...
        n_units: how many of these a run of the program makes.
        n_tokens: tokens that one device reads for a unit.
        lower: lowers the program.
    """

    name: str
    unit: str
    n_units: int
    n_tokens: float
    lower: Callable[[], Any]


@dataclass(frozen=True)
class Report:
    """What one program costs on one device.

    Attributes:
        name, unit: as in its `Job`.
        compile_seconds: on this machine, tracing included.
        code, arguments, temporaries: bytes, as the compiler says.
        total: their sum, with the results that take no argument's place.
        flops_by_formula: whether `costs.flops` comes from the formula and not from the program.
        costs: read from the compiled program, for one `unit`.
    """

    name: str
    unit: str
    compile_seconds: float
    code: int
    arguments: int
    temporaries: int
    total: int
    flops_by_formula: bool
    costs: Costs


def list_jobs(config: Config, corpus: Corpus, mesh: Mesh, rows: int) -> Iterator[Job]:
    """The programs of a run, each ready to be compiled.

    Args:
        config: without "auto", resolved.
        corpus: the text.
        mesh: its devices may be absent.
        rows: texts to sample at once, on the first of the devices.
    """
    everywhere = replicated(mesh)
    vocab_size, context = corpus.tokenizer.vocab_size, config.model.context
    model = GPT(config.model, vocab_size, mesh=mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = abstract_state(model, optimizer, config.optimizer.ema_decay > 0, mesh)
    tokens_N = jax.ShapeDtypeStruct(corpus.train.shape, corpus.train.dtype, sharding=everywhere)
    train_steps = make_train_steps(config, model, state, MAX_STEPS_PER_CALL)
    lower_training = partial(train_steps.lower, state, tokens_N, np.uint32(0), np.int32(1), np.int32(1))
    yield Job("train", "a step", 1, config.train.batch_size * context / mesh.size, lower_training)

    batch_size = config.train.batch_size // config.train.grad_accum_steps
    windows_BxT = [
        jax.ShapeDtypeStruct((batch_size, context), dtype, sharding=everywhere)
        for dtype in (np.int32, np.int32, np.bool_)
    ]
    lower_evaluation = partial(window_losses.lower, model, state.eval_params, *windows_BxT)
    yield Job("evaluation", "a batch", 1, batch_size * context / mesh.size, lower_evaluation)

    one = make_mesh(MeshConfig(), list(mesh.devices.flat[:1]))
    sampler = GPT(config.model, vocab_size, mesh=one)
    params: Params = jax.eval_shape(unstack_layers, abstract_params(model, one))
    params, key = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(one)),
        (params, jax.eval_shape(lambda: jax.random.key(0))),
    )
    # What is read again each time that the cache is full.
    window = np.zeros((rows, max(context // 2, 1)), np.int32)
    lower_prefill = partial(prefill.lower, sampler, params, window, np.int32(1))
    yield Job("prefill", "half a context", 1, window.size, lower_prefill)
    cache = jax.eval_shape(partial(prefill, sampler), params, window, np.int32(1))
    chunk, token_B = chunk_length(context), window[:, 0]
    lower_decoding = partial(
        decode.lower, sampler, chunk, params, token_B, cache, make_rules(0.8), key, np.int32(1)
    )
    yield Job("decode", "a token", chunk, rows, lower_decoding)


def compile_job(job: Job, flops_per_token: float | None) -> Report:
    """Compile a program and read it.

    Args:
        job: the program.
        flops_per_token: to count FLOPs by; None: they are read from the program, which shows the matrix
            products of a TPU, but not those that a GPU's libraries compute.
    """
    begun = time.monotonic()
    compiled = job.lower().compile()
    seconds = time.monotonic() - begun
    memory = compiled.memory_analysis()
    costs = Program(compiled.as_text()).costs().divided_by(job.n_units)
    if flops_per_token is not None:
        costs = replace(costs, flops=job.n_tokens * flops_per_token)
    total = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip
    return Report(
        job.name, job.unit, seconds, memory.generated_code_size_in_bytes, memory.argument_size_in_bytes,
        memory.temp_size_in_bytes, total, flops_per_token is not None, costs,
    )  # fmt: skip


def what_to_change(name: str, config: Config, n_devices: int) -> str:
    """The setting that lowers the memory of a program most cheaply."""
    train, model = config.train, config.model
    if name in ("prefill", "decode"):
        return "sample fewer texts at once, with a smaller --rows"
    n_shards = n_devices // config.mesh.tensor
    if train.batch_size // train.grad_accum_steps > n_shards:
        more = next(n for n in range(2 * train.grad_accum_steps, train.batch_size + 1)
                    if train.batch_size % n == 0 and train.batch_size // n % n_shards == 0)  # fmt: skip
        return f"use more micro-batches, --config.train.grad_accum_steps={more}"
    if name == "train" and model.remat != "block":
        return "keep fewer activations, --config.model.remat=block"
    return "split the layers over more devices, with a larger --topology and --config.mesh.tensor"


def describe_report(report: Report, chip: Chip) -> str:
    """A few lines of figures."""
    costs = report.costs
    arithmetic, traffic = min_seconds(chip, costs.flops, costs.bytes_moved)
    binds = "memory" if traffic > arithmetic else "arithmetic"
    formula = " by formula" if report.flops_by_formula else ""
    expected = f", {costs.cycles / 1e6:.3g} M cycles by the compiler's estimate" if costs.cycles else ""
    lines = [
        f"{report.name:<11}compiled in {report.compile_seconds:.1f} s; code {_size(report.code)}, arguments "
        f"{_size(report.arguments)}, temporaries {_size(report.temporaries)}: {_size(report.total)} of "
        f"{_size(chip.memory)}",
        f"           {report.unit}: {costs.flops / 1e9:,.4g} GFLOP{formula} ({1e3 * arithmetic:.3g} ms), "
        f"{_size(costs.bytes_moved)} moved ({1e3 * traffic:.3g} ms), {binds} binds; "
        f"{costs.kernels:,.0f} kernels{expected}",
    ]
    if costs.custom_calls:
        calls = ", ".join(f"{n:,.0f} {target}" for target, n in Counter(costs.custom_calls).most_common(5))
        lines.append(f"           custom calls: {calls}")
    moved = sorted(costs.collectives.items(), key=lambda item: -item[1])
    lines += [f"           {_size(n):>10} {kind} {_shorten(shapes)}" for (kind, shapes), n in moved]
    return "\n".join(lines)


def main() -> int:
    """Parse flags, compile, print."""
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}{flags.FLAGS.module_help(__name__)}")
        return 0
    _, config = parse(sys.argv)
    if flags.FLAGS.topology is None:
        raise UserError("--topology is missing: try --topology v5e:1x1")
    if not flags.FLAGS.programs:
        raise UserError(f"programs is empty: name some of {', '.join(PROGRAMS)}")
    for name in flags.FLAGS.programs:
        if name not in PROGRAMS:
            raise UserError(f"programs = {name!r} must be among {', '.join(PROGRAMS)}")
    json_file = Path(flags.FLAGS.json).expanduser() if flags.FLAGS.json else None
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UserError(f"json = {str(json_file)!r} must be a file in a folder that exists")
    jax.config.update("jax_platforms", "cpu")  # use no local accelerator
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be loaded
    # Kernels are chosen by rules instead of by timing them on a GPU.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    chip, devices = describe_topology(flags.FLAGS.topology)
    mesh = make_mesh(config.mesh, devices)
    platform = platform_of(mesh)
    config = resolve(replace(config, model=resolve_model(config.model, platform)), mesh)
    with LoadingBar(sys.stderr) as progress:
        data = config.data
        corpus = load_corpus(text_file(data), config.model.context, data.train_fraction, progress)
    shape = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    print(
        f"target     {mesh.size} x {chip.name} ({chip.memory / GIB:.0f} GiB, {chip.flops / 1e12:,.0f} "
        f"TFLOP/s bfloat16, {chip.bandwidth / 1e9:,.0f} GB/s), mesh {shape}, {config.model.dtype}, "
        f"jax {jax.__version__}\n"
        f"           figures for one device, computed from the compiled programs; nothing was run"
    )
    per_token = flops_per_token(config.model, corpus.tokenizer.vocab_size)
    reports: list[Report] = []
    try:
        for job in list_jobs(config, corpus, mesh, flags.FLAGS.rows):
            if job.name in flags.FLAGS.programs:
                formula = per_token if job.name == "train" else per_token / 3  # the forward pass alone
                report = compile_if_it_fits(job, formula if platform == "gpu" else None, config, mesh)
                reports.append(report)
                print(describe_report(report, chip), flush=True)
                check_memory(report, chip, platform, config, mesh)
    finally:
        if json_file:
            programs = [_as_json(report) for report in reports]
            values = {"topology": flags.FLAGS.topology, "mesh": dict(mesh.shape), "programs": programs}
            json_file.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return 0


def compile_if_it_fits(job: Job, formula: float | None, config: Config, mesh: Mesh) -> Report:
    """`compile_job`, with advice where the compiler says that memory is exceeded.

    Raises:
        RunError: it is.
    """
    try:
        return compile_job(job, formula)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = str(error).splitlines()[0]
        raise RunError(
            f"{job.name} does not fit: {what_to_change(job.name, config, mesh.size)} ({needs})"
        ) from None


def check_memory(report: Report, chip: Chip, platform: str, config: Config, mesh: Mesh) -> None:
    """Compare with the chip's memory; on GPUs with the three quarters of it that JAX takes.

    Raises:
        RunError: the program needs more.
    """
    room = chip.memory * (0.75 if platform == "gpu" else 1)
    if report.total > room:
        share = "the 75% that JAX takes by default of " if platform == "gpu" else ""
        raise RunError(
            f"{report.name} needs {_size(report.total)}, more than {share}the {_size(chip.memory)} of a "
            f"{chip.name}: {what_to_change(report.name, config, mesh.size)}"
        )


def _shorten(shapes: str) -> str:
    return shapes if len(shapes) <= 70 else shapes[:66] + " ..."


def _as_json(report: Report) -> dict[str, Any]:
    collectives = [
        {"kind": kind, "shapes": shapes, "bytes": n_bytes}
        for (kind, shapes), n_bytes in report.costs.collectives.items()
    ]
    return {**vars(report), "costs": {**vars(report.costs), "collectives": collectives}}


def _size(n_bytes: float) -> str:
    """`1.04 GB`, `17.2 MB`, `0.3 kB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes / 1e3:.3g} kB"
