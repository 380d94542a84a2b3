"""`python -m gpt_jax.compile`: the chip table, the errors, and with libtpu what it says of a small model."""

import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.export
import numpy as np
import pytest
import tokenizers
from conftest import make_gpt
from test_commands import environment

from gpt_jax.commands import compile as command
from gpt_jax.config import Config, MeshConfig, ModelConfig
from gpt_jax.costs import topologies
from gpt_jax.costs.chips import GIB, find_chip, peak_flops
from gpt_jax.costs.counts import Costs
from gpt_jax.data.batches import TokenWindows
from gpt_jax.errors import RunError, UserError
from gpt_jax.model.loss import next_token_loss
from gpt_jax.model.params import abstract_params, flops_per_token, name_leaves
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.plan import make_plan
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.state import abstract_state
from gpt_jax.training.step import make_train_steps

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
    reason="needs JAX's CUDA plugin",
)


def compile_it(*flags, config="smoke"):
    return subprocess.run(
        [sys.executable, "-m", "gpt_jax", "compile", f"--config={REPOSITORY}/configs/{config}.py", *flags],
        env=environment(), capture_output=True, text=True, timeout=300, cwd=REPOSITORY,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v4", "v4"), ("TPU v6 lite", "v6e"),
     ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H200", "h200"),
     ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA B200", "b200"), ("NVIDIA GB200", None),
     ("NVIDIA H200 NVL", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("cpu", None),
     ("Tesla T4", None)],
)  # fmt: skip
def test_a_chip_is_found_by_what_jax_calls_it(kind, name):
    chip = find_chip(kind)
    assert (chip and chip.name) == name


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_are_six_for_each_weight_of_a_product_and_attention(activation):
    config = ModelConfig(n_layer=3, activation=activation, tied_embedding=False)
    params = abstract_params(make_gpt(config, 65), make_mesh(MeshConfig(data=1)))
    weights = sum(leaf.size for name, leaf in name_leaves(params).items() if name.endswith("kernel"))
    assert flops_per_token(config, 65) == 6 * weights + 12 * 3 * 256 * 384


@pytest.mark.parametrize(
    "kind, dtype, peak",
    [
        ("TPU v5 lite", "bfloat16", 4 * 197e12),
        ("TPU v5 lite", "float32", None),
        ("Tesla T4", "bfloat16", None),
    ],
)
def test_the_peak_is_that_of_all_devices_and_of_bfloat16(kind, dtype, peak):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    mesh = SimpleNamespace(devices=np.full((4, 1, 1), device), size=4)
    assert peak_flops(mesh, dtype) == peak


@pytest.mark.parametrize(
    "topology, message",
    [("v9:1x1", "unknown chip 'v9'; known: v4, v5e"), ("a100-40gb:1", "unknown chip 'a100-40gb'"),
     ("v5e", "must end in a shape"), ("v5e:8", "must end in a shape"), ("h100:0", "must end in a number"),
     ("h100:2x2", "must end in a number")],
)  # fmt: skip
def test_a_bad_topology_is_one_line(topology, message):
    with pytest.raises(UserError, match=message):
        topologies.describe_topology(topology)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(topologies, "find_spec", lambda name: None)
    monkeypatch.setattr(jax, "__version_info__", topologies.OLDEST_JAX)
    with pytest.raises(UserError, match=r"libtpu, .* is not installed: pip install -e '\.\[aot\]'"):
        topologies.describe_topology("v5e:1x1")
    with pytest.raises(UserError, match=r"CUDA plugin, .* is not installed: pip install -e '\.\[aot-cuda\]'"):
        topologies.describe_topology("h100:1")
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    with pytest.raises(UserError, match=r"needs JAX \d+\.\d+\.\d+ or newer; this is"):
        topologies.describe_topology("v5e:1x1")


def test_the_first_setting_to_change_when_memory_is_short():
    def advice(n_devices=1, name="train", **groups):
        plan = make_plan(Config.from_dict(groups), devices=jax.devices()[:n_devices])
        return command.what_to_change(name, plan)

    assert "--config.train.grad_accum_steps=2" in advice(train={"batch_size": 12, "grad_accum_steps": 1})
    assert "--config.train.grad_accum_steps=6" in advice(train={"batch_size": 12, "grad_accum_steps": 3})
    assert "--config.model.remat=block" in advice(train={"batch_size": 12, "grad_accum_steps": 12})
    assert "--config.model.remat=block" in advice(8, train={"batch_size": 8, "grad_accum_steps": 1})
    assert "--config.train.grad_accum_steps=3" in advice(4, train={"batch_size": 12, "grad_accum_steps": 1})
    assert "--config.mesh.tensor" in advice(
        train={"batch_size": 12, "grad_accum_steps": 12}, model={"remat": "block"}
    )
    # Neither evaluation nor sampling keeps activations for a gradient.
    assert "--config.mesh.tensor" in advice(
        name="evaluation", train={"batch_size": 12, "grad_accum_steps": 12}
    )
    assert "--rows" in advice(name="decode", train={"batch_size": 12, "grad_accum_steps": 1})


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), r"--topology is missing: try --topology v5e:1x1"),
        (
            ("--topology=v5e:1x1", "--programs=train,sample"),
            "programs = 'sample' must be among train, evaluation",
        ),
        (
            ("--topology=v5e:1x1", "--json=missing/out.json"),
            "json = 'missing/out.json' must be a file in a folder",
        ),
        (("--topology=v5e:1x1", "--rows=0"), "rows = 0 must be 1 or above"),
    ],
)
def test_flags_are_checked(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        command.main([f"--config={REPOSITORY}/configs/smoke.py", *flags])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_training_step_lowers_for_accelerators(platform):
    """Half of compiling, and all that works with every JAX: Colab's cannot compile for an absent TPU."""
    config = Config.from_dict({
        "model": {"n_layer": 2, "n_head": 2, "d_model": 16, "context": 8, "dropout": 0.1, "dtype": "bfloat16",
                  "unroll": "no", "remat": "elementwise"},
        "train": {"batch_size": 4, "grad_accum_steps": 1}, "mesh": {"data": 1},
    })  # fmt: skip
    plan = make_plan(config)
    model, optimizer = make_gpt(config.model, 11, plan.mesh), make_optimizer(config.optimizer, 10)
    state = abstract_state(model, optimizer, plan.mesh)
    steps = make_train_steps(plan, model, next_token_loss, state, 10)
    tokens = jax.ShapeDtypeStruct((100,), np.uint8)
    exported = jax.export.export(steps, platforms=[platform])(
        state, TokenWindows(tokens, 4, 8), np.uint32(0), np.int32(1), np.int32(10)
    )  # fmt: skip
    assert exported.platforms == (platform,)
    assert "bf16" in exported.mlir_module() and "stablehlo.while" in exported.mlir_module()


@pytest.mark.skipif(jax.__version_info__ >= topologies.OLDEST_JAX, reason="this JAX is new enough")
def test_an_old_jax_is_one_line():
    done = compile_it("--topology=v5e:1x1")
    assert done.returncode == 2
    assert re.fullmatch(r"error: compiling for an absent device needs JAX \S+ or newer; .*\n", done.stderr)


@needs_libtpu
def test_a_small_model_is_compiled_for_a_tpu(tmp_path):
    done = compile_it("--topology=v5e:2x2", f"--json={tmp_path}/out.json", "--config.mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    assert "4 x v5e (16 GiB, 197 TFLOP/s bfloat16, 819 GB/s), mesh 2 data x 2 fsdp x 1 tensor" in done.stdout
    values = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    programs = {program["name"]: program for program in values["programs"]}
    assert list(programs) == ["train", "evaluation", "prefill", "decode"]
    config = ModelConfig(n_layer=1, n_head=2, d_model=32, context=32)
    formula = 8 * 32 / 4 * flops_per_token(config, 65)
    assert programs["train"]["flops"] == pytest.approx(formula)
    assert programs["train"]["costs"]["cycles"] > programs["decode"]["costs"]["cycles"] > 0
    assert programs["train"]["costs"]["collectives"] and not programs["decode"]["costs"]["collectives"]
    assert all(program["total"] > program["arguments"] > 0 for program in values["programs"])


def report_of(name, total):
    return command.Report(name, "a step", 1.0, 0, 0, total, total, 0.0, Costs())


def test_a_gpu_has_the_part_of_its_memory_that_jax_takes():
    config = Config.from_dict({"train": {"batch_size": 8, "grad_accum_steps": 1}})
    plan = make_plan(config, devices=jax.devices()[:1])
    h100 = find_chip("NVIDIA H100 80GB HBM3")
    command.check_memory(report_of("train", 59 * GIB), h100, plan, on_gpu=True)
    with pytest.raises(RunError, match=r"needs 65.5 GB, more than the 75% .*grad_accum_steps=2"):
        command.check_memory(report_of("train", 61 * GIB), h100, plan, on_gpu=True)
    command.check_memory(report_of("train", 61 * GIB), find_chip("TPU v5"), plan, on_gpu=False)


@needs_libtpu
@pytest.mark.parametrize(
    "topology, mesh", [("v6e:4x4", ["fsdp=8"]), ("v5e:2x4", ["data=3"]), ("v5p:4x4x4", ["fsdp=8"])]
)
def test_a_mesh_that_a_slice_cannot_hold_is_one_line_or_fits(topology, mesh):
    """An axis of the mesh may be a part of an axis of the torus; three of eight chips are no mesh."""
    _, devices = topologies.describe_topology(topology)
    sizes = {name: int(size) for name, size in (setting.split("=") for setting in mesh)}
    if "data" in sizes:
        with pytest.raises(UserError, match="= 3 x 1 x 1 cannot be laid out on these 8 devices"):
            make_mesh(MeshConfig(**sizes), devices)
    else:
        assert make_mesh(MeshConfig(**sizes), devices).size == len(devices)


@needs_libtpu
@pytest.mark.slow
def test_gpt2_small_is_compiled_on_token_files(tmp_path):
    """Two of its layers, with its vocabulary, by the command that docs/accelerators.md shows."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(50_257)}, "w0"))
    words.save(str(tmp_path / "words.json"))
    for name in ("text_train_0", "text_val_0"):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 5000
        ids = np.arange(5000, dtype="<u2")
        (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + ids.tobytes())
    done = compile_it(
        "--topology=v5e:2x4", "--programs=train", f"--json={tmp_path}/out.json", "--config.model.n_layer=2",
        "--config.train.grad_accum_steps=4", f"--config.data.path={tmp_path}",
        f"--config.data.tokenizer={tmp_path}/words.json", config="gpt2_124m",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (program,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["programs"]
    config = ModelConfig(n_layer=2, n_head=12, d_model=768, context=1024)
    assert program["flops"] == pytest.approx(512 * 1024 / 8 * flops_per_token(config, 50_257))
    # The logits of all 16 windows of a device would be 3.3 GB.
    assert program["temporaries"] < 4.4e9  # 5.1e9 without pieces


@needs_libtpu
def test_what_does_not_fit_is_one_line_with_the_setting_to_change():
    done = compile_it(
        "--topology=v5e:1x1", "--programs=train", "--config.model.context=8192",
        "--config.train.batch_size=64", "--config.train.grad_accum_steps=1",
    )  # fmt: skip
    assert done.returncode == 1
    assert "--config.train.grad_accum_steps=2" in done.stderr.splitlines()[-1], done.stderr
    done = compile_it("--topology=v5e:1x1", "--config.mesh.fsdp=8")
    assert done.returncode == 2 and "mesh.fsdp" in done.stderr


@needs_cuda
def test_a_small_model_is_compiled_for_a_gpu():
    done = compile_it("--topology=h100:2")
    assert done.returncode == 0, done.stderr
    assert "2 x h100 (80 GiB" in done.stdout and "all-reduce" in done.stdout
    assert "__cudnn$fmhaSoftmaxBackward" in done.stdout
    assert "Traceback" not in done.stderr
