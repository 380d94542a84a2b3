"""The training loop: the only place where training has side effects."""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.backend import check_backend, describe_devices
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import ARTIFACTS, REPOSITORY, Config, flatten
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
    show_time,
)
from gpt_jax.model import GPT, compute_dtype, unstack_layers
from gpt_jax.optimizer import make_optimizer, make_schedule
from gpt_jax.run import checkpoint_folder
from gpt_jax.sampler import generate_tokens
from gpt_jax.sampling import make_rules
from gpt_jax.sharding import batch_sharding, make_mesh, replicated
from gpt_jax.train_state import TrainState, abstract_state, count_params, init_state
from gpt_jax.train_step import INIT_STREAM, SAMPLE_STREAM, make_train_steps, stream

MAX_STEPS_PER_CALL = 100
SECONDS_PER_CALL = 1.0  # about how long the program is deaf to Ctrl-C, and the bar stands still

# Settings that a resumed run may change: none of them decides what a step computes (train.steps does
# through the schedule, but asking for a longer run is what it is for; data is held by its fingerprint).
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
    check_backend()
    mesh = make_mesh(config.mesh)
    corpus = load_corpus(config.data.file, config.model.context, config.data.train_fraction)
    checkpoints = Checkpoints(checkpoint_folder(workdir))
    try:
        return _Trainer(config, workdir, started, mesh, corpus, checkpoints).run()
    finally:
        checkpoints.close()  # an asynchronous save is lost otherwise


class _Trainer:
    """One run of the loop and what it holds."""

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
        self.schedule = make_schedule(
            config.optimizer, config.train.steps, config.optimizer.learning_rate
        )
        # The losses that the next line's train_loss is the mean of. Kept in checkpoints, so that a
        # resumed run writes the very lines that an undisturbed one writes.
        self.recent_losses: deque[float] = deque(maxlen=config.train.log_every)
        self.val_loss: float | None = None
        self.step = 0

    def run(self) -> int:
        steps = self.config.train.steps
        state = self._restore_or_init()
        first_step = self.step
        self._describe(count_params(state.params))
        if first_step >= steps:
            print(
                f"this run is finished: {first_step:,} of {steps:,} steps are done. "
                f"To train on, raise --config.train.steps; to sample, {self._how_to_sample()}"
            )
            return 0

        self.workdir.mkdir(parents=True, exist_ok=True)
        replace_text(self.workdir / "config.json", self.config.to_json())
        sinks: list[Any] = [MetricsFile(self.workdir / "metrics.jsonl", first_step)]
        if self.config.train.tensorboard:
            sinks.append(TensorBoard(self.workdir / "tensorboard"))
        with _stop_signals() as stopped_by:
            train_steps = self._compile(state)
            terminal = Terminal(first_step, steps)
            try:
                self._loop(state, train_steps, terminal, sinks, stopped_by)
            finally:
                terminal.close()
                for sink in sinks:
                    sink.close()
        self._plot()
        self.checkpoints.wait()
        return self._say_goodbye(stopped_by())

    def _restore_or_init(self) -> TrainState:
        keep_ema = self.config.optimizer.ema_decay > 0
        saved_steps = self.checkpoints.steps()
        if not saved_steps:
            key = stream(self.config.seed, INIT_STREAM)
            return init_state(self.model, self.optimizer, keep_ema, self.mesh, key)
        step = saved_steps[-1]
        metadata = self.checkpoints.metadata(step)
        self._check_same_run(metadata)
        target = abstract_state(self.model, self.optimizer, keep_ema, self.mesh)
        items = self.checkpoints.restore(step, _items(target))
        self.recent_losses.extend(metadata["recent_losses"])
        self.val_loss = metadata["val_loss"]
        self.step = step
        return TrainState(
            step=jax.device_put(np.int32(step), replicated(self.mesh)),
            params=items["params"],
            opt_state=items["opt_state"],
            ema_params=items.get("ema_params"),
        )

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

    def _describe(self, n_params: int) -> None:
        model, corpus = self.config.model, self.corpus
        dtype = np.dtype(compute_dtype(model)).name
        shape = dict(self.mesh.shape)
        print(f"device  {describe_devices()}, {dtype}, mesh {shape}, jax {jax.__version__}")
        print(
            f"model   {n_params:,} parameters: {model.n_layer} layers, {model.n_head} heads, "
            f"width {model.d_model}, context {model.context}"
        )
        print(
            f"data    {_short(self.config.data.file)}: {len(corpus.train):,} characters train, "
            f"{len(corpus.val):,} validate, {corpus.tokenizer.vocab_size} distinct"
        )
        print(f"run     {_short(self.workdir)}/: config.json metrics.jsonl loss.png samples.txt checkpoints/")
        if self.step:
            print(f"resume  after step {self.step:,} of {self.config.train.steps:,}")

    def _compile(self, state: TrainState) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        begun = time.monotonic()
        print("compile ...", end="", flush=True)
        jitted = make_train_steps(
            self.config, self.model, self.optimizer, self.mesh, state, MAX_STEPS_PER_CALL
        )
        self.tokens = jax.device_put(self.corpus.train, replicated(self.mesh))
        compiled = jitted.lower(state, self.tokens, np.int32(1)).compile()  # type: ignore[attr-defined]
        print(f" {time.monotonic() - begun:.1f} s", flush=True)
        return compiled

    def _loop(
        self,
        state: TrainState,
        train_steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
        terminal: Terminal,
        sinks: list[Any],
        stopped_by: Callable[[], int | None],
    ) -> None:
        train = self.config.train
        tokens_per_step = train.batch_size * self.config.model.context
        batch_size = train.batch_size // train.accumulate
        loss_of_tokens = make_loss_of_tokens(self.model, batch_size, batch_sharding(self.mesh))
        steps_per_call, calls = 1, 0
        saved_at = time.monotonic()

        while self.step < train.steps and stopped_by() is None:
            until_evaluation = train.eval_every - self.step % train.eval_every
            n_steps = min(steps_per_call, until_evaluation, train.steps - self.step)
            begun = time.monotonic()
            state, metrics = train_steps(state, self.tokens, np.int32(n_steps))
            losses, norms = jax.device_get((metrics["loss"], metrics["grad_norm"]))
            seconds_per_step = (time.monotonic() - begun) / n_steps
            steps_per_call = int(np.clip(SECONDS_PER_CALL / seconds_per_step, 1, MAX_STEPS_PER_CALL))
            seconds_left = (train.steps - self.step - n_steps) * seconds_per_step
            calls += 1
            if calls == 2:  # the first call is slower than all that follow
                self._promise(terminal, seconds_left)

            last = self.step + n_steps
            evaluate_now = last % train.eval_every == 0 or last == train.steps
            speed = round(tokens_per_step / seconds_per_step, 1)
            record: Record = {}
            for loss, norm in zip(losses[:n_steps].tolist(), norms[:n_steps].tolist(), strict=True):
                self.step += 1
                self.recent_losses.append(loss)
                if self.step % train.log_every == 0 or self.step == last:
                    record = self._record(norm, speed)
                    if self.step % train.log_every == 0 and not (evaluate_now and self.step == last):
                        _write(sinks, record)

            if evaluate_now:
                self.val_loss = loss_of_tokens(state.eval_params, self.corpus.val)
                record = self._record(norm, speed)
                record |= {"val_loss": self.val_loss, "val_bpc": self.val_loss / np.log(2)}
                _write(sinks, record)
                self._save(state, self.val_loss)
                saved_at = time.monotonic()
                self._show_evaluation(terminal, state, record)
            elif time.monotonic() - saved_at > 60 * train.save_minutes:
                self._save(state, None)
                saved_at = time.monotonic()
            shown = record if self.val_loss is None else record | {"val_loss": self.val_loss}
            terminal.progress(shown, seconds_left)

        if self.step < train.steps:  # stopped: wherever the signal came, this step is not lost
            self._save(state, None)

    def _record(self, grad_norm: float, tokens_per_second: float) -> Record:
        """A line of metrics.jsonl for the step just done."""
        return {
            "step": self.step,
            "seconds": round(time.monotonic() - self.started, 3),
            "train_loss": float(np.mean(self.recent_losses)),
            "learning_rate": float(self.schedule(self.step - 1)),
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
        }

    def _promise(self, terminal: Terminal, seconds_left: float) -> None:
        """Say how long it will take here, and what to do where that is too long."""
        text = f"time    about {show_time(seconds_left)} of training here, evaluation apart"
        if jax.default_backend() == "cpu" and seconds_left > 1800:
            text += "; on a CPU, configs/shakespeare_cpu.py takes minutes"
        terminal.line(text)

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
        train_loss, val_loss = record["train_loss"], record["val_loss"]
        sample = self._sample(state) if self.config.train.sample_length else ""
        losses = (
            f"step {self.step:,}: training loss {train_loss:.4f}, validation loss {val_loss:.4f} "
            f"({record['val_bpc']:.3f} bits per character), gap {val_loss - train_loss:+.4f}, "
            f"{show_time(record['seconds'])}"
        )
        terminal.line(losses)
        if sample:
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
        plot_losses(
            self.workdir / "metrics.jsonl", self.workdir / "loss.png", title=self.workdir.name
        )

    def _say_goodbye(self, signal_number: int | None) -> int:
        seconds = time.monotonic() - self.started
        if self.step < self.config.train.steps:
            name = signal.Signals(signal_number).name if signal_number else "?"
            print(
                f"stopped by {name}; saved after step {self.step:,} of {self.config.train.steps:,}. "
                f"The same command goes on; to sample, {self._how_to_sample()}"
            )
            return 128 + (signal_number or 0)
        losses = [r for r in read_metrics(self.workdir / "metrics.jsonl") if "val_loss" in r]
        best = min(losses, key=lambda record: record["val_loss"])
        print(
            f"done in {show_time(seconds)}: validation loss {self.val_loss:.4f}, best "
            f"{best['val_loss']:.4f} at step {best['step']:,}. To sample, {self._how_to_sample()}"
        )
        return 0

    def _how_to_sample(self) -> str:
        default = self.workdir.absolute().parent == ARTIFACTS
        return "python sample.py" + ("" if default else f" --workdir {self.workdir}")


def _items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint; the step is the checkpoint's own."""
    items = {"params": state.params, "opt_state": state.opt_state}
    if state.ema_params is not None:
        items["ema_params"] = state.ema_params
    return items


def _write(sinks: list[Any], record: Record) -> None:
    for sink in sinks:
        sink.write(record)


def _short(path: Path) -> str:
    """A path as a person would name it: from the repository where it lies there."""
    path = path.absolute()
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int | None]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second one acts as ever.

    Yields:
        A function that returns the signal's number, or None while none came.
    """
    received: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, old[number])
        print("\nstopping: saving first", flush=True)

    old: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread (a notebook's worker): signals go elsewhere
        pass
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
