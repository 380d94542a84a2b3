import os
import subprocess
import sys
from dataclasses import replace

import pytest
from test_commands import environment

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.parallel import devices, execution
from gpt_jax.parallel.execution import Execution, resolve_execution
from gpt_jax.parallel.mesh import make_mesh


def test_a_backend_that_computes_rightly_passes():
    devices.check_backend()


def test_a_backend_that_computes_wrongly_is_refused(monkeypatch):
    """As jaxlib 0.10.2 does: the last of 32,769 results is wrong, by less than a hundredth."""

    def wrong_jit(function):
        return lambda rows: function(rows).at[-1].multiply(0.998)

    monkeypatch.setattr(devices.jax, "jit", wrong_jit)
    with pytest.raises(
        UserError, match=r"gives wrong results on this cpu \(\d+ for 32768 squared\): install"
    ):
        devices.check_backend()


@pytest.mark.parametrize(
    "platform, compute_capability, dtype",
    [
        ("cpu", "", "float32"),
        ("tpu", "", "bfloat16"),
        ("gpu", "7.0", "float32"),  # V100
        ("gpu", "7.5", "float32"),  # T4, Colab's free GPU
        ("gpu", "8.0", "bfloat16"),  # A100
        ("gpu", "8.9", "bfloat16"),  # L4
        ("gpu", "9.0", "bfloat16"),  # H100
        ("gpu", "10.0", "bfloat16"),  # B200
        ("gpu", "gfx942", "bfloat16"),  # AMD
    ],
)
def test_bfloat16_where_the_hardware_multiplies_in_it(platform, compute_capability, dtype):
    assert devices.auto_dtype(platform, compute_capability) == dtype


@pytest.mark.parametrize(
    "device, dtype, text",
    [
        (("cpu", ""), "float32", "float32"),
        (("gpu", "7.5"), "float32", "float32 (a GPU below compute capability 8.0 does not support bfloat16)"),
        (("gpu", "9.0"), "bfloat16", "bfloat16"),
        (("gpu", "9.0"), "float32", "float32 (the model's matrix products in full float32)"),
        (("tpu", ""), "float32", "float32 (the model's matrix products in full float32)"),
    ],
)
def test_what_is_said_of_the_precision(device, dtype, text):
    assert devices.describe_dtype(dtype, *device) == text


@pytest.mark.parametrize(
    "options, device, able",
    [
        ({}, ("gpu", "9.0"), True),
        ({}, ("gpu", ""), True),  # an absent one
        ({"dtype": "bfloat16"}, ("gpu", "7.5"), False),
        ({"query_blocks": 2}, ("gpu", "9.0"), False),
        ({"d_model": 2 * 136}, ("gpu", "9.0"), False),
        ({}, ("tpu", ""), False),
        ({}, ("cpu", ""), False),
    ],
)
def test_cudnn_attends_where_it_can(options, device, able, monkeypatch):
    config = ModelConfig(**{"n_head": 2, "d_model": 32} | options)
    monkeypatch.setattr(execution, "first_device", lambda mesh: device)
    monkeypatch.setattr(execution, "attend_by_cudnn", lambda *qkv: qkv[0])
    assert resolve_execution(config).attention == ("cudnn" if able else "plain")

    def missing(*qkv):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(execution, "attend_by_cudnn", missing)
    assert resolve_execution(config).attention == "plain"


def test_this_device_is_a_cpu():
    assert devices.first_device() == ("cpu", "")
    here = Execution(None, True, "float32", "nothing", True, 1, "plain")
    assert resolve_execution(ModelConfig()) == here
    assert resolve_execution(ModelConfig(dtype="bfloat16")) == replace(here, dtype="bfloat16")
    assert resolve_execution(ModelConfig(dtype="bfloat16"), dtype="float32") == here


def test_the_devices_are_those_of_the_mesh(monkeypatch):
    """They may be others than this machine's, and settings that are not "auto" stay as they are."""
    mesh = make_mesh(MeshConfig(data=1))
    monkeypatch.setattr(execution, "first_device", lambda of: ("tpu" if of is mesh else "cpu", ""))
    there = Execution(mesh, False, "bfloat16", "elementwise", False, 1, "plain")
    assert resolve_execution(ModelConfig(), mesh) == there
    config = ModelConfig(remat="block", unroll="yes", query_blocks=4)
    assert resolve_execution(config, mesh) == replace(there, remat="block", unroll=True, query_blocks=4)
    config = ModelConfig(remat="block", unroll="no", dtype="float32")
    changed = replace(there, mesh=None, on_cpu=True, remat="block", dtype="float32")
    assert resolve_execution(config) == changed


@pytest.mark.skipif(os.cpu_count() < 2 or not os.path.isdir("/proc/self/task"), reason="two cores, Linux")
def test_deterministic_runs_have_one_thread_for_products():
    """Whether more threads give other bits depends on the CPU; how many there are does not."""
    code = """
import os, sys
os.sched_setaffinity(0, range(os.cpu_count()))
from gpt_jax.parallel import devices, execution
from gpt_jax.parallel.execution import Execution, resolve_execution
from gpt_jax.parallel.mesh import make_mesh
if sys.argv[1] == "deterministic":
    devices.make_deterministic()
import jax
(jax.numpy.ones((9, 9)) @ jax.numpy.ones((9, 9))).block_until_ready()
print(len(os.listdir("/proc/self/task")))
"""

    def n_threads(which):
        command = [sys.executable, "-c", code, which]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert n_threads("deterministic") <= n_threads("all") - (os.cpu_count() - 1)
