"""Compile a run's programs for devices that are not here, and say what they would cost there.

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from gpt_jax.backend import resolve_model
from gpt_jax.batches import eval_windows
from gpt_jax.chips import Chip, flops_per_token, least_seconds
from gpt_jax.command_line import parse
from gpt_jax.config import Config, MeshConfig
from gpt_jax.corpus import Corpus, load_corpus
from gpt_jax.errors import RunError, UserError, run_main
from gpt_jax.hlo import Costs, Program
from gpt_jax.loss import window_losses
from gpt_jax.model import GPT, Params, unstack_layers
from gpt_jax.optimizer import make_optimizer
from gpt_jax.resume import settle
from gpt_jax.sampler import CHUNK, decode, prefill
from gpt_jax.sampling import make_rules
from gpt_jax.sharding import make_mesh, platform_of, replicated
from gpt_jax.topologies import describe_topology
from gpt_jax.train_state import abstract_params, abstract_state
from gpt_jax.train_step import make_train_steps
from gpt_jax.trainer import MAX_STEPS_PER_CALL

PROGRAMS = ("train", "evaluation", "prefill", "decode")

flags.declare_key_flag("config")
flags.DEFINE_string("topology", None, "The devices: v5e:1x1, v5e:2x4, v6e:2x2, v4:2x2x1, h100:1, h100:8 ...")
flags.DEFINE_integer("rows", 1, "Texts that are sampled at once.", lower_bound=1)
flags.DEFINE_list("programs", list(PROGRAMS), "Which programs.")
flags.DEFINE_string("json", None, "A file for the numbers.")


@dataclass(frozen=True)
class Report:
    """What one program costs on one device.

    Attributes:
        name: of the program.
        unit: what FLOPs, bytes and kernels are counted for: "a step", "a token" ...
        compile_seconds: here.
        code, arguments, temporaries: bytes, as the compiler says; `in_all` also has results that take no
            argument's place.
        costs: read from the compiled program, for one `unit`.
    """

    name: str
    unit: str
    compile_seconds: float
    code: int
    arguments: int
    temporaries: int
    in_all: int
    costs: Costs


def lower_programs(
    config: Config, corpus: Corpus, mesh: Mesh, rows: int
) -> Iterator[tuple[str, str, int, Any]]:
    """The programs of a run, ready to be compiled.

    Args:
        config: without "auto", and settled.
        corpus: the text.
        mesh: over devices that need not be here.
        rows: texts to sample at once, on the first of the devices.

    Yields:
        Name, unit, how many units a run of the program makes, and a function that lowers it.
    """
    everywhere = replicated(mesh)
    vocab_size = corpus.tokenizer.vocab_size
    model = GPT(config.model, vocab_size, mesh=mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = abstract_state(model, optimizer, config.optimizer.ema_decay > 0, mesh)
    tokens_N = jax.ShapeDtypeStruct(corpus.train.shape, corpus.train.dtype, sharding=everywhere)
    train_steps = make_train_steps(config, model, optimizer, state, MAX_STEPS_PER_CALL)
    yield "train", "a step", 1, partial(train_steps.lower, state, tokens_N, np.uint32(0), np.int32(1))

    batch_size = config.train.batch_size // config.train.accumulate
    windows = [
        jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=everywhere)
        for part in eval_windows(corpus.val, config.model.context, batch_size)
    ]
    lower_evaluation = partial(window_losses.lower, model, state.eval_params, *windows)
    yield "evaluation", "a validation split", 1, lower_evaluation

    one = make_mesh(MeshConfig(), list(mesh.devices.flat[:1]))
    sampler = GPT(config.model, vocab_size, stacked=False)
    params: Params = jax.eval_shape(unstack_layers, abstract_params(model, one))
    params, key = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(one)),
        (params, jax.eval_shape(lambda: jax.random.key(0))),
    )
    window = np.zeros((rows, config.model.context), np.int32)
    yield "prefill", "a full context", 1, partial(prefill.lower, sampler, params, window, np.int32(1))
    logits_BxV, cache = jax.eval_shape(partial(prefill, sampler), params, window, np.int32(1))
    lower_decoding = partial(
        decode.lower, sampler, CHUNK, params, logits_BxV, cache, make_rules(0.8), key, np.int32(1)
    )
    yield "decode", "a token", CHUNK, lower_decoding


def compile_program(name: str, unit: str, n_units: int, lower: Any) -> Report:
    """Compile a program that `lower_programs` yields, and read it."""
    begun = time.monotonic()
    compiled = lower().compile()
    seconds = time.monotonic() - begun
    memory = compiled.memory_analysis()
    costs = Program(compiled.as_text()).costs()
    in_all = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip
    return Report(
        name, unit, seconds, memory.generated_code_size_in_bytes, memory.argument_size_in_bytes,
        memory.temp_size_in_bytes, in_all, costs.divided_by(n_units),
    )  # fmt: skip


def what_to_change(name: str, config: Config, n_devices: int) -> str:
    """The setting that lowers the memory of a program most cheaply."""
    train, model = config.train, config.model
    if name in ("prefill", "decode"):
        return "sample fewer texts at once, with a smaller --rows"
    n_shards = n_devices // config.mesh.tensor
    if train.batch_size // train.accumulate > n_shards:
        more = next(n for n in range(2 * train.accumulate, train.batch_size + 1)
                    if train.batch_size % n == 0 and train.batch_size // n % n_shards == 0)  # fmt: skip
        return f"work through a step in more micro-batches, --config.train.accumulate={more}"
    if name == "train" and model.remat != "block":
        return "keep fewer activations, --config.model.remat=block"
    return "choose a larger mesh, with --config.mesh.fsdp"


def describe_report(report: Report, chip: Chip, flops: float | None) -> str:
    """A few lines of figures. `flops` stands in where the program's arithmetic cannot be read from it."""
    costs = report.costs
    flops = costs.flops if flops is None else flops
    arithmetic, traffic = least_seconds(chip, flops, costs.bytes_moved)
    binds = "memory" if traffic > arithmetic else "arithmetic"
    expected = f", {costs.cycles / 1e6:.3g} M cycles by the compiler's estimate" if costs.cycles else ""
    lines = [
        f"{report.name:<11}compiled in {report.compile_seconds:.1f} s; code {_size(report.code)}, arguments "
        f"{_size(report.arguments)}, temporaries {_size(report.temporaries)}: {_size(report.in_all)} of "
        f"{_size(chip.memory)}",
        f"           {report.unit}: {flops / 1e9:,.4g} GFLOP ({1e3 * arithmetic:.3g} ms), "
        f"{_size(costs.bytes_moved)} moved ({1e3 * traffic:.3g} ms), {binds} binds; "
        f"{costs.kernels:,.0f} kernels{expected}",
    ]
    if costs.custom_calls:
        calls = ", ".join(f"{n:,.0f} {target}" for target, n in Counter(costs.custom_calls).most_common(5))
        lines.append(f"           custom calls: {calls}")
    moved = sorted(costs.collectives.items(), key=lambda item: -item[1])
    lines += [f"           {_size(n):>10} {kind} {shapes:.70}" for (kind, shapes), n in moved]
    return "\n".join(lines)


def main() -> int:
    """Parse flags, compile, print."""
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}{flags.FLAGS.main_module_help()}")
        return 0
    _, config = parse(sys.argv)
    if flags.FLAGS.topology is None:
        raise UserError("--topology is missing: try --topology v5e:1x1")
    for name in flags.FLAGS.programs:
        if name not in PROGRAMS:
            raise UserError(f"programs = {name!r} must be among {', '.join(PROGRAMS)}")
    json_file = Path(flags.FLAGS.json) if flags.FLAGS.json else None
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UserError(f"json = {str(json_file)!r} must be a file in a folder that exists")
    jax.config.update("jax_platforms", "cpu")  # what is here is not asked
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read programs that cannot run
    # Kernels are chosen by rules instead of by timing them on a GPU.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    chip, devices = describe_topology(flags.FLAGS.topology)
    mesh = make_mesh(config.mesh, devices)
    platform = platform_of(mesh)
    config = settle(replace(config, model=resolve_model(config.model, platform)), mesh)
    corpus = load_corpus(config.data.file, config.model.context, config.data.train_fraction)
    shape = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    print(
        f"target     {mesh.size} x {chip.name} ({_size(chip.memory)}, {chip.flops / 1e12:,.0f} TFLOP/s "
        f"bfloat16, {chip.bandwidth / 1e9:,.0f} GB/s), mesh {shape}, {config.model.dtype}, "
        f"jax {jax.__version__}\n"
        f"           figures for one device, computed from the compiled programs; nothing was run"
    )
    reports = []
    for name, unit, n_units, lower in lower_programs(config, corpus, mesh, flags.FLAGS.rows):
        if name not in flags.FLAGS.programs:
            continue
        try:
            report = compile_program(name, unit, n_units, lower)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needs = str(error).splitlines()[0]
            raise RunError(
                f"{name} does not fit: {what_to_change(name, config, mesh.size)} ({needs})"
            ) from None
        reports.append(report)
        tokens = config.train.batch_size * config.model.context / mesh.size
        formula = tokens * flops_per_token(config.model, corpus.tokenizer.vocab_size)
        print(
            describe_report(report, chip, formula if name == "train" and platform == "gpu" else None),
            flush=True,
        )
        if report.in_all > chip.memory:
            raise RunError(
                f"{name} needs {_size(report.in_all)} of the {_size(chip.memory)} of a {chip.name}: "
                f"{what_to_change(name, config, mesh.size)}"
            )
    if json_file:
        programs = [_as_json(report) for report in reports]
        values = {"topology": flags.FLAGS.topology, "mesh": dict(mesh.shape), "programs": programs}
        json_file.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return 0


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


if __name__ == "__main__":
    sys.exit(run_main(main))
