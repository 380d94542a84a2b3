"""Checkpoints: Orbax behind one small face. Knows no model, only named trees of arrays."""

import math
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gpt_jax.errors import UserError

METADATA = "metadata"  # the item that holds JSON; every other item holds arrays


class Checkpoints:
    """The checkpoints of one run: the last two, and the best by validation loss.

    A checkpoint is a folder named by its step, with one item (arrays) for each tree and one of JSON.
    Saving goes on in the background; `close` waits for it.
    """

    def __init__(self, folder: Path, clean: bool):
        """Open `folder`, which need not exist before the first save.

        Args:
            folder: holds a folder for each step.
            clean: remove what a kill left half written. Only for who trains: another process would
                take a save that is under way for a leftover.
        """
        self.folder = folder.absolute()  # Orbax wants absolute paths
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=clean,
                best_fn=_quality,
                best_mode="max",
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(2),
                        policies.BestN(get_metric_fn=_quality, n=1),
                    ]
                ),
            ),
        )

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, rising."""
        return sorted(self._manager.all_steps())

    def find(self, which: str) -> int:
        """The step of the "last" or the "best" checkpoint.

        Raises:
            UserError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.folder}: train a model first")
        # Before the first evaluation all are equally good, and Orbax takes the last one.
        best = self._manager.best_step() if which == "best" else None
        return steps[-1] if best is None else best

    def save(
        self, step: int, items: dict[str, Any], metadata: dict[str, Any], val_loss: float | None
    ) -> None:
        """Begin to save; returns when the arrays may change again. A step once saved stays.

        Args:
            step: updates done.
            items: trees of arrays by name.
            metadata: anything that JSON can hold.
            val_loss: what "best" goes by; None: this checkpoint is no candidate.
        """
        if step in self._manager.all_steps():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(**arrays, **{METADATA: ocp.args.JsonSave(metadata)}),
            metrics={"val_loss": val_loss},
        )

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given as metadata."""
        args = ocp.args.Composite(**{METADATA: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=args)[METADATA]

    def restore(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Read items back.

        Args:
            step: which checkpoint.
            targets: for each item a tree of `jax.ShapeDtypeStruct`; arrays come back in its shapes,
                types and shardings, whatever they were when saved.
        """
        arrays = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arrays))
        return {name: restored[name] for name in targets}

    def wait(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go."""
        self.wait()
        self._manager.close()


def _quality(metrics: dict[str, float | None]) -> float:
    """What "best" is the highest of; no candidate are checkpoints without a loss, or with NaN for one."""
    val_loss = metrics["val_loss"]
    return -val_loss if val_loss is not None and math.isfinite(val_loss) else -math.inf
