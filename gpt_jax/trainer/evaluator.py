"""What a run computes at an evaluation: the validation loss, and sample text."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.data.tokens import Corpus, FileTokens
from gpt_jax.model.layers import Params
from gpt_jax.model.loss import loss_of_tokens
from gpt_jax.model.transformer import GPT
from gpt_jax.monitor.terminal import Terminal
from gpt_jax.plan import Plan
from gpt_jax.records import Record
from gpt_jax.rng import SAMPLE_STREAM, stream
from gpt_jax.sampling.generate import generate_tokens
from gpt_jax.sampling.rules import make_rules
from gpt_jax.sampling.texts import GrowingText
from gpt_jax.storage.compilation_cache import compiling
from gpt_jax.trainer.signals import StopRequest


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
        """`Best` after one more evaluation."""
        if self.best_loss is None or loss < self.best_loss:
            return Best(loss, 0)
        return Best(self.best_loss, self.since_best + 1)


class Evaluator:
    """Computes the validation loss.

    Attributes:
        part: tokens of the validation split that are evaluated at intervals; 0: all of them.
        seconds_per_token: what the newest evaluation took, compilation left out.
    """

    def __init__(self, plan: Plan, model: GPT, corpus: Corpus, terminal: Terminal, stop: StopRequest):
        self.corpus, self.terminal, self.stop = corpus, terminal, stop
        self.part = plan.config.train.eval_tokens if plan.config.train.eval_tokens < len(corpus.val) else 0
        self.model, self.batch_size = model, plan.micro_batch_size
        self.is_compiled, self.compile_seconds, self.seconds_per_token = False, 0.0, 0.0

    def __call__(self, params: Params, part: int = 0) -> Record:
        """The loss of the first `part` tokens, 0: of the whole split, by its name in metrics.jsonl.

        Raises:
            Stopped: a stop was requested.
        """
        val_N = self.corpus.val
        if not self.is_compiled:
            with compiling("evaluation", self.terminal.write) as compilation:
                self.stop.during(lambda: loss_of_tokens(self.model, params, val_N[:2], self.batch_size))
            self.is_compiled, self.compile_seconds = True, compilation.seconds
        part_N, begun = val_N[:part] if part else val_N, time.monotonic()
        if isinstance(val_N, FileTokens):
            val_N.check()
        loss = loss_of_tokens(self.model, params, part_N, self.batch_size, self.stop.check)
        self.seconds_per_token = (time.monotonic() - begun) / len(part_N)
        if part:
            return {"val_loss_part": loss}
        record = {"val_loss": loss}
        n_characters = self.corpus.n_val_characters or 0  # 0: not known
        if n_characters > 1:
            per_character = loss * (len(val_N) - 1) / (n_characters - 1)
            record["val_bpc"] = per_character / float(np.log(2))
        return record

    @property
    def n_tokens(self) -> int:
        """Tokens of an evaluation."""
        return self.part or len(self.corpus.val)

    @property
    def ending_seconds(self) -> float:
        """About the time at the end for the whole split, twice: for the last and the best checkpoint."""
        return 2 * self.seconds_per_token * len(self.corpus.val) if self.part else 0.0


class Sampler:
    """Writes a sample text, with the same random numbers each time."""

    def __init__(self, plan: Plan, model: GPT, tokenizer: Tokenizer, terminal: Terminal, stop: StopRequest):
        self.length, self.seed = plan.config.train.sample_length, plan.config.seed
        self.model = model.clone(execution=replace(model.execution, mesh=None))
        self.tokenizer = tokenizer
        self.terminal, self.stop = terminal, stop
        self.is_compiled, self.compile_seconds = False, 0.0

    def __call__(self, params: Params) -> str:
        """The text, of `train.sample_length` tokens.

        Raises:
            Stopped: a stop was requested.
        """
        start_1x1 = np.array([[self.tokenizer.start_id]], np.int32)
        rules = make_rules(temperature=0.8).replace(n_tokens=self.tokenizer.vocab_size)
        key = stream(self.seed, SAMPLE_STREAM)
        pieces: Iterable[np.ndarray] = generate_tokens(self.model, params, start_1x1, self.length, rules, key)
        if not self.is_compiled:
            with compiling("sampling", self.terminal.write) as compilation:
                first = self.stop.during(lambda: next(iter(pieces)))
            pieces = chain([first], pieces)
            self.is_compiled, self.compile_seconds = True, compilation.seconds
        text, shown, n_left = (
            GrowingText(self.tokenizer.decoder(), (), self.tokenizer.end_id),
            "",
            self.length,
        )
        for piece in pieces:
            self.stop.check()
            n_left -= piece.shape[1]
            shown += text.add(piece[0], None, n_left == 0)
            if text.ended:
                break
        return shown
