"""One run of training: restore or begin, train with callbacks, report."""

import json
import os
import shlex
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from gpt_jax.commands.callbacks import (
    Evaluator,
    Plotter,
    Progress,
    Recorder,
    Sampler,
    Saver,
)
from gpt_jax.commands.paths import ARTIFACTS, command, relative_to_root, text_file
from gpt_jax.commands.signals import stop_signals
from gpt_jax.config import Config, Dtype
from gpt_jax.data.corpus import Corpus, load_corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.files import write_durably
from gpt_jax.interchange.model_folder import is_exported
from gpt_jax.model.loss import make_loss_of_tokens
from gpt_jax.model.params import abstract_params, count_params, name_leaves
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.messages import (
    describe_end,
    describe_finished,
    describe_not_finite,
    describe_run,
    describe_stop,
)
from gpt_jax.monitor.metrics import MetricsFile, TensorBoard, read_metrics
from gpt_jax.monitor.terminal import Terminal
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
from gpt_jax.storage.run_folder import CONFIG, FACTS, METRICS, PLOT, SAMPLES, checkpoint_folder
from gpt_jax.training.loop import MAX_STEPS_PER_CALL, Callback, Moment, Program, train_loop
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.resume import resolve, resolve_run_dtype, restore_newest
from gpt_jax.training.state import TrainState, abstract_state, init_state
from gpt_jax.training.step import make_train_steps


def train(config: Config, workdir: Path, started: float | None = None) -> int:
    """Train, or resume, the run in `workdir`.

    Args:
        config: the settings.
        workdir: for config.json, run.json, metrics.jsonl, loss.png, samples.txt and checkpoints/.
        started: when the process started, by `time.monotonic`; None: now.

    Returns:
        The exit status: 0, or 128 + n if signal n stopped the run.

    Raises:
        UserError: bad settings or data, or `workdir` belongs to another run or process.
        RunError: a checkpoint could not be read or saved, or a loss, gradient or update is not finite. What
            was saved before is still there.
    """
    started = time.monotonic() if started is None else started
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir = {workdir} is not a folder: choose another with --workdir")
    if is_exported(workdir):
        raise UserError(f"workdir = {workdir} holds an exported model: choose another with --workdir")
    check_backend()
    mesh = make_mesh(config.mesh)
    text = text_file(config.data)
    corpus = load_corpus(text, config.model.context, config.data.train_fraction)
    if config.data.path:  # absolute, so that the run finds its text from any folder
        config = replace(config, data=replace(config.data, path=str(text)))
    resolve(config, mesh)  # fails where the devices cannot share a batch
    tensorboard = TensorBoard(workdir / "tensorboard") if config.train.tensorboard else None
    # Nothing is written before this line, so bad settings leave no trace.
    with locked(workdir):
        checkpoints = Checkpoints(checkpoint_folder(workdir))
        try:
            return _Run(config, workdir, started, mesh, corpus, checkpoints, tensorboard).run()
        except OSError as error:
            raise RunError(f"{workdir} cannot be written: {error}; what was saved before is kept") from error
        finally:
            checkpoints.close()  # completes the save in progress


@dataclass
class _Run:
    """The parts of a run."""

    config: Config
    workdir: Path
    started: float
    mesh: jax.sharding.Mesh
    corpus: Corpus
    checkpoints: Checkpoints
    tensorboard: TensorBoard | None

    def __post_init__(self) -> None:
        self.model = GPT(self.config.model, self.corpus.tokenizer.vocab_size, self.mesh)
        self.optimizer = make_optimizer(self.config.optimizer, self.config.train.steps)
        self.keep_ema = self.config.optimizer.ema_decay > 0

    def run(self) -> int:
        """Restore or begin, train, report; the exit status."""
        saved, state = self._restore()
        self.config = resolve(self.config, self.mesh, saved)
        # The settings keep "auto", so that a sampler elsewhere chooses what suits its device.
        dtype, about_dtype = resolve_run_dtype(self.config, saved)
        self.model = self.model.clone(config=replace(self.config.model, dtype=dtype))
        first_step, steps = saved.step if saved else 0, self.config.train.steps
        facts = self._facts(dtype)
        print(self._describe(facts))
        if first_step >= steps:
            print(describe_finished(first_step, steps, sample_command(self.workdir)))
            return 0
        if first_step:
            print(f"resume  after step {first_step:,} of {steps:,}")
        if about_dtype:
            print(f"dtype   {about_dtype}")

        write_durably(self.workdir / CONFIG, self.config.to_json())
        self._write_facts(facts)
        with stop_signals() as stopped_by, ExitStack() as closing:
            tokens_N = jax.device_put(self.corpus.train, replicated(self.mesh))
            state = state or self._init(facts)
            with compiling("training steps") as compilation:
                program = compile_steps(self.config, self.model, self.optimizer, state, tokens_N)
            facts["compile_seconds"]["training steps"] = compilation.seconds
            self._write_facts(facts)
            step = self._train(program, saved, state, dtype, stopped_by, closing)
            self.checkpoints.wait()
            stop = stopped_by()
        if step < steps and stop is not None:
            print(describe_stop(stop.name, step, steps, sample_command(self.workdir)))
            return 128 + stop
        records, seconds = read_metrics(self.workdir / METRICS), time.monotonic() - self.started
        print(describe_end(records, seconds, sample_command(self.workdir)))
        return 0

    def _restore(self) -> tuple[Metadata | None, TrainState | None]:
        """The newest checkpoint, None and None for a new run."""
        saved = state = None
        if self.checkpoints.steps():
            target = abstract_state(self.model, self.optimizer, self.keep_ema, self.mesh)
            saved, state = restore_newest(
                self.checkpoints, target, self.config, self.corpus.fingerprint, self.workdir
            )
        elif read_metrics(self.workdir / METRICS):
            print(f"WARNING: {self.workdir} has metrics but no checkpoint: training starts from step 0")
        self.checkpoints.prepare()
        return saved, state

    def _init(self, facts: dict[str, Any]) -> TrainState:
        """The state of a new run."""
        with compiling("initial state") as compilation:
            key = stream(self.config.seed, INIT_STREAM)
            state = init_state(self.model, self.optimizer, self.keep_ema, self.mesh, key)
        facts["compile_seconds"]["initial state"] = compilation.seconds
        return state

    def _train(
        self,
        program: Program,
        saved: Metadata | None,
        state: TrainState,
        dtype: Dtype,
        stopped_by: Callable[[], signal.Signals | None],
        closing: ExitStack,
    ) -> int:
        """Train with callbacks; the updates done."""
        config, workdir, train = self.config, self.workdir, self.config.train
        first_step = saved.step if saved else 0
        sinks: list[MetricsFile | TensorBoard] = [MetricsFile(workdir / METRICS, first_step)]
        sinks += [self.tensorboard] if self.tensorboard else []
        terminal = Terminal(first_step, train.steps)
        for part in (*sinks, terminal):
            closing.callback(part.close)

        recorder = Recorder(config, self.corpus, self.model, sinks, terminal, self.started)
        loss_of_tokens = make_loss_of_tokens(self.model, train.batch_size // train.grad_accum_steps)
        evaluate = Evaluator(loss_of_tokens, self.corpus, self.checkpoints, terminal)
        if saved:
            recorder.resume(saved, state)
            evaluate.val_loss = saved.val_loss
        sample = Sampler(config, self.corpus, self.model, workdir / SAMPLES, first_step, terminal)
        plot = Plotter(workdir / METRICS, workdir / PLOT, _printable(workdir.name), terminal)
        saver = Saver(config, self.corpus, dtype, self.checkpoints, recorder)

        def stop_at_nan(moment: Moment) -> NoReturn:
            recorder.take_in(moment)
            recorder.write(moment)
            saver.save(moment.step, moment.state, None)
            raise RunError(_describe_not_finite(moment))

        callbacks = [
            Callback(recorder.take_in),
            Callback(evaluate, every=train.eval_every),
            Callback(recorder.write),
            Callback(sample, every=train.eval_every),
            Callback(plot, every=train.eval_every),
            Callback(saver),
            Callback(Progress(evaluate, self.model, terminal)),
        ]

        def is_stopped() -> bool:
            return stopped_by() is not None

        step, state = train_loop(program, state, first_step, train.steps, callbacks, is_stopped, stop_at_nan)
        if step < train.steps:  # stopped: save the newest step
            saver.save(step, state, None)
        plot()
        return step

    def _write_facts(self, facts: dict[str, Any]) -> None:
        write_durably(self.workdir / FACTS, json.dumps(facts, indent=1) + "\n")

    def _facts(self, dtype: Dtype) -> dict[str, Any]:
        """What run.json says: the numbers of the run that do not change while it trains."""
        return {
            "device": describe_devices(),
            "mesh": dict(self.mesh.shape),
            "dtype": dtype,
            "parameters": count_params(abstract_params(self.model, self.mesh)),
            "train_tokens": len(self.corpus.train),
            "val_tokens": len(self.corpus.val),
            "versions": library_versions(),
            "compile_seconds": {},
        }

    def _describe(self, facts: dict[str, Any]) -> str:
        mesh = " x ".join(f"{size} {axis}" for axis, size in facts["mesh"].items())
        model = self.model.config
        fused = not model.attention_dropout and has_cudnn_attention(model, *first_device(self.mesh))
        device = (
            f"{facts['device']}, mesh {mesh}, {describe_dtype(facts['dtype'], *first_device(self.mesh))}, "
            f"{'attention by cuDNN, ' if fused else ''}jax {jax.__version__}"
        )
        text = str(relative_to_root(text_file(self.config.data)))
        sizes = (facts["train_tokens"], facts["val_tokens"], self.corpus.tokenizer.vocab_size)
        return describe_run(
            device, model, facts["parameters"], text, sizes, str(relative_to_root(self.workdir))
        )


def compile_steps(
    config: Config, model: GPT, optimizer: Any, state: TrainState, tokens_N: jax.Array
) -> Program:
    """The compiled training steps, as the loop calls them."""
    seed = np.uint32(config.seed)
    steps = make_train_steps(config, model, optimizer, state, MAX_STEPS_PER_CALL)
    compiled = steps.lower(state, tokens_N, seed, np.int32(1)).compile()
    return lambda state, n_steps: compiled(state, tokens_N, seed, n_steps)


def sample_command(workdir: Path) -> str:
    """The command that samples from a run."""
    is_default = workdir.absolute().parent == ARTIFACTS.absolute()
    return command("sample") + ("" if is_default else f" --workdir {shlex.quote(str(workdir))}")


def _describe_not_finite(moment: Moment) -> str:
    metrics, i = moment.metrics, moment.n_steps  # i: of the update that was not made
    norms = {name: norm.item() for name, norm in name_leaves(metrics["grad_norms"]).items()}
    finite = {name: bool(is_finite) for name, is_finite in name_leaves(metrics["finite"]).items()}
    loss, grad_norm = metrics["loss"][i].item(), metrics["grad_norm"][i].item()
    return describe_not_finite(moment.step + 1, loss, grad_norm, norms, finite)


def _printable(name: str) -> str:
    """A file's name, where the locale cannot decode its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
