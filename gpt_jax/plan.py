"""The plan: all settings of a run, or of a trained model, resolved for this machine.

Settings leave choices open: "auto", 0 for "as suits the hardware", an empty path. `make_plan` makes these
choices, and training, evaluation, sampling, export and `compile` take the plan (see docs/code.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt_jax.config import Config, Dtype, TrainConfig, check_batch_split
from gpt_jax.parallel.devices import describe_devices, describe_dtype, first_device
from gpt_jax.parallel.execution import Execution, resolve_execution
from gpt_jax.parallel.mesh import count_shards, make_mesh
from gpt_jax.paths import expand, text_file
from gpt_jax.storage.metadata import Metadata

CPU_TOKENS = 1024  # about the fastest micro-batch on two CPU cores; 256 to 16,384 tokens were tried


@dataclass(frozen=True)
class Plan:
    """Settings, devices and length of a run, resolved before anything is computed."""

    # The settings as a checkpoint stores them: `train.grad_accum_steps` filled in, paths absolute. What is
    # "auto" in `config.model` stays so, since each device that reads the checkpoint resolves it anew.
    config: Config
    execution: Execution  # how the model is computed, and on which devices: every "auto" resolved
    steps: int  # updates of the whole run
    steps_were_chosen: bool  # by --minutes
    text: Path  # the text file

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        assert self.execution.mesh is not None
        return self.execution.mesh

    @property
    def micro_batch_size(self) -> int:
        """Windows that are computed at once, in training and in evaluation."""
        return self.config.train.batch_size // self.config.train.grad_accum_steps

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON, for run.json."""
        return {
            "device": describe_devices(self.mesh),
            "mesh": dict(self.mesh.shape),
            "dtype": self.execution.dtype,
            "attention": "cudnn" if self._is_fused else "plain",
            "remat": self.execution.remat,
            "unroll": self.execution.unroll,
            "query_blocks": self.execution.query_blocks,
            "micro_batch_size": self.micro_batch_size,
            "grad_accum_steps": self.config.train.grad_accum_steps,
            "steps": self.steps,
            "steps_were_chosen": self.steps_were_chosen,
            "text": str(self.text),
        }

    def describe(self) -> str:
        """The devices, the mesh, the precision and the attention, in words."""
        mesh = " x ".join(f"{size} {axis}" for axis, size in self.mesh.shape.items())
        dtype = describe_dtype(self.execution.dtype, *first_device(self.mesh))
        fused = ", attention by cuDNN" if self._is_fused else ""
        return f"{describe_devices(self.mesh)}, mesh {mesh}, {dtype}{fused}"

    @property
    def _is_fused(self) -> bool:
        """Whether training computes attention by cuDNN."""
        return self.execution.attention == "cudnn" and not self.config.model.attention_dropout


def make_plan(
    config: Config, saved: Metadata | None = None, devices: Sequence[jax.Device] | None = None
) -> Plan:
    """The plan of a run, or of a trained model, on `devices` (None: all of them).

    A run that resumes from a checkpoint with the metadata `saved` keeps the precision, the length and the
    micro-batches that it began with, unless the settings name others, or these devices cannot share such a
    micro-batch equally.

    Raises:
        UserError: the devices do not fit `config.mesh`, or cannot share a batch or the model equally.
    """
    config.check_mesh()
    mesh, text, train, steps = make_mesh(config.mesh, devices), text_file(config.data), config.train, None
    n_shards = count_shards(mesh)
    if saved and not train.grad_accum_steps:
        before = saved.config.train.grad_accum_steps
        if before and train.batch_size % (before * n_shards) == 0:
            train = replace(train, grad_accum_steps=before)
    if saved and train.steps == saved.config.train.steps:
        steps = saved.total_steps
    size = micro_batch_size(train, config.model.context, n_shards, first_device(mesh)[0])
    train = replace(train, grad_accum_steps=train.batch_size // size)
    # An empty path stays empty: it means the default text, wherever the repository is.
    data = replace(config.data, path=str(text)) if config.data.path else config.data
    dtype = _dtype_of(saved) if saved and config.model.dtype == "auto" else None
    execution = resolve_execution(config.model, mesh, dtype)
    init_from = str(expand(config.init_from).absolute()) if config.init_from else ""
    config = replace(config, train=train, data=data, init_from=init_from)
    return Plan(config, execution, steps or train.steps, bool(steps), text)


def micro_batch_size(train: TrainConfig, context: int, n_shards: int, platform: str) -> int:
    """Windows of `context` tokens in a micro-batch that `n_shards` devices share.

    Raises:
        UserError: they cannot share it equally.
    """
    # mesh.data = 1 always works: mesh.fsdp alone was checked with the settings.
    check_batch_split(train, n_shards, f"{n_shards} devices", "or fewer devices with --config.mesh.data=1")
    size = train.batch_size // max(train.grad_accum_steps, 1)
    if train.grad_accum_steps or platform != "cpu":
        return size
    fitting = max(CPU_TOKENS // context, 1) * n_shards
    return max(n for n in range(n_shards, fitting + 1, n_shards) if size % n == 0)


def describe_precision(plan: Plan, saved: Metadata) -> str | None:
    """A message about the precision of a resumed run, where it may surprise; else None."""
    now, before = plan.execution.dtype, _dtype_of(saved)
    here = resolve_execution(plan.config.model, plan.mesh).dtype  # of a new run
    if before is None:
        return f"the checkpoint does not record its precision: continuing in {now}"
    if before != now:
        return f"precision changes from {before} to {now}, as model.dtype says"
    if now != here:
        return (
            f"keeping {now}, the precision of the checkpoint; a new run on this device would use {here} "
            f"(--config.model.dtype={here} switches)"
        )
    return None


def _dtype_of(saved: Metadata) -> Dtype | None:
    """The precision of a run so far; None where its checkpoint does not record it."""
    setting = saved.config.model.dtype
    return saved.compute_dtype or (None if setting == "auto" else setting)
