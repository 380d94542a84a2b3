"""The longer messages of training."""

import math
from collections.abc import Mapping

import numpy as np

from gpt_jax.monitor.terminal import show_time
from gpt_jax.records import Record, selection_loss


def describe_evaluation(record: Record, part: int) -> str:
    """One line of losses; "val_loss_part" is about `part` tokens, and "train_loss" has dropout."""
    losses = [f"training batches {record['train_loss']:.4f}"]
    if "val_loss_part" in record:
        losses.append(f"first {part:,} tokens of the validation split {record['val_loss_part']:.4f}")
    if "val_loss" in record:
        bits = f" ({record['val_bpc']:.3f} bits per character)" if "val_bpc" in record else ""
        losses.append(f"whole validation split {record['val_loss']:.4f}{bits}")
    gap = (selection_loss(record) or math.nan) - record["train_loss"]
    return f"step {record['step']:,}: {', '.join(losses)}, gap {gap:+.4f}, {show_time(record['seconds'])}"


def describe_not_finite(
    step: int, loss: float, grad_norm: float, grad_norms: Mapping[str, float], finite: Mapping[str, bool]
) -> str:
    """The error of a step whose loss, gradient or update would be NaN or infinite.

    Args:
        step, loss, grad_norm: the step, its loss and its global gradient norm.
        grad_norms, finite: by array, the gradient norm, and whether the update is finite.
    """
    bad = [f"{name} {norm}" for name, norm in grad_norms.items() if not np.isfinite(norm)]
    what = f"the gradient norm is {grad_norm:.4g}"
    if bad:
        what = f"the gradient norm is not finite for {', '.join(bad)}"
    elif np.isfinite(loss) and np.isfinite(grad_norm):
        names = ", ".join(name for name, is_finite in finite.items() if not is_finite)
        what += f", and the update would make {names} not finite"
    return (
        f"step {step:,}: the loss is {loss:.4g}, and {what}. The state before it, after step {step - 1:,}, "
        f"is saved. Resuming it would fail again: start another run with a lower learning rate, or a "
        f"smaller optimizer.clip_norm"
    )
