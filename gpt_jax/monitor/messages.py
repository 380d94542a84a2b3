"""What training prints, as text."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.monitor.metrics import Record, best_record, deciding_loss, validated
from gpt_jax.monitor.terminal import show_time

LONG = 30 * 60  # seconds


def describe_run(
    device: str, model: ModelConfig, n_params: int, text: str, sizes: tuple[int, int, int], workdir: str
) -> str:
    """The first lines: the device, the model, the data, and the run's folder.

    Args:
        device: of the computation, in words.
        model: the settings of the model.
        n_params: its parameters.
        text: the name of the text file.
        sizes: tokens in the training split and in the validation split, and V.
        workdir: the run's folder.
    """
    n_train, n_val, vocab_size = sizes
    return "\n".join(
        [
            f"device  {device}",
            f"model   {n_params:,} parameters: {model.n_layer} layers, {model.n_head} heads, "
            f"width {model.d_model}, context {model.context}",
            f"data    {text}: {n_train:,} tokens train, {n_val:,} validate, vocabulary of {vocab_size}",
            f"run     {workdir}/: config.json run.json metrics.jsonl loss.png samples.txt checkpoints/",
        ]
    )


def describe_time(seconds_left: float, advice: str) -> str:
    """How long training will take, with advice if that is long."""
    text = f"time    about {show_time(seconds_left)} from here to the end, evaluations included"
    return text + (f"; {advice}" if advice and seconds_left > LONG else "")


def describe_steps(steps: int, most: int, minutes: float, per_step: float, per_evaluation: float) -> str:
    """How many steps fit into the time that was asked for."""
    how_many = f"{steps:,} of {most:,} steps fit" if steps < most else f"all {most:,} steps fit"
    return (
        f"steps   {how_many} into {minutes:g} min: {per_step:.3g} s for a step, "
        f"{per_evaluation:.1f} s for an evaluation"
    )


def describe_too_short(minutes: float, needed: float, steps: int) -> str:
    """For a run that cannot end in time; `needed`: the seconds that `steps` steps would take."""
    return (
        f"--minutes = {minutes:g} is too short here: the run needs at least {steps:,} steps (twice "
        f"optimizer.warmup_steps), which take {show_time(needed)}; use --minutes "
        f"{math.ceil(needed / 60)} or a smaller model"
    )


def describe_evaluation(record: Record, part: int) -> str:
    """One line of losses. The training loss is the mean over the newest batches, with dropout.

    Args:
        record: the numbers of the step.
        part: the tokens that "val_loss_part" is about.
    """
    losses = [f"training batches {record['train_loss']:.4f}"]
    if "val_loss_part" in record:
        losses.append(f"first {part:,} tokens of the validation split {record['val_loss_part']:.4f}")
    if "val_loss" in record:
        bits = f"({record['val_bpc']:.3f} bits per character)"
        losses.append(f"whole validation split {record['val_loss']:.4f} {bits}")
    gap = (deciding_loss(record) or math.nan) - record["train_loss"]
    return f"step {record['step']:,}: {', '.join(losses)}, gap {gap:+.4f}, {show_time(record['seconds'])}"


def describe_patience(patience: int) -> str:
    """For a run that `train.patience` ends."""
    evaluations = "evaluation" if patience == 1 else "evaluations"
    return f"stopping early: no new best validation loss in {patience} {evaluations} (train.patience)"


def describe_spike(step: int, loss: float, recent: Sequence[float], grad_norm: float) -> str:
    """For a loss far above those before it."""
    return (
        f"step {step:,}: loss {loss:.4f} is far above the mean {float(np.mean(recent)):.4f} of the "
        f"{len(recent)} before it; gradient norm {grad_norm:.3g}"
    )


def describe_skip(step: int, grad_norm: float, factor: float) -> str:
    """For an update that `optimizer.skip_grad_norm_factor` skipped."""
    return f"step {step:,}: update skipped: gradient norm {grad_norm:.3g}, above {factor:g} times the median"


def describe_not_finite(
    step: int, loss: float, grad_norm: float, grad_norms: Mapping[str, float], finite: Mapping[str, bool]
) -> str:
    """For a step whose loss, gradient or update would be NaN or infinite.

    Args:
        step: its number.
        loss, grad_norm: of the step.
        grad_norms: the gradient norm of each array, by its name.
        finite: whether the update of each array is finite.
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
        f"is saved. The same command would fail again: start another run with a lower learning rate, or a "
        f"smaller optimizer.clip_norm"
    )


def describe_bad_evaluation(step: int, val_loss: float, saved_step: int) -> str:
    """For a validation loss that is NaN or infinite."""
    return (
        f"step {step:,}: the validation loss is {val_loss}; the newest checkpoint is that of step "
        f"{saved_step:,}. Start another run with a lower learning rate"
    )


def describe_end(records: list[Record], seconds: float, sample_command: str) -> str:
    """The last line of a finished run, from its metrics and the seconds since its process started."""
    last, best = validated(records)[-1], best_record(records)
    part = " (the lowest on the part that was evaluated)" if "val_loss_part" in best else ""
    return (
        f"done in {show_time(seconds)}: validation loss {last['val_loss']:.4f}, best "
        f"{best.get('val_loss', math.nan):.4f} at step {best['step']:,}{part}. To sample: {sample_command}"
    )


def describe_stop(signal_name: str, step: int, steps: int, sample_command: str) -> str:
    """The last line of a run that a signal stopped."""
    return (
        f"stopped by {signal_name}; saved after step {step:,} of {steps:,}. The same command resumes it. "
        f"To sample: {sample_command}"
    )


def describe_stop_before_start(signal_name: str) -> str:
    """The last line of a run that a signal stopped before there was a state to save."""
    return f"stopped by {signal_name} before the first step. The same command starts again"


def describe_finished(step: int, steps: int, how_longer: str, sample_command: str) -> str:
    """For a run that has nothing left to do; `how_longer`: what would make it go on."""
    return (
        f"this run is finished: {step:,} of {steps:,} steps are done. To train longer, {how_longer}. "
        f"To sample: {sample_command}"
    )
