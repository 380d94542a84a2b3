"""Callbacks that evaluate a run: the validation loss, when to stop early, and sample text."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from gpt_jax.commands.callbacks import Recorder
from gpt_jax.commands.signals import StopRequest
from gpt_jax.config import Config
from gpt_jax.data.corpus import Corpus
from gpt_jax.errors import RunError
from gpt_jax.model.layers import Params
from gpt_jax.model.loss import LossOfTokens
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.messages import describe_bad_evaluation, describe_evaluation, describe_patience
from gpt_jax.monitor.metrics import Record, SamplesFile
from gpt_jax.monitor.terminal import Terminal
from gpt_jax.rng import SAMPLE_STREAM, stream
from gpt_jax.sampling.generate import generate_tokens
from gpt_jax.sampling.rules import make_rules
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.compilation_cache import compiling
from gpt_jax.storage.integrity import DamagedError
from gpt_jax.storage.metadata import Metadata
from gpt_jax.training.loop import Moment
from gpt_jax.training.resume import restore_eval_params
from gpt_jax.training.state import TrainState

BATCHES_TO_TIME = 8


@dataclass(frozen=True)
class Best:
    """What `train.patience` needs to know; its attributes are those of `Metadata`.

    Attributes:
        best_loss: the lowest validation loss so far; None before the first evaluation.
        since_best: evaluations since then.
    """

    best_loss: float | None = None
    since_best: int = 0

    def after(self, loss: float) -> "Best":
        """After one more evaluation."""
        if self.best_loss is None or loss < self.best_loss:
            return Best(loss, 0)
        return Best(self.best_loss, self.since_best + 1)


class Evaluator:
    """Computes the validation loss, and ends the run early where `train.patience` says so."""

    def __init__(
        self,
        config: Config,
        loss_of_tokens: LossOfTokens,
        corpus: Corpus,
        checkpoints: Checkpoints,
        terminal: Terminal,
        stop: StopRequest,
        saved: Metadata | None,
    ):
        self.loss_of_tokens = loss_of_tokens
        self.corpus = corpus
        # Tokens to evaluate at intervals; 0: the whole split.
        self.part = config.train.eval_tokens if config.train.eval_tokens < len(corpus.val) else 0
        batch_size = config.train.batch_size // config.train.grad_accum_steps
        self.tokens_per_batch = batch_size * config.model.context
        self.patience = config.train.patience
        self.checkpoints = checkpoints
        self.terminal = terminal
        self.stop = stop
        self.newest: Record = saved.losses() if saved else {}
        self.best = self.best_before = Best(saved.best_loss, saved.since_best) if saved else Best()
        self.seconds_per_batch: float | None = None

    def __call__(self, moment: Moment) -> None:
        """Add the loss to the record.

        Raises:
            RunError: it is not finite.
        """
        self.best_before = self.best
        loss = self.loss(moment.state.eval_params, self.part)
        if not np.isfinite(loss):
            saved_step = max(self.checkpoints.steps(), default=0)
            raise RunError(describe_bad_evaluation(moment.step, loss, saved_step))
        self.newest = {"val_loss_part": loss} if self.part else self.headline(loss)
        moment.record |= self.newest
        self.best = self.best.after(loss)
        if 0 < self.patience <= self.best.since_best and not moment.is_last:
            self.terminal.write(describe_patience(self.patience))
            moment.is_last = True

    def loss(self, params: Params, part: int = 0) -> float:
        """The loss of the first `part` tokens of the validation split; 0: of all of it.

        Raises:
            Stopped: a stop was requested.
        """
        self.compile(params)
        return self.loss_of_tokens(params, self.corpus.val[: part or None], between=self.stop.check)

    def headline(self, loss: float) -> Record:
        """The loss of the whole split by its names in metrics.jsonl."""
        n_tokens, n_characters = len(self.corpus.val) - 1, self.corpus.n_val_characters - 1
        return {"val_loss": loss, "val_bpc": loss * n_tokens / n_characters / float(np.log(2))}

    def compile(self, params: Params) -> None:
        """Compile at the first call, and time some batches."""
        if self.seconds_per_batch is None:
            size, val_N = self.tokens_per_batch, self.corpus.val
            with compiling("evaluation", self.terminal.write):
                self.stop.during(lambda: self.loss_of_tokens(params, val_N[: size + 1]))
            n_batches = min(BATCHES_TO_TIME, self._n_batches(0))
            begun = time.monotonic()
            self.loss_of_tokens(params, val_N[: n_batches * size + 1], between=self.stop.check)
            self.seconds_per_batch = (time.monotonic() - begun) / n_batches

    def seconds(self, params: Params, part: int = 0) -> float:
        """About how long an evaluation takes here."""
        self.compile(params)
        return self._n_batches(part) * (self.seconds_per_batch or 0.0)

    def ending_seconds(self, params: Params) -> float:
        """The same for `FinalEvaluator`."""
        return 2 * self.seconds(params) if self.part else 0.0

    def _n_batches(self, part: int) -> int:
        return -(-(len(self.corpus.val[: part or None]) - 1) // self.tokens_per_batch)


class FinalEvaluator:
    """At the end of a run that evaluated a part: the loss of the whole split, now and at the best step."""

    def __init__(self, evaluate: Evaluator, recorder: Recorder):
        self.evaluate = evaluate
        self.recorder = recorder

    def __call__(self, moment: Moment) -> None:
        """Add the loss to the record, and to the checkpoint and the metrics of the best step."""
        if not (moment.is_last and self.evaluate.part):
            return
        evaluate, checkpoints = self.evaluate, self.evaluate.checkpoints
        moment.record |= evaluate.headline(evaluate.loss(moment.state.eval_params))
        checkpoints.wait()  # for the best one, which may be the newest
        best = next(iter(checkpoints.best_first()), moment.step)
        if best == moment.step or checkpoints.deciding_loss(best) >= moment.record["val_loss_part"]:
            return
        try:
            params = restore_eval_params(checkpoints, best, moment.state)
        except DamagedError as error:
            evaluate.terminal.write(f"WARNING: {error}; its loss on the whole split is not computed")
            return
        whole = evaluate.headline(evaluate.loss(params))
        checkpoints.amend(best, {"val_loss": whole["val_loss"]})
        self.recorder.amend(best, whole)


class Sampler:
    """Shows the losses and a sample text, and appends both to samples.txt. Comes after `Evaluator`."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        model: GPT,
        file: SamplesFile,
        terminal: Terminal,
        stop: StopRequest,
    ):
        self.file = file
        self.length = config.train.sample_length
        self.seed = config.seed
        self.tokenizer = corpus.tokenizer
        self.model = model.clone(mesh=None)
        self.terminal = terminal
        self.stop = stop
        self.part = config.train.eval_tokens
        self.is_compiled = False

    def __call__(self, moment: Moment) -> None:
        """Show and write."""
        losses = describe_evaluation(moment.record, self.part)
        self.terminal.write(losses)
        if self.length:
            sample = self.sample(moment.state)
            self.terminal.write("\n".join("    | " + line for line in sample.strip("\n").split("\n")))
            self.file.write(losses, sample)

    def seconds(self, state: TrainState) -> float:
        """How long a sample takes here."""
        if not self.length:
            return 0.0
        self.sample(state)
        begun = time.monotonic()
        self.sample(state)
        return time.monotonic() - begun

    def sample(self, state: TrainState) -> str:
        """The text.

        Raises:
            Stopped: a stop was requested.
        """
        pieces: Iterable[np.ndarray] = generate_tokens(
            self.model,
            state.eval_params,
            np.array([[self.tokenizer.start_id]], np.int32),
            self.length,
            make_rules(temperature=0.8),
            stream(self.seed, SAMPLE_STREAM),
        )
        if not self.is_compiled:
            with compiling("sampling", self.terminal.write):
                first = self.stop.during(lambda: next(iter(pieces)))
            pieces = chain([first], pieces)
            self.is_compiled = True
        decode = self.tokenizer.decoder()
        texts = []
        for piece in pieces:
            self.stop.check()
            texts.append(decode(piece[0]))
        return "".join(texts)
