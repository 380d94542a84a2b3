"""What training says to a person, as text."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.backend import Dtype, describe_devices, describe_dtype, first_device, has_cudnn_attention
from gpt_jax.config import ARTIFACTS, REPOSITORY, Config
from gpt_jax.corpus import Corpus
from gpt_jax.metrics import Record, best_record, show_time
from gpt_jax.params import name_leaves

LONG_ON_A_CPU = 30 * 60  # seconds; whoever waits longer should know of the small recipe


def describe_run(
    config: Config, dtype: Dtype, workdir: Path, corpus: Corpus, mesh_shape: Any, n_params: int
) -> str:
    """The first lines: the device, the model, the data, and where things go."""
    model = config.model
    mesh = " x ".join(f"{size} {axis}" for axis, size in mesh_shape.items())
    fused = not model.attention_dropout and has_cudnn_attention(replace(model, dtype=dtype), *first_device())
    return "\n".join(
        [
            f"device  {describe_devices()}, mesh {mesh}, {describe_dtype(dtype, *first_device())}, "
            f"{'attention by cuDNN, ' if fused else ''}jax {jax.__version__}",
            f"model   {n_params:,} parameters: {model.n_layer} layers, {model.n_head} heads, "
            f"width {model.d_model}, context {model.context}",
            f"data    {_short(config.data.file)}: {len(corpus.train):,} characters train, "
            f"{len(corpus.val):,} validate, {corpus.tokenizer.vocab_size} distinct",
            f"run     {_short(workdir)}/: config.json metrics.jsonl loss.png samples.txt checkpoints/",
        ]
    )


def promise_time(seconds_left: float) -> str:
    """How long it will take here, and what to do where that is too long."""
    text = f"time    about {show_time(seconds_left)} of training here, evaluation apart"
    if jax.default_backend() == "cpu" and seconds_left > LONG_ON_A_CPU:
        text += "; on a CPU, configs/shakespeare_cpu.py takes minutes"
    return text


def describe_evaluation(record: Record) -> str:
    """One line of losses. The training loss is that of the newest batches, with dropout on."""
    train_loss, val_loss = record["train_loss"], record["val_loss"]
    return (
        f"step {record['step']:,}: training batches {train_loss:.4f}, whole validation split {val_loss:.4f} "
        f"({record['val_bpc']:.3f} bits per character), gap {val_loss - train_loss:+.4f}, "
        f"{show_time(record['seconds'])}"
    )


def describe_spike(step: int, loss: float, recent: Sequence[float], grad_norm: float) -> str:
    """For a loss that stands out of those before it."""
    return (
        f"step {step:,}: loss {loss:.4f} stands out of the {len(recent)} before it (mean "
        f"{float(np.mean(recent)):.4f}); gradient norm {grad_norm:.3g}"
    )


def describe_skip(step: int, grad_norm: float, factor: float) -> str:
    """For an update that `optimizer.skip_above` left out."""
    return f"step {step:,}: update left out: gradient norm {grad_norm:.3g}, above {factor:g} times the median"


def describe_not_finite(step: int, loss: float, grad_norm: float, grad_norms: Any, finite: Any) -> str:
    """For a step whose loss, gradient or update is NaN or infinite."""
    norms = name_leaves(grad_norms)
    bad = [f"{name} {norm}" for name, norm in norms.items() if not np.isfinite(norm)]
    spoiled = [name for name, is_finite in name_leaves(finite).items() if not is_finite]
    what = f"the gradient norm is {grad_norm:.4g}"
    if bad:
        what = f"the gradient norm is not finite of {', '.join(bad)}"
    elif np.isfinite(loss) and np.isfinite(grad_norm):
        what += f", and the update would make {', '.join(spoiled)} not finite"
    return (
        f"step {step:,}: the loss is {loss:.4g}, and {what}"
        f". The state before it, after step {step - 1:,}, is saved. The same command comes to the same "
        f"end: start another run with a lower learning rate, or a smaller optimizer.clip_norm"
    )


def describe_bad_evaluation(step: int, val_loss: float, saved_step: int) -> str:
    """For a validation loss that is NaN or infinite."""
    return (
        f"step {step:,}: the validation loss is {val_loss}; this state is not saved, the newest checkpoint, "
        f"of step {saved_step:,}, is kept. Start another run with a lower learning rate"
    )


def describe_end(records: list[Record], seconds: float, workdir: Path) -> str:
    """The last line of a finished run, from its metrics and the seconds since its process started."""
    validated = [record for record in records if "val_loss" in record]
    last, best = validated[-1], best_record(validated)
    return (
        f"done in {show_time(seconds)}: validation loss {last['val_loss']:.4f}, best "
        f"{best['val_loss']:.4f} at step {best['step']:,}. To sample: {sample_command(workdir)}"
    )


def describe_stop(signal_name: str, step: int, steps: int, workdir: Path) -> str:
    """The last line of a run that a signal stopped."""
    return (
        f"stopped by {signal_name}; saved after step {step:,} of {steps:,}. The same command goes on. "
        f"To sample: {sample_command(workdir)}"
    )


def describe_finished(step: int, steps: int, workdir: Path) -> str:
    """For a run that has nothing left to do."""
    return (
        f"this run is finished: {step:,} of {steps:,} steps are done. To train on, raise "
        f"--config.train.steps. To sample: {sample_command(workdir)}"
    )


def sample_command(workdir: Path) -> str:
    """The command that samples from a run."""
    found_by_itself = workdir.absolute().parent == ARTIFACTS
    return "python sample.py" + ("" if found_by_itself else f" --workdir {shlex.quote(str(workdir))}")


def _short(path: Path) -> str:
    """A path as a person would name it: from the repository where it lies there."""
    path = path.absolute()
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)
