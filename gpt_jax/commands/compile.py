"""The command compile."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.commands.arguments import ArgumentParser, config_of
from gpt_jax.config import MeshConfig
from gpt_jax.costs.chips import GIB, Chip
from gpt_jax.costs.counts import Costs, read_costs
from gpt_jax.costs.topologies import describe_topology
from gpt_jax.data.corpus import load_corpus
from gpt_jax.data.tokens import Corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.model.layers import Params
from gpt_jax.model.loss import next_token_loss, window_losses
from gpt_jax.model.params import abstract_params, flops_per_token, unstack_layers, with_sharding
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.parallel.devices import first_device
from gpt_jax.parallel.mesh import count_shards, make_mesh, replicated
from gpt_jax.paths import expand
from gpt_jax.plan import Plan, make_plan
from gpt_jax.sampling.decode import decode, prefill
from gpt_jax.sampling.generate import chunk_length
from gpt_jax.sampling.rules import make_rules
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.source import abstract_source
from gpt_jax.training.state import abstract_state
from gpt_jax.training.step import make_train_steps

PROGRAMS = ("train", "evaluation", "prefill", "decode")

PURPOSE = """\
Compile a run's programs ahead of time, for absent accelerators, and print what
they cost there. TPUs need libtpu (pip install -e '.[aot]'), NVIDIA GPUs JAX's
CUDA plugin ('.[aot-cuda]'), both Linux. Nothing is run: times are lower
bounds, at the peak arithmetic and the peak bandwidth of the chip."""
EXAMPLES = (
    "--config configs/shakespeare.py --topology v5e:1x1",
    "--config configs/shakespeare.py --topology h100:8",
)


@dataclass(frozen=True)
class PlannedProgram:
    """One program of a run, to be compiled."""

    name: str
    unit: str  # what FLOPs, bytes and kernels are counted for: "a step", "a token" ...
    n_units: int  # made by a run of the program
    flops: float  # of one device for a unit, by `flops_per_token`
    lower: Callable[[], Any]


@dataclass(frozen=True)
class Report:
    """What one program costs on one device."""

    name: str
    unit: str
    compile_seconds: float  # on this machine, tracing included
    code: int  # bytes, as the compiler says, like the next three
    arguments: int
    temporaries: int
    total: int  # code + arguments + temporaries + outputs not aliased to donated arguments
    flops: float  # of one unit, as the next one
    costs: Costs


def list_programs(plan: Plan, corpus: Corpus, rows: int) -> Iterator[PlannedProgram]:
    """The programs of a run whose devices may be absent. `rows`: texts to sample at once, on one device."""
    config, mesh = plan.config, plan.mesh
    everywhere = replicated(mesh)
    context, vocab_size = config.model.context, config.model.vocabulary(corpus.tokenizer.vocab_size)
    flops: float = flops_per_token(config.model, vocab_size)
    model = GPT(config.model, vocab_size, plan.execution)
    optimizer = make_optimizer(config.optimizer, plan.steps)
    state = abstract_state(model, optimizer, mesh)
    source, max_steps = abstract_source(plan, corpus)
    train_steps = make_train_steps(plan, model, next_token_loss, state, max_steps)
    lower = partial(train_steps.lower, state, source, np.uint32(0), np.int32(1), np.int32(1))
    yield PlannedProgram("train", "a step", 1, flops * config.train.batch_size * context / mesh.size, lower)

    flops /= 3  # the forward pass alone
    windows_BxT = [
        jax.ShapeDtypeStruct((plan.micro_batch_size, context), dtype, sharding=everywhere)
        for dtype in (np.int32, np.int32, np.bool_)
    ]
    lower = partial(window_losses.lower, model, state.params, *windows_BxT)
    yield PlannedProgram("evaluation", "a batch", 1, flops * windows_BxT[0].size / mesh.size, lower)

    one = make_mesh(MeshConfig(), list(mesh.devices.flat[:1]))
    sampler = model.clone(execution=replace(plan.execution, mesh=one))
    params: Params = jax.eval_shape(unstack_layers, abstract_params(model, one))
    arguments = params, jax.eval_shape(lambda: jax.random.key(0))
    params, key = jax.tree.map(lambda leaf: with_sharding(leaf, replicated(one)), arguments)
    # The half context that is prefilled whenever the cache is full.
    window = np.zeros((rows, max(context // 2, 1)), np.int32)
    lower = partial(prefill.lower, sampler, params, window, np.int32(1))
    yield PlannedProgram("prefill", "half a context", 1, flops * window.size, lower)
    cache = jax.eval_shape(partial(prefill, sampler), params, window, np.int32(1))
    numbers_C = np.arange(chunk_length(context), dtype=np.int32)
    lower = partial(decode.lower, sampler, params, window[:, 0], cache, make_rules(0.8), key, numbers_C)
    yield PlannedProgram("decode", "a token", len(numbers_C), flops * rows, lower)


def compile_program(program: PlannedProgram, plan: Plan) -> Report:
    """Compile a program and read it.

    Raises:
        RunError: the compiler says that memory is exceeded.
    """
    begun = time.monotonic()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice, needs = what_to_change(program.name, plan), str(error).splitlines()[0]
        raise RunError(f"{program.name} does not fit: {advice} ({needs})") from None
    seconds = time.monotonic() - begun
    memory = compiled.memory_analysis()
    costs = read_costs(compiled.as_text(), program.n_units)
    code, arguments = memory.generated_code_size_in_bytes, memory.argument_size_in_bytes
    temporaries, results = memory.temp_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = code + arguments + temporaries + results
    return Report(
        program.name, program.unit, seconds, code, arguments, temporaries, total, program.flops, costs
    )


def what_to_change(name: str, plan: Plan) -> str:
    """The setting that lowers the memory of a program most cheaply."""
    train = plan.config.train
    if name in ("prefill", "decode"):
        return "sample fewer texts at once, with a smaller --rows"
    n_shards = count_shards(plan.mesh)
    if train.batch_size // train.grad_accum_steps > n_shards:
        more = next(n for n in range(2 * train.grad_accum_steps, train.batch_size + 1)
                    if train.batch_size % n == 0 and train.batch_size // n % n_shards == 0)  # fmt: skip
        return f"use more micro-batches, --config.train.grad_accum_steps={more}"
    if name == "train" and plan.execution.remat != "block":
        return "keep fewer activations, --config.model.remat=block"
    return "split the layers over more devices, with a larger --topology and --config.mesh.tensor"


def describe_report(report: Report, chip: Chip) -> str:
    """A few lines of figures."""
    costs = report.costs
    arithmetic, traffic = report.flops / chip.flops, costs.bytes_moved / chip.bandwidth  # seconds at least
    binds = "memory" if traffic > arithmetic else "arithmetic"
    expected = f", {costs.cycles / 1e6:.3g} M cycles by the compiler's estimate" if costs.cycles else ""
    lines = [
        f"{report.name:<11}compiled in {report.compile_seconds:.1f} s; code {_size(report.code)}, arguments "
        f"{_size(report.arguments)}, temporaries {_size(report.temporaries)}: {_size(report.total)} of "
        f"{_size(chip.memory)}",
        f"           {report.unit}: {report.flops / 1e9:,.4g} GFLOP by formula ({1e3 * arithmetic:.3g} ms), "
        f"{_size(costs.bytes_moved)} moved ({1e3 * traffic:.3g} ms), {binds}-bound; "
        f"{costs.kernels:,.0f} kernels{expected}",
    ]
    if costs.custom_calls:
        calls = ", ".join(f"{n:,.0f} {target}" for target, n in Counter(costs.custom_calls).most_common(5))
        lines.append(f"           custom calls: {calls}")
    moved = sorted(costs.collectives.items(), key=lambda item: -item[1])
    lines += [
        f"           {_size(n):>10} {kind} {shapes if len(shapes) <= 70 else shapes[:66] + ' ...'}"
        for (kind, shapes), n in moved
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, compile, print."""
    parser = ArgumentParser("compile", PURPOSE, EXAMPLES, takes_config=True)
    flag = parser.add_argument
    flag("--topology", metavar="CHIPS", help="v5e:1x1, v5e:2x4, v6e:2x2, v4:2x2x1, h100:1, h100:8 ...")
    flag("--programs", metavar="LIST", default=",".join(PROGRAMS), help="which (%(default)s)")
    flag("--rows", type=int, metavar="N", default=1, help="texts that are sampled at once (%(default)s)")
    flag("--json", type=Path, metavar="FILE", help="write the numbers to a file")
    flags = parser.parse_args(arguments)
    config, programs = config_of(flags), flags.programs.split(",")
    if flags.topology is None:
        raise UserError("--topology is missing: try --topology v5e:1x1")
    for name in programs:
        if name not in PROGRAMS:
            raise UserError(f"programs = {name!r} must be among {', '.join(PROGRAMS)}")
    if flags.rows < 1:
        raise UserError(f"rows = {flags.rows} must be 1 or above")
    file = flags.json and expand(flags.json)
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise UserError(f"json = {str(file)!r} must be a file in a folder that exists")
    jax.config.update("jax_platforms", "cpu")  # use no local accelerator
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be loaded
    # Kernels are chosen by rules instead of by timing them on a GPU.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    chip, devices = describe_topology(flags.topology)
    plan = make_plan(config, devices=devices)
    with LoadingBar(sys.stderr) as progress:
        data, context = config.data, config.model.context
        corpus = load_corpus(plan.text, context, data.train_fraction, progress, data.tokenizer)
    shape = " x ".join(f"{size} {axis}" for axis, size in plan.mesh.shape.items())
    print(
        f"target     {plan.mesh.size} x {chip.name} ({chip.memory / GIB:.0f} GiB, {chip.flops / 1e12:,.0f} "
        f"TFLOP/s bfloat16, {chip.bandwidth / 1e9:,.0f} GB/s), mesh {shape}, {plan.execution.dtype}, "
        f"jax {jax.__version__}\n"
        f"           figures for one device, computed from the compiled programs; nothing was run"
    )
    figures: dict[str, Any] = {"topology": flags.topology, "mesh": dict(plan.mesh.shape), "programs": []}
    try:
        for program in list_programs(plan, corpus, flags.rows):
            if program.name in programs:
                report = compile_program(program, plan)
                moved = report.costs.collectives.items()
                collectives = [{"kind": kind, "shapes": shapes, "bytes": n} for (kind, shapes), n in moved]
                costs = vars(report.costs) | {"collectives": collectives}
                figures["programs"].append(vars(report) | {"costs": costs})
                print(describe_report(report, chip), flush=True)
                check_memory(report, chip, plan, first_device(plan.mesh)[0] == "gpu")
    finally:
        if file:
            file.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def check_memory(report: Report, chip: Chip, plan: Plan, on_gpu: bool) -> None:
    """Compare with the chip's memory; on GPUs with the three quarters of it that JAX takes.

    Raises:
        RunError: the program needs more.
    """
    if report.total > chip.memory * (0.75 if on_gpu else 1):
        share = "the 75% that JAX takes by default of " if on_gpu else ""
        raise RunError(
            f"{report.name} needs {_size(report.total)}, more than {share}the {_size(chip.memory)} of a "
            f"{chip.name}: {what_to_change(report.name, plan)}"
        )


def _size(n_bytes: float) -> str:
    """`1.04 GB`, `17.2 MB`, `0.3 kB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes / 1e3:.3g} kB"
