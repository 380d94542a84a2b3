"""One run of training: restore or begin, train, report."""

import math
import shlex
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.commands.paths import ARTIFACTS, command, relative_to_root, text_file
from gpt_jax.commands.session import Run, Session
from gpt_jax.commands.signals import StopRequest, stop_signals
from gpt_jax.config import Config
from gpt_jax.data.corpus import load_corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.files import write_durably
from gpt_jax.interchange.model_folder import is_exported
from gpt_jax.model.params import abstract_params, count_params
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.messages import (
    describe_end,
    describe_finished,
    describe_run,
    describe_stop,
    describe_stop_before_start,
)
from gpt_jax.monitor.metrics import TensorBoard, read_metrics
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.parallel.devices import (
    check_backend,
    describe_devices,
    describe_dtype,
    first_device,
    has_cudnn_attention,
)
from gpt_jax.parallel.mesh import make_mesh, replicated
from gpt_jax.rng import INIT_STREAM, stream
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.compilation_cache import compiling
from gpt_jax.storage.lock import locked
from gpt_jax.storage.metadata import Metadata, library_versions
from gpt_jax.storage.run_folder import CONFIG, METRICS, checkpoint_folder
from gpt_jax.training.loop import MAX_STEPS_PER_CALL, Moment, Program, Stopped
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.resume import resolve, resolve_run_dtype, restore_newest
from gpt_jax.training.state import TrainState, abstract_state, init_state
from gpt_jax.training.step import make_train_steps


def train(config: Config, workdir: Path, started: float | None = None, minutes: float | None = None) -> int:
    """Train, or resume, the run in `workdir`.

    Args:
        config: the settings.
        workdir: for config.json, run.json, metrics.jsonl, loss.png, samples.txt and checkpoints/.
        started: when the process started, by `time.monotonic`; None: now.
        minutes: make fewer steps than `train.steps`, where needed, to end so long after `started`. A resumed
            run keeps the number of steps that was chosen.

    Returns:
        The exit status: 0, or 128 + n if signal n stopped the run.

    Raises:
        UserError: bad settings or data, too few `minutes`, or `workdir` belongs to another run or process.
        RunError: a checkpoint could not be read or saved, or a loss, gradient or update is not finite. What
            was saved before is still there.
    """
    started = time.monotonic() if started is None else started
    check_minutes(minutes, config)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir = {workdir} is not a folder: choose another with --workdir")
    if is_exported(workdir):
        raise UserError(f"workdir = {workdir} holds an exported model: choose another with --workdir")
    check_backend()
    mesh = make_mesh(config.mesh)
    text = text_file(config.data)
    with LoadingBar() as progress:
        corpus = load_corpus(text, config.model.context, config.data.train_fraction, progress)
    if config.data.path:  # absolute, so that the run finds its text from any folder
        config = replace(config, data=replace(config.data, path=str(text)))
    resolve(config, mesh)  # fails where the devices cannot share a batch
    tensorboard = TensorBoard(workdir / "tensorboard") if config.train.tensorboard else None
    # Nothing is written before this line, so bad settings leave no trace.
    with locked(workdir):
        checkpoints = Checkpoints(checkpoint_folder(workdir))
        model = GPT(config.model, corpus.tokenizer.vocab_size, mesh)
        run = Run(config, workdir, started, minutes, mesh, corpus, model, checkpoints)
        try:
            return _train(run, tensorboard)
        except OSError as error:
            raise RunError(f"{workdir} cannot be written: {error}; what was saved before is kept") from error
        finally:
            checkpoints.close()  # completes the save in progress


def check_minutes(minutes: float | None, config: Config) -> None:
    """Raise `UserError` if `--minutes` cannot be met with these settings."""
    if minutes is None:
        return
    if not (minutes > 0 and math.isfinite(minutes)):
        raise UserError(f"--minutes = {minutes:g} must be above 0 and finite")
    if not config.optimizer.warmup_steps:
        raise UserError(
            f"--minutes = {minutes:g} requires optimizer.warmup_steps of 1 or more: the speed is measured "
            f"during the warm-up, when the learning rate does not depend on the number of steps"
        )


def _train(run: Run, tensorboard: TensorBoard | None) -> int:
    """Restore or begin, train, report; the exit status."""
    saved, state = _restore(run)
    run.config = resolve(run.config, run.mesh, saved)
    # The settings keep "auto", so that a sampler elsewhere chooses what suits its device.
    dtype, about_dtype = resolve_run_dtype(run.config, saved)
    run.model = run.model.clone(config=replace(run.config.model, dtype=dtype))
    run.chosen_steps = _chosen_steps(run, saved)
    first_step, total = saved.step if saved else 0, run.chosen_steps or run.config.train.steps
    run.facts = _facts(run, dtype, total)
    to_sample = sample_command(run.workdir)
    print(_describe(run))
    if saved and (how_longer := _how_to_train_longer(run, saved, total)):
        print(describe_finished(first_step, total, how_longer, to_sample))
        return 0
    if saved:
        chosen = ", as --minutes chose" if run.chosen_steps else ""
        print(f"resume  after step {first_step:,} of {total:,}{chosen}")
    if about_dtype:
        print(f"dtype   {about_dtype}")

    write_durably(run.workdir / CONFIG, run.config.to_json())
    run.write_facts()
    with stop_signals() as stop, ExitStack() as closing:
        try:
            state = state or _init(run, stop)
        except Stopped:
            print(describe_stop_before_start(stop.name))
            return stop.exit_status
        begin = Moment(first_step, total, state, record=(saved and saved.unfinished) or {})
        session = Session(run, begin, saved, tensorboard, stop, closing)
        moment, is_complete = session.train(lambda: _compile(run, begin.state, stop))
        run.checkpoints.wait()
    if not is_complete:
        print(describe_stop(stop.name, moment.step, moment.last_step, to_sample))
        return stop.exit_status
    print(describe_end(read_metrics(run.workdir / METRICS), time.monotonic() - run.started, to_sample))
    return 0


def _restore(run: Run) -> tuple[Metadata | None, TrainState | None]:
    """The newest checkpoint, None and None for a new run."""
    saved = state = None
    if run.checkpoints.steps():
        optimizer = make_optimizer(run.config.optimizer, run.config.train.steps)
        target = abstract_state(run.model, optimizer, run.config.optimizer.ema_decay > 0, run.mesh)
        saved, state = restore_newest(
            run.checkpoints, target, run.config, run.corpus.fingerprint, run.workdir
        )
    elif read_metrics(run.workdir / METRICS):
        print(f"WARNING: {run.workdir} has metrics but no checkpoint: training starts from step 0")
    run.checkpoints.prepare()
    return saved, state


def _chosen_steps(run: Run, saved: Metadata | None) -> int | None:
    """The length of a run whose length `--minutes` chose, unless the settings now ask for another one.

    Raises:
        UserError: it is too late for `--minutes`.
    """
    if saved is None:
        return None
    steps, warmup = run.config.train.steps, run.config.optimizer.warmup_steps
    if saved.total_steps is not None and steps == saved.config.train.steps:
        return saved.total_steps
    if run.minutes is not None and warmup < saved.step < steps:
        raise UserError(
            f"--minutes = {run.minutes:g} is too late: {run.workdir} is past its warm-up of {warmup} steps, "
            f"so its learning rate depends on train.steps = {steps}; resume it without --minutes, or start "
            f"another run with another --workdir"
        )
    return None


def _how_to_train_longer(run: Run, saved: Metadata, total: int) -> str | None:
    """For a finished run; None for one that is not finished."""
    if saved.unfinished is not None:
        return None
    if saved.step >= total:
        return "change --config.train.steps" if run.chosen_steps else "raise --config.train.steps"
    if 0 < run.config.train.patience <= saved.since_best:
        return "raise --config.train.patience"
    return None


def _init(run: Run, stop: StopRequest) -> TrainState:
    """The state of a new run."""
    optimizer = make_optimizer(run.config.optimizer, run.config.train.steps)
    key, keep_ema = stream(run.config.seed, INIT_STREAM), run.config.optimizer.ema_decay > 0
    with compiling("initial state") as compilation:
        state = stop.during(lambda: init_state(run.model, optimizer, keep_ema, run.mesh, key))
    run.facts["compile_seconds"]["initial state"] = compilation.seconds
    return state


def _compile(run: Run, state: TrainState, stop: StopRequest) -> Program:
    """The compiled training steps."""
    tokens_N = jax.device_put(run.corpus.train, replicated(run.mesh))
    with compiling("training steps") as compilation:
        program = stop.during(lambda: compile_steps(run.config, run.model, state, tokens_N))
    run.facts["compile_seconds"]["training steps"] = compilation.seconds
    run.write_facts()
    return program


def _facts(run: Run, dtype: str, steps: int) -> dict[str, Any]:
    """What run.json says."""
    return {
        "device": describe_devices(),
        "mesh": dict(run.mesh.shape),
        "dtype": dtype,
        "parameters": count_params(abstract_params(run.model, run.mesh)),
        "train_tokens": len(run.corpus.train),
        "val_tokens": len(run.corpus.val),
        "steps": steps,
        "versions": library_versions(),
        "compile_seconds": {},
    }


def _describe(run: Run) -> str:
    facts, model = run.facts, run.model.config
    mesh = " x ".join(f"{size} {axis}" for axis, size in facts["mesh"].items())
    here = first_device(run.mesh)
    fused = not model.attention_dropout and has_cudnn_attention(model, *here)
    device = (
        f"{facts['device']}, mesh {mesh}, {describe_dtype(facts['dtype'], *here)}, "
        f"{'attention by cuDNN, ' if fused else ''}jax {jax.__version__}"
    )
    text, folder = (str(relative_to_root(path)) for path in (text_file(run.config.data), run.workdir))
    sizes = (facts["train_tokens"], facts["val_tokens"], run.corpus.tokenizer.vocab_size)
    return describe_run(device, model, facts["parameters"], text, sizes, folder)


def compile_steps(config: Config, model: GPT, state: TrainState, tokens_N: jax.Array) -> Program:
    """The compiled training steps, as the loop calls them."""
    seed = np.uint32(config.seed)
    steps = make_train_steps(config, model, state, MAX_STEPS_PER_CALL)
    compiled = steps.lower(state, tokens_N, seed, np.int32(1), np.int32(1)).compile()
    return lambda state, n_steps, last_step: compiled(state, tokens_N, seed, n_steps, last_step)


def sample_command(workdir: Path) -> str:
    """The command that samples from a run."""
    is_default = workdir.absolute().parent == ARTIFACTS.absolute()
    return command("sample") + ("" if is_default else f" --workdir {shlex.quote(str(workdir))}")
