"""One run of training: restore or begin, train, report."""

import math
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.adapters import trained_params
from gpt_jax.config import Config
from gpt_jax.data.batches import lies_on_device
from gpt_jax.data.corpus import load_corpus
from gpt_jax.data.tokens import Corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.files import write_durably
from gpt_jax.interchange.model_folder import is_exported
from gpt_jax.model.layers import Params
from gpt_jax.model.loss import next_token_loss
from gpt_jax.model.params import abstract_params, count_params
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.metrics import TensorBoard, WandB, best_record, read_metrics, validated
from gpt_jax.monitor.terminal import LoadingBar, show_time
from gpt_jax.parallel.devices import check_backend
from gpt_jax.paths import ARTIFACTS, command, relative_to_root
from gpt_jax.plan import Plan, describe_precision, make_plan
from gpt_jax.rng import INIT_STREAM, stream
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.compilation_cache import compiling
from gpt_jax.storage.metadata import Metadata, library_versions
from gpt_jax.storage.run_folder import CONFIG, METRICS, checkpoint_folder, locked
from gpt_jax.trainer.minutes import check_minutes, check_not_too_late
from gpt_jax.trainer.opened_run import OpenedRun
from gpt_jax.trainer.origin import find_origin
from gpt_jax.trainer.session import Session
from gpt_jax.trainer.signals import StopRequest, stop_on_signals
from gpt_jax.training.loop import Callback, CallbackError, Program, StepInfo, Stopped
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.resume import restore_newest
from gpt_jax.training.source import SourceAt, open_source
from gpt_jax.training.state import TrainState, abstract_state, init_state
from gpt_jax.training.step import Metrics, Objective, make_train_steps


def train(
    config: Config,
    workdir: Path,
    started: float | None = None,
    minutes: float | None = None,
    callbacks: Sequence[Callback] = (),
    stop: StopRequest | None = None,
    objective: Objective | None = None,
) -> int:
    """Train, or resume, the run in `workdir`.

    The arguments, and what it raises, are those of `Trainer`. `started`, by `time.monotonic`, is when the
    process started, from which `minutes` count; None: now.

    Returns:
        The exit status of the command: 0, or 128 + n if signal n stopped the run.
    """
    started = time.monotonic() if started is None else started
    stop = StopRequest() if stop is None else stop
    check_minutes(minutes, config)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir = {workdir} is not a folder: choose another with --workdir")
    if is_exported(workdir):
        raise UserError(f"workdir = {workdir} holds an exported model: choose another with --workdir")
    check_backend()
    origin = find_origin(config, workdir)
    config = origin.config
    plan = make_plan(config)
    with LoadingBar() as progress:
        context, train_fraction = config.model.context, config.data.train_fraction
        corpus = load_corpus(plan.text, context, train_fraction, progress, origin.spec, origin.tokenizer)
    trackers: list[Any] = [TensorBoard(workdir / "tensorboard")] if config.train.tensorboard else []
    trackers += [WandB(workdir, config.to_dict())] if config.train.wandb else []
    # Nothing is written before this line, so bad settings leave no trace.
    with locked(workdir):
        checkpoints = Checkpoints(checkpoint_folder(workdir))
        try:
            saved, state = _restore(plan, corpus, checkpoints, workdir, origin.params)
            if saved:
                check_not_too_late(minutes, config, saved, workdir)
            plan = make_plan(config, saved)
            vocab_size = plan.config.model.vocabulary(corpus.tokenizer.vocab_size)
            model = GPT(plan.config.model, vocab_size, plan.execution)
            objective = objective or next_token_loss
            run = OpenedRun(
                plan, workdir, corpus, model, checkpoints, trackers, started, minutes, objective, origin
            )
            return _train(run, saved, state, stop, callbacks)
        except CallbackError as failed:
            raise failed.error from None
        except OSError as error:
            raise RunError(f"{workdir} cannot be written: {error}; what was saved before is kept") from error
        finally:
            checkpoints.close()  # completes the save in progress


def _restore(
    plan: Plan, corpus: Corpus, checkpoints: Checkpoints, workdir: Path, params: Params
) -> tuple[Metadata | None, TrainState | None]:
    """The newest checkpoint, None and None for a new run. `params`: what adapters adapt."""
    saved = state = None
    if checkpoints.steps():
        optimizer = make_optimizer(plan.config.optimizer, plan.steps)
        vocab_size = plan.config.model.vocabulary(corpus.tokenizer.vocab_size)
        model = GPT(plan.config.model, vocab_size, plan.execution)
        target = abstract_state(model, optimizer, plan.mesh)
        saved, state = restore_newest(checkpoints, target, plan.config, corpus.fingerprint, workdir)
        if target.frozen is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, target.frozen)
            state = state.replace(frozen=jax.device_put(params, shardings))
    elif read_metrics(workdir / METRICS):
        print(f"WARNING: {workdir} has metrics but no checkpoint: training starts from step 0")
    checkpoints.prepare()
    return saved, state


def _train(
    run: OpenedRun,
    saved: Metadata | None,
    state: TrainState | None,
    stop: StopRequest,
    callbacks: Sequence[Callback],
) -> int:
    """Begin or resume, train, report; the exit status."""
    plan, first_step, total = run.plan, saved.step if saved else 0, run.plan.steps
    run.facts = {
        "parameters": count_params(abstract_params(run.model, plan.mesh)),
        "trained_parameters": count_params(trained_params(run.model, plan.mesh)),
        "train_tokens": len(run.corpus.train),
        "val_tokens": len(run.corpus.val),
        "tokenizer": run.corpus.tokenizer.name,
        "split": run.corpus.split,
        "batches": "device" if lies_on_device(run.corpus.train, plan.config.data.batches) else "host",
        "parent": run.origin.record,
        "versions": library_versions(),
        "compile_seconds": {},
    }
    to_sample = f"To sample: {sample_command(run.workdir)}"
    print(_describe(run))
    if saved and (how_longer := _how_to_train_longer(plan, saved)):
        steps = f"{first_step:,} of {total:,} steps are done"
        print(f"this run is finished: {steps}. To train longer, {how_longer}. {to_sample}")
        return 0
    if saved:
        chosen = ", as --minutes chose" if plan.steps_were_chosen else ""
        print(f"resume  after step {first_step:,} of {total:,}{chosen}")
        if about_precision := describe_precision(plan, saved):
            print(f"dtype   {about_precision}")
        before, now = (config.train.grad_accum_steps for config in (saved.config, plan.config))
        if before and before != now:
            print(f"batch   {now} micro-batches in an update instead of {before}")
    else:
        print(run.origin.message or "start   from random parameters")

    write_durably(run.workdir / CONFIG, plan.config.to_json())
    run.write_plan(plan)
    with ExitStack() as closing:
        closing.enter_context(stop_on_signals(stop))
        try:
            state = state or _init(run, stop)
        except Stopped:
            print(f"stopped by {stop.name} before the first step. Run the same command to begin again")
            return stop.exit_status
        begin = StepInfo(first_step, total, state, record=(saved and saved.unfinished) or {})
        session = Session(run, begin, saved, stop, callbacks, closing)
        is_complete = session.train_to_the_end(lambda: _compile(run, begin.state, stop))
        run.checkpoints.wait()
    if not is_complete:
        step = f"{session.info.step:,} of {session.info.last_step:,}"
        print(f"stopped by {stop.name}; saved after step {step}. The same command resumes it. {to_sample}")
        return stop.exit_status
    seconds = show_time(time.monotonic() - run.started)
    print(f"done in {seconds}: {_describe_losses(run.workdir / METRICS)}. {to_sample}")
    return 0


def _how_to_train_longer(plan: Plan, saved: Metadata) -> str | None:
    """What makes a finished run longer; None for one that is not finished."""
    if saved.unfinished is not None:
        return None
    if saved.step >= plan.steps:
        return f"{'change' if plan.steps_were_chosen else 'raise'} --config.train.steps"
    if 0 < plan.config.train.patience <= saved.since_best:
        return "raise --config.train.patience"
    return None


def _init(run: OpenedRun, stop: StopRequest) -> TrainState:
    """The state of a new run."""
    optimizer = make_optimizer(run.plan.config.optimizer, run.plan.steps)
    key = stream(run.plan.config.seed, INIT_STREAM)
    with compiling("initial state") as compilation:
        # The origin does not keep them, so that no device holds them twice.
        params, run.origin.params = run.origin.params, None
        state = stop.during(lambda: init_state(run.model, optimizer, run.plan.mesh, key, params))
    run.facts["compile_seconds"]["initial state"] = compilation.seconds
    return state


def _compile(run: OpenedRun, state: TrainState, stop: StopRequest) -> Program:
    """The compiled training steps."""
    plan = run.plan
    source_at, run.max_steps = open_source(plan, run.corpus)
    with compiling("training steps") as compilation:
        program = stop.during(lambda: compile_steps(run, state, source_at))
    run.facts["compile_seconds"]["training steps"] = compilation.seconds
    run.write_plan(plan)
    return program


def compile_steps(run: OpenedRun, state: TrainState, source_at: SourceAt) -> Program:
    """The compiled training steps, as the loop calls them."""
    seed = np.uint32(run.plan.config.seed)
    steps = make_train_steps(run.plan, run.model, run.objective, state, run.max_steps)
    source = source_at(int(state.step), 1)
    compiled = steps.lower(state, source, seed, np.int32(1), np.int32(1)).compile()

    def program(state: TrainState, n_steps: int, last_step: int) -> tuple[TrainState, Metrics]:
        source = source_at(int(state.step), n_steps)
        return compiled(state, source, seed, np.int32(n_steps), np.int32(last_step))

    return program


def _describe(run: OpenedRun) -> str:
    """The first lines of a run."""
    plan, model, corpus = run.plan, run.plan.config.model, run.corpus
    adapters = f", {run.facts['trained_parameters']:,} trained in adapters" if model.lora_rank else ""
    return (
        f"device  {plan.describe()}, jax {jax.__version__}\n"
        f"model   {run.facts['parameters']:,} parameters: {model.n_layer} layers, {model.n_head} heads, "
        f"width {model.d_model}, context {model.context}{adapters}\n"
        f"data    {relative_to_root(plan.text)}: {len(corpus.train):,} training tokens, "
        f"{len(corpus.val):,} validation tokens, vocabulary of {corpus.tokenizer.vocab_size:,} "
        f"({corpus.tokenizer.name}), split {corpus.split}\n"
        f"run     {relative_to_root(run.workdir)}/: config.json run.json metrics.jsonl loss.png samples.txt "
        f"checkpoints/"
    )


def _describe_losses(metrics: Path) -> str:
    """The losses of a finished run."""
    records = read_metrics(metrics)
    last, best = validated(records)[-1], best_record(records)
    part = " (the lowest on the part that was evaluated)" if "val_loss_part" in best else ""
    return (
        f"validation loss {last['val_loss']:.4f}, best {best.get('val_loss', math.nan):.4f} "
        f"at step {best['step']:,}{part}"
    )


def sample_command(workdir: Path) -> str:
    """The command that samples from a run."""
    is_default = workdir.absolute().parent == ARTIFACTS.absolute()
    return command("sample") + ("" if is_default else f" --workdir {shlex.quote(str(workdir))}")
