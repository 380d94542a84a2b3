"""Resume a run: restore its newest good checkpoint, if that belongs to the same run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.config import Config, Dtype, flatten
from gpt_jax.data.batches import micro_batch_size
from gpt_jax.errors import RunError, UserError
from gpt_jax.model.layers import Params
from gpt_jax.parallel.devices import resolve_dtype
from gpt_jax.parallel.mesh import count_shards, platform_of
from gpt_jax.storage.checkpoints import Checkpoints, read_metadata
from gpt_jax.storage.format import array_names, current_array_names
from gpt_jax.storage.integrity import DamagedError
from gpt_jax.storage.metadata import Metadata
from gpt_jax.training.state import TrainState

# Settings that a resumed run may change. Most change a step by rounding at most. The others do what the user
# asks for: train.steps stretches the schedule; model.dtype changes the precision; train.grad_accum_steps, and
# with attention_dropout model.query_blocks, change the dropout masks. The fingerprint guards data.path.
SAFE_TO_CHANGE = (
    "data.path",
    "mesh.",
    "model.dtype",
    "model.query_blocks",
    "model.remat",
    "model.unroll",
    "train.grad_accum_steps",
    "train.eval_every",
    "train.log_every",
    "train.patience",
    "train.sample_length",
    "train.save_minutes",
    "train.steps",
    "train.tensorboard",
)


def restore_newest(
    checkpoints: Checkpoints, target: TrainState, config: Config, fingerprint: str, workdir: Path
) -> tuple[Metadata, TrainState]:
    """Read the newest good checkpoint; damaged ones that are newer are named and set aside.

    Args:
        checkpoints: of the run; there is at least one.
        target: shapes, types and shardings of the state.
        config, fingerprint: the settings and the text to continue with.
        workdir: the run, for messages.

    Raises:
        UserError: it is a run with other settings or another text, or of a version that cannot be read.
        RunError: all checkpoints are damaged, or a good one cannot be read here.
    """

    def read(step: int) -> tuple[Metadata, TrainState]:
        # Its checksums are right. If it cannot be read now, it is not damaged and must not be set aside.
        try:
            metadata = read_metadata(checkpoints, step)
            _check_same_run(metadata, config, fingerprint, workdir)
            stored = {
                name: array_names(tree, metadata.format_version) for name, tree in state_items(target).items()
            }
            items = current_array_names(checkpoints.restore(step, stored), metadata.format_version)
        except DamagedError as error:
            raise RunError(f"{error}. Its checksums are right, so nothing was changed") from None
        step_array = jax.device_put(np.int32(step), target.step.sharding)
        state = TrainState(step_array, items["params"], items["opt_state"], items.get("ema_params"))
        return metadata, state

    newest_first = checkpoints.steps()[::-1]
    restored, damaged = checkpoints.first_good(lambda: newest_first, read)
    for step in damaged:
        print(f"WARNING: the damaged checkpoint is kept as {checkpoints.set_aside(step)}")
    return restored


def restore_eval_params(checkpoints: Checkpoints, step: int, like: TrainState) -> Params:
    """The parameters of a checkpoint to evaluate with, in the shapes and shardings of a state.

    Raises:
        DamagedError: the checkpoint cannot be read.
    """
    checkpoints.verify(step)
    item = "params" if like.ema_params is None else "ema_params"
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like.eval_params
    )
    version = read_metadata(checkpoints, step).format_version
    restored = checkpoints.restore(step, {item: array_names(target, version)})[item]
    return current_array_names(restored, version)


def resolve(config: Config, mesh: jax.sharding.Mesh, saved: Metadata | None = None) -> Config:
    """Settings with `train.grad_accum_steps` chosen: as the run had it so far, or as suits the devices.

    Raises:
        UserError: the devices cannot share a batch equally.
    """
    train = config.train
    if not train.grad_accum_steps and saved:
        train = replace(train, grad_accum_steps=saved.config.train.grad_accum_steps)
    size = micro_batch_size(train, config.model.context, count_shards(mesh), platform_of(mesh))
    return replace(config, train=replace(train, grad_accum_steps=train.batch_size // size))


def resolve_run_dtype(config: Config, saved: Metadata | None = None) -> tuple[Dtype, str | None]:
    """The type of the activations in a run: that of its checkpoint, unless the settings name another.

    Args:
        config: the settings.
        saved: of the checkpoint to resume from; None for a new run.

    Returns:
        "float32" or "bfloat16", and a message for the terminal or None.
    """
    here = resolve_dtype(config.model.dtype)
    if saved is None:
        return here, None
    before = saved.compute_dtype
    if before is None and saved.config.model.dtype != "auto":
        before = saved.config.model.dtype
    if before is None:
        return here, f"the checkpoint does not record its precision: continuing in {here}"
    if before == here:
        return here, None
    if config.model.dtype == "auto":
        return before, (
            f"keeping {before}, the precision of the checkpoint; a new run on this device would use {here} "
            f"(--config.model.dtype={here} switches)"
        )
    return here, f"precision changes from {before} to {here}, as model.dtype says"


def state_items(state: TrainState) -> dict[str, Any]:
    """The state as items of a checkpoint. The step is the checkpoint's name."""
    items = {"params": state.params, "opt_state": state.opt_state}
    if state.ema_params is not None:
        items["ema_params"] = state.ema_params
    return items


def _check_same_run(metadata: Metadata, config: Config, fingerprint: str, workdir: Path) -> None:
    old, new = flatten(metadata.config), flatten(config)
    for key, value in new.items():
        if value != old[key] and not key.startswith(SAFE_TO_CHANGE):
            raise UserError(
                f"{workdir} holds a run with {key} = {old[key]!r}, not {value!r}: "
                f"keep it, or start another run with another --workdir"
            )
    if metadata.fingerprint != fingerprint:
        raise UserError(
            f"{workdir} was trained on another text than {config.data.path or 'the default text'}: "
            f"fingerprint {metadata.fingerprint[:12]} then, {fingerprint[:12]} now; restore the old text, or "
            f"start another run with another --workdir"
        )
