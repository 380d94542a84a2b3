"""Resume a run: restore its newest good checkpoint, if that belongs to the same run."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.config import Config, flatten
from gpt_jax.errors import RunError, UserError
from gpt_jax.model.layers import Params
from gpt_jax.model.params import with_sharding
from gpt_jax.storage.checkpoints import Checkpoints, read_metadata
from gpt_jax.storage.integrity import DamagedError
from gpt_jax.storage.metadata import Metadata
from gpt_jax.training.state import TrainState

# Settings that a resumed run may change. Most change a step by rounding at most. The others do what the user
# asks for: train.steps stretches the schedule; model.dtype changes the precision; train.grad_accum_steps, and
# with attention_dropout model.query_blocks, change the dropout masks. The fingerprint guards data.path and
# data.tokenizer.
SAFE_TO_CHANGE = (
    "data.batches",
    "data.path",
    "data.tokenizer",
    "mesh.",
    "model.dtype",
    "model.query_blocks",
    "model.remat",
    "model.unroll",
    "train.grad_accum_steps",
    "train.eval_every",
    "train.log_every",
    "train.patience",
    "train.profile_steps",
    "train.sample_length",
    "train.save_minutes",
    "train.steps",
    "train.tensorboard",
    "train.wandb",
)


def restore_newest(
    checkpoints: Checkpoints, target: TrainState, config: Config, fingerprint: str, workdir: Path
) -> tuple[Metadata, TrainState]:
    """Read the newest good checkpoint of a run, to continue with `config` and the text of `fingerprint`.

    Damaged ones that are newer are named and set aside. `target`: shapes, types and shardings of the state.

    Raises:
        UserError: it is a run with other settings or another text, or of a version that cannot be read.
        RunError: all checkpoints are damaged, or a good one cannot be read here.
    """

    def read(step: int) -> tuple[Metadata, TrainState]:
        # Its checksums are right. If it cannot be read now, it is not damaged and must not be set aside.
        try:
            metadata = read_metadata(checkpoints, step)
            _check_same_run(metadata, config, fingerprint, workdir)
            items = checkpoints.restore(step, state_items(target))
        except (DamagedError, OSError) as error:
            raise RunError(f"{error}. Its checksums are right, so nothing was changed") from None
        step_array = jax.device_put(np.int32(step), target.step.sharding)
        state = TrainState(step_array, items["params"], items["opt_state"])
        return metadata, state

    newest_first = checkpoints.steps()[::-1]
    restored, damaged = checkpoints.first_good(lambda: newest_first, read)
    for step in damaged:
        print(f"WARNING: the damaged checkpoint is kept as {checkpoints.set_aside(step)}")
    return restored


def restore_params(checkpoints: Checkpoints, step: int, like: TrainState) -> Params:
    """The parameters of the model of a checkpoint, in the shapes and shardings of those of a state.

    Raises:
        DamagedError: the checkpoint cannot be read.
    """
    checkpoints.verify(step)
    target = jax.tree.map(lambda leaf: with_sharding(leaf, leaf.sharding), like.params)
    params = checkpoints.restore(step, {"params": target})["params"]
    return like.replace(params=params).model_params


def state_items(state: TrainState) -> dict[str, Any]:
    """The state as items of a checkpoint. The step is the checkpoint's name."""
    return {"params": state.params, "opt_state": state.opt_state}


def _check_same_run(metadata: Metadata, config: Config, fingerprint: str, workdir: Path) -> None:
    old, new = flatten(metadata.config), flatten(config)
    for key, value in new.items():
        if value != old[key] and not key.startswith(SAFE_TO_CHANGE):
            raise UserError(
                f"{workdir} holds a run with {key} = {old[key]!r}, not {value!r}: "
                f"keep it, or start another run with another --workdir"
            )
    if metadata.fingerprint != fingerprint:
        was, now = old["data.tokenizer"] or "char", new["data.tokenizer"] or "char"
        if was != now:
            raise UserError(
                f"{workdir} holds a run with data.tokenizer = {was!r}, not {now!r}: keep it, or "
                f"start another run with another --workdir"
            )
        raise UserError(
            f"{workdir} was trained on another text than {config.data.path or 'the default text'}: "
            f"fingerprint {metadata.fingerprint[:12]} then, {fingerprint[:12]} now; restore the old text, or "
            f"start another run with another --workdir"
        )
