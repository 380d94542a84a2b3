"""What a run goes on from: the newest state that is whole, if it is one of the same run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.backend import Dtype, resolve_dtype
from gpt_jax.batches import micro_batch_size
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import Config, flatten
from gpt_jax.errors import RunError, UserError
from gpt_jax.integrity import DamagedError
from gpt_jax.metadata import Metadata, read_metadata
from gpt_jax.sharding import count_shards, platform_of
from gpt_jax.train_state import TrainState

# Settings that a resumed run may change: they move a step by rounding at most. Exceptions are asked for:
# train.steps stretches the schedule; model.dtype changes the precision; train.accumulate, and with
# attention_dropout model.query_blocks, draw other dropout masks. The text behind data.path is held by its
# fingerprint.
SAFE_TO_CHANGE = (
    "data.path",
    "mesh.",
    "model.dtype",
    "model.query_blocks",
    "model.remat",
    "model.unroll",
    "train.accumulate",
    "train.eval_every",
    "train.log_every",
    "train.sample_length",
    "train.save_minutes",
    "train.steps",
    "train.tensorboard",
)


def restore_newest(
    checkpoints: Checkpoints, target: TrainState, config: Config, fingerprint: str, workdir: Path
) -> tuple[Metadata, TrainState]:
    """Read the newest state that is whole; damaged ones newer than it are named and set aside.

    Args:
        checkpoints: of the run; there is at least one.
        target: shapes, types and shardings of the state.
        config, fingerprint: the settings and the text to go on with.
        workdir: the run, for messages.

    Raises:
        UserError: it is a run with other settings or another text.
        RunError: no checkpoint is whole, or a whole one cannot be read here.
    """

    def read(step: int) -> tuple[Metadata, TrainState]:
        # Its checksums are right: what cannot be read now is not damaged, and must not be set aside.
        try:
            metadata = read_metadata(checkpoints, step)
            _check_same_run(metadata, config, fingerprint, workdir)
            items = checkpoints.restore(step, state_items(target))
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


def settle(config: Config, mesh: jax.sharding.Mesh, saved: Metadata | None = None) -> Config:
    """Settle what the settings leave open, as the run so far did, so that a checkpoint says what was done.

    Raises:
        UserError: the devices cannot share a batch.
    """
    train = config.train
    if not train.accumulate and saved:
        train = replace(train, accumulate=saved.config.train.accumulate)
    size = micro_batch_size(train, config.model.context, count_shards(mesh), platform_of(mesh))
    train = replace(train, accumulate=train.batch_size // size)
    # Wherever the run is read again from, its text is where it is now.
    path = str(config.data.file) if config.data.path else ""
    return replace(config, train=train, data=replace(config.data, path=path))


def resolve_run_dtype(config: Config, saved: Metadata | None = None) -> tuple[Dtype, str | None]:
    """The type that a run computes in: that of its checkpoint, unless the settings name another.

    Args:
        config: the settings.
        saved: of the checkpoint to go on from; None for a new run.

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
    """The state as the items of a checkpoint; the step is the checkpoint's own."""
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
            f"{workdir} was trained on another text than {config.data.file} is now: "
            f"fingerprint {metadata.fingerprint[:12]}, now {fingerprint[:12]}; "
            f"give back the old text, or start another run with another --workdir"
        )
