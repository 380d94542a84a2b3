"""The training loop: the only place where training has side effects."""

import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.backend import check_backend
from gpt_jax.batches import micro_batch_size
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import Config, flatten
from gpt_jax.corpus import Corpus, load_corpus
from gpt_jax.errors import UserError
from gpt_jax.loss import make_loss_of_tokens
from gpt_jax.metrics import (
    MetricsFile,
    Record,
    TensorBoard,
    Terminal,
    plot_losses,
    read_metrics,
    replace_text,
)
from gpt_jax.model import GPT, unstack_layers
from gpt_jax.optimizer import make_optimizer, make_schedule
from gpt_jax.report import (
    describe_end,
    describe_evaluation,
    describe_finished,
    describe_run,
    describe_stop,
    promise_time,
)
from gpt_jax.run import checkpoint_folder
from gpt_jax.sampler import generate_tokens
from gpt_jax.sampling import make_rules
from gpt_jax.sharding import batch_sharding, make_mesh, replicated
from gpt_jax.signals import stop_signals
from gpt_jax.train_state import TrainState, abstract_state, count_params, init_state
from gpt_jax.train_step import INIT_STREAM, SAMPLE_STREAM, TrainSteps, make_train_steps, stream

MAX_STEPS_PER_CALL = 100
SECONDS_PER_CALL = 1.0  # about how long the program is deaf to Ctrl-C, and the bar stands still

# Settings that a resumed run may change: they move a step by rounding at most. Exceptions are asked for:
# train.steps stretches the schedule, and train.accumulate draws other dropout masks. The text behind
# data.path is held by its fingerprint.
SAFE_TO_CHANGE = (
    "data.path",
    "mesh.",
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


def train(config: Config, workdir: Path, started: float | None = None) -> int:
    """Train, or go on training, the run in `workdir`.

    Args:
        config: the settings.
        workdir: where config.json, metrics.jsonl, loss.png, samples.txt and checkpoints/ go.
        started: `time.monotonic()` at the start of the process, which "seconds" count from.

    Returns:
        The exit status: 0 when the run is finished, 128 + the signal's number when one stopped it
        (everything is saved; the same command goes on).

    Raises:
        UserError: the settings do not fit the text, the devices, or the run that is there.
    """
    started = time.monotonic() if started is None else started
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir = {workdir} is not a folder: name one, it need not exist")
    check_backend()
    mesh = make_mesh(config.mesh)
    corpus = load_corpus(config.data.file, config.model.context, config.data.train_fraction)
    checkpoints = Checkpoints(checkpoint_folder(workdir), clean=True)
    try:
        config = _settle(config, checkpoints, mesh)
        return _Trainer(config, workdir, started, mesh, corpus, checkpoints).run()
    finally:
        checkpoints.close()  # an asynchronous save is lost otherwise


class _Trainer:
    """One run: what the loop needs, and where it is."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        started: float,
        mesh: jax.sharding.Mesh,
        corpus: Corpus,
        checkpoints: Checkpoints,
    ):
        self.config = config
        self.workdir = workdir
        self.started = started
        self.mesh = mesh
        self.corpus = corpus
        self.checkpoints = checkpoints
        self.model = GPT(config.model, corpus.tokenizer.vocab_size)
        self.optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.schedule = make_schedule(config.optimizer, config.train.steps, config.optimizer.learning_rate)
        # The losses that the next line's train_loss is the mean of. Kept in checkpoints, so that a
        # resumed run writes the very lines that an undisturbed one writes.
        self.recent_losses: deque[float] = deque(maxlen=config.train.log_every)
        self.val_loss: float | None = None  # of the newest evaluation
        self.step = 0

    def run(self) -> int:
        """Restore or begin, train, say what came of it; the exit status."""
        config, workdir, steps = self.config, self.workdir, self.config.train.steps
        state = self._restore_or_init()
        first_step = self.step
        n_params = count_params(state.params)
        print(describe_run(config, workdir, self.corpus, self.mesh.shape, n_params))
        if first_step >= steps:
            print(describe_finished(first_step, steps, workdir))
            return 0
        if first_step:
            print(f"resume  after step {first_step:,} of {steps:,}")

        sinks: list[MetricsFile | TensorBoard] = []
        if config.train.tensorboard:
            sinks.append(TensorBoard(workdir / "tensorboard"))
        workdir.mkdir(parents=True, exist_ok=True)  # from here on, nothing is wrong with the settings
        replace_text(workdir / "config.json", config.to_json())
        sinks.append(MetricsFile(workdir / "metrics.jsonl", first_step))
        with stop_signals() as stopped_by:
            tokens_N = jax.device_put(self.corpus.train, replicated(self.mesh))
            train_steps = self._compile(state, tokens_N)
            terminal = Terminal(first_step, steps)
            try:
                self._loop(state, tokens_N, train_steps, terminal, sinks, stopped_by)
            finally:
                terminal.close()
                for sink in sinks:
                    sink.close()
            self._plot()
            self.checkpoints.wait()
            stop = stopped_by()
        if self.step < steps and stop is not None:
            print(describe_stop(stop.name, self.step, steps, workdir))
            return 128 + stop
        print(describe_end(read_metrics(workdir / "metrics.jsonl"), workdir))
        return 0

    def _restore_or_init(self) -> TrainState:
        keep_ema = self.config.optimizer.ema_decay > 0
        saved_steps = self.checkpoints.steps()
        if not saved_steps:
            key = stream(self.config.seed, INIT_STREAM)
            return init_state(self.model, self.optimizer, keep_ema, self.mesh, key)
        self.step = saved_steps[-1]
        metadata = self.checkpoints.metadata(self.step)
        self._check_same_run(metadata)
        self.recent_losses.extend(metadata["recent_losses"])
        self.val_loss = metadata["val_loss"]
        target = abstract_state(self.model, self.optimizer, keep_ema, self.mesh)
        items = self.checkpoints.restore(self.step, _items(target))
        step = jax.device_put(np.int32(self.step), replicated(self.mesh))
        return TrainState(step, items["params"], items["opt_state"], items.get("ema_params"))

    def _check_same_run(self, metadata: dict[str, Any]) -> None:
        old, new = flatten(Config.from_dict(metadata["config"])), flatten(self.config)
        for key, value in new.items():
            if value != old[key] and not key.startswith(SAFE_TO_CHANGE):
                raise UserError(
                    f"{self.workdir} holds a run with {key} = {old[key]!r}, not {value!r}: "
                    f"keep it, or start another run with another --workdir"
                )
        if metadata["fingerprint"] != self.corpus.fingerprint:
            raise UserError(
                f"{self.workdir} was trained on another text than {self.config.data.file} is now: "
                f"fingerprint {metadata['fingerprint'][:12]}, now {self.corpus.fingerprint[:12]}; "
                f"give back the old text, or start another run with another --workdir"
            )

    def _compile(self, state: TrainState, tokens_N: jax.Array) -> TrainSteps:
        begun = time.monotonic()
        print("compile ...", end="", flush=True)
        steps = make_train_steps(
            self.config, self.model, self.optimizer, self.mesh, state, MAX_STEPS_PER_CALL
        )
        compiled = steps.lower(state, tokens_N, np.int32(1)).compile()
        print(f" {time.monotonic() - begun:.1f} s", flush=True)
        return compiled

    def _loop(
        self,
        state: TrainState,
        tokens_N: jax.Array,
        train_steps: TrainSteps,
        terminal: Terminal,
        sinks: list[MetricsFile | TensorBoard],
        stopped_by: Callable[[], signal.Signals | None],
    ) -> None:
        train = self.config.train
        tokens_per_step = train.batch_size * self.config.model.context
        loss_of_tokens = make_loss_of_tokens(
            self.model, train.batch_size // train.accumulate, batch_sharding(self.mesh)
        )
        steps_per_call, calls = 1, 0
        saved_at = time.monotonic()

        while self.step < train.steps and stopped_by() is None:
            until_evaluation = train.eval_every - self.step % train.eval_every
            n_steps = min(steps_per_call, until_evaluation, train.steps - self.step)
            begun = time.monotonic()
            state, metrics = train_steps(state, tokens_N, np.int32(n_steps))
            losses, norms = jax.device_get((metrics["loss"], metrics["grad_norm"]))
            seconds_per_step = (time.monotonic() - begun) / n_steps
            steps_per_call = int(np.clip(SECONDS_PER_CALL / seconds_per_step, 1, MAX_STEPS_PER_CALL))

            last_step = self.step + n_steps
            for loss, norm in zip(losses[:n_steps].tolist(), norms[:n_steps].tolist(), strict=True):
                self.step += 1
                self.recent_losses.append(loss)
                if self.step % train.log_every == 0 or self.step == last_step:
                    record = self._record(norm, tokens_per_step / seconds_per_step)
                    if self.step < last_step:
                        _write(sinks, record)
            evaluate_now = self.step % train.eval_every == 0 or self.step == train.steps
            if evaluate_now:
                self.val_loss = loss_of_tokens(state.eval_params, self.corpus.val)
                record |= {"val_loss": self.val_loss, "val_bpc": self.val_loss / float(np.log(2))}
                record["seconds"] = self._seconds()
            if evaluate_now or self.step % train.log_every == 0:
                _write(sinks, record)

            if evaluate_now or time.monotonic() - saved_at > 60 * train.save_minutes:
                self._save(state, self.val_loss if evaluate_now else None)
                saved_at = time.monotonic()
            if evaluate_now:
                self._show_evaluation(terminal, state, record)
            seconds_left = (train.steps - self.step) * seconds_per_step
            calls += 1
            if calls == 2:  # the first call is slower than all that follow
                terminal.line(promise_time(seconds_left))
            terminal.progress(record, self.val_loss, seconds_left)

        if self.step < train.steps:  # stopped: whenever the signal came, this step is not lost
            self._save(state, None)

    def _seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def _record(self, grad_norm: float, tokens_per_second: float) -> Record:
        """A line of metrics.jsonl for the step just done."""
        return {
            "step": self.step,
            "seconds": self._seconds(),
            "train_loss": float(np.mean(self.recent_losses)),
            "learning_rate": float(self.schedule(self.step - 1)),
            "grad_norm": grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
        }

    def _save(self, state: TrainState, val_loss: float | None) -> None:
        metadata = {
            "config": self.config.to_dict(),
            "tokenizer": self.corpus.tokenizer.to_json(),
            "fingerprint": self.corpus.fingerprint,
            "step": self.step,
            "val_loss": self.val_loss,
            "recent_losses": list(self.recent_losses),
            "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        }
        self.checkpoints.save(self.step, _items(state), metadata, val_loss)

    def _show_evaluation(self, terminal: Terminal, state: TrainState, record: Record) -> None:
        """A line of losses, a few lines of sample text, and the plot."""
        losses = describe_evaluation(record)
        terminal.line(losses)
        if self.config.train.sample_length:
            sample = self._sample(state)
            terminal.line("\n".join("    | " + line for line in sample.strip("\n").splitlines()))
            with (self.workdir / "samples.txt").open("a", encoding="utf-8", newline="") as file:
                file.write(f"--- {losses}\n{sample}\n\n")
        self._plot()

    def _sample(self, state: TrainState) -> str:
        pieces = generate_tokens(
            self.model.clone(stacked=False),
            jax.jit(unstack_layers)(state.eval_params),
            np.zeros((1, 1), np.int32),  # the first character of the vocabulary: the line end, mostly
            self.config.train.sample_length,
            make_rules(temperature=0.8),
            stream(self.config.seed, SAMPLE_STREAM),
        )
        return "".join(self.corpus.tokenizer.decode(piece[0]) for piece in pieces)

    def _plot(self) -> None:
        plot_losses(self.workdir / "metrics.jsonl", self.workdir / "loss.png", title=self.workdir.name)


def _settle(config: Config, checkpoints: Checkpoints, mesh: jax.sharding.Mesh) -> Config:
    """Settle what the settings leave open, so that a checkpoint says what was done.

    Raises:
        UserError: the devices cannot share a batch.
    """
    train = config.train
    if not train.accumulate and checkpoints.steps():
        saved = checkpoints.metadata(checkpoints.find("last"))
        train = replace(train, accumulate=saved["config"]["train"]["accumulate"])
    n_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    size = micro_batch_size(train, config.model.context, n_shards)
    train = replace(train, accumulate=train.batch_size // size)
    # Wherever the run is read again from, its text is where it is now.
    path = str(config.data.file) if config.data.path else ""
    return replace(config, train=train, data=replace(config.data, path=path))


def _items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint; the step is the checkpoint's own."""
    items = {"params": state.params, "opt_state": state.opt_state}
    if state.ema_params is not None:
        items["ema_params"] = state.ema_params
    return items


def _write(sinks: list[MetricsFile | TensorBoard], record: Record) -> None:
    for sink in sinks:
        sink.write(record)
