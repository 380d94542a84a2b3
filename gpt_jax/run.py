"""A trained model, read back from its run: to sample from, to look into, to evaluate."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.batches import micro_batch_size
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import ARTIFACTS, Config, MeshConfig
from gpt_jax.errors import UserError
from gpt_jax.exported import is_exported, read_exported
from gpt_jax.integrity import DamagedError
from gpt_jax.loss import Announce, LossOfTokens, in_silence, make_loss_of_tokens
from gpt_jax.metadata import Metadata, read_metadata
from gpt_jax.model import GPT, Params
from gpt_jax.params import abstract_params, count_params, unstack_layers
from gpt_jax.rng import SAMPLE_STREAM, stream
from gpt_jax.sampler import generate_tokens
from gpt_jax.sampling import SamplingRules, make_rules
from gpt_jax.sharding import make_mesh
from gpt_jax.tokenizer import CharTokenizer

PRETRAINED = ARTIFACTS / "pretrained"
WINDOWS = ("half", "exact")
MOST_COMPRESSION = 100  # no parameters worth reading are packed tighter; a bomb is


@dataclass(frozen=True)
class Run:
    """A trained model and what it needs.

    Attributes:
        config: the settings that it was trained with.
        model: `GPT(stacked=False)`.
        params: its parameters, one tree a layer; the moving average where the run kept one.
        tokenizer: text to ids and back.
        step: updates that made the parameters.
        metadata: what else the checkpoint says: losses, data fingerprint, library versions.
        source: "best checkpoint", "last checkpoint", or "exported model".
    """

    config: Config
    model: GPT
    params: Params
    tokenizer: CharTokenizer
    step: int
    metadata: Metadata
    source: str

    def generate(
        self,
        prompt: str = "",
        length: int = 500,
        *,
        seed: int = 0,
        window: str = "half",
        **rules: Any,
    ) -> str:
        """Continue `prompt` by `length` characters and return those, without the prompt.

        Args:
            prompt: text of characters that the model knows; an empty one stands for a line end.
            length: characters to generate.
            seed: the same seed gives the same text.
            window: what the model sees past its context: see `gpt_jax.sampler`.
            **rules: temperature, top_k, top_p, min_p, greedy: see `gpt_jax.sampling.make_rules`.

        Raises:
            UserError: an argument out of its range, or unknown characters.
        """
        pieces = self.stream(prompt, length, make_rules(**rules), seed=seed, window=window)
        return "".join(texts[0] for texts in pieces)

    def stream(
        self,
        prompt: str,
        length: int,
        rules: SamplingRules,
        *,
        num_samples: int = 1,
        seed: int = 0,
        window: str = "half",
    ) -> Iterator[list[str]]:
        """Like `generate`, for several samples at once and as they grow.

        Yields:
            One piece of new text for each sample.
        """
        if length < 0:
            raise UserError(f"length = {length} must be 0 or above")
        if num_samples < 1:
            raise UserError(f"num_samples = {num_samples} must be 1 or above")
        if window not in WINDOWS:
            raise UserError(f"window = {window!r} must be one of {', '.join(map(repr, WINDOWS))}")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed = {seed} must lie in [0, 2**32)")
        # A model predicts from at least one token: an empty prompt stands for the start of a line.
        prompt_BxP = np.tile(self.tokenizer.encode(prompt or self._line_end), (num_samples, 1))
        key = stream(seed, SAMPLE_STREAM)
        pieces = generate_tokens(self.model, self.params, prompt_BxP, length, rules, key, window)
        return ([self.tokenizer.decode(row) for row in piece_BxC] for piece_BxC in pieces)

    def logits(self, text: str) -> np.ndarray:
        """What the model expects after each character of a text: float32 [T, V].

        Raises:
            UserError: unknown characters, an empty text, or one longer than the context.
        """
        context = self.config.model.context
        if not 0 < len(text) <= context:
            raise UserError(f"text of {len(text):,} characters must have 1 to {context} (the context)")
        tokens_1xT = self.tokenizer.encode(text)[None]
        return np.asarray(_logits(self.model, self.params, tokens_1xT)[0])

    def loss(self, text: str, announce: Announce = in_silence) -> float:
        """Nats per character of a text, by the headline protocol (`gpt_jax.loss`).

        Args:
            text: two characters or more.
            announce: what to compile the program within, as `gpt_jax.compilation.compiling`.

        Raises:
            UserError: unknown characters, or fewer than two characters.
        """
        if len(text) < 2:
            raise UserError(f"text of {len(text)} character(s) must have 2 or more to have a loss")
        return self._loss_of_tokens(self.params, self.tokenizer.encode(text), announce)

    @cached_property
    def _loss_of_tokens(self) -> LossOfTokens:
        context, platform = self.config.model.context, jax.default_backend()
        batch_size = micro_batch_size(self.config.train, context, 1, platform)
        return make_loss_of_tokens(self.model, batch_size)

    @property
    def _line_end(self) -> str:
        characters = self.tokenizer.characters
        return "\n" if "\n" in characters else characters[0]


@partial(jax.jit, static_argnums=0)
def _logits(model: GPT, params: Params, tokens_BxT: np.ndarray) -> jax.Array:
    return model.apply({"params": params}, tokens_BxT)[0]


def load(workdir: str | Path, which: str = "best") -> Run:
    """Read the model of a run, or an exported one.

    A damaged checkpoint is named on stderr and the next good one taken.

    Args:
        workdir: the folder of the run, or what `gpt_jax.export` wrote.
        which: "best" (by validation loss) or "last"; an exported model is the only one of its folder.

    Raises:
        UserError: there is no checkpoint, its arrays do not fit its settings, or an exported model is
            damaged.
        RunError: no checkpoint is whole.
    """
    workdir = Path(workdir).expanduser()
    if which not in ("best", "last"):
        raise UserError(f"which = {which!r} must be 'best' or 'last'")
    if has_checkpoint(workdir):
        source = f"{which} checkpoint"
        metadata, params = _read_checkpoint(workdir, which)
    elif is_exported(workdir):
        source = "exported model"
        metadata, params = read_exported(workdir)
    else:
        raise UserError(f"no trained run in {workdir}: {_HOW_TO_TRAIN}")
    config, tokenizer = metadata.config, metadata.tokenizer
    model = GPT(config.model, tokenizer.vocab_size, stacked=False)
    return Run(config, model, params, tokenizer, metadata.step, metadata, source)


def _read_checkpoint(workdir: Path, which: str) -> tuple[Metadata, Params]:
    checkpoints = Checkpoints(checkpoint_folder(workdir))

    def steps() -> list[int]:
        return checkpoints.best_first() if which == "best" else checkpoints.steps()[::-1]

    def read(step: int) -> tuple[Metadata, Params]:
        metadata = read_metadata(checkpoints, step)
        config, vocab_size = metadata.config, metadata.tokenizer.vocab_size
        # One device samples, whatever the mesh was that trained.
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        target = abstract_params(GPT(config.model, vocab_size), mesh)
        item = "ema_params" if config.optimizer.ema_decay > 0 else "params"
        n_bytes, on_disk = 4 * count_params(target), checkpoints.disk_size(step, item)
        if n_bytes > MOST_COMPRESSION * on_disk + 2**20:
            raise DamagedError(
                f"checkpoint {checkpoints.folder / str(step)} claims {n_bytes:,} bytes of {item} in "
                f"{on_disk:,} on disk: it is not what it says"
            )
        return metadata, checkpoints.restore(step, {item: target})[item]

    try:
        (metadata, params), _ = checkpoints.first_good(steps, read)
    finally:
        checkpoints.close()
    return metadata, jax.jit(unstack_layers)(params)


def newest_run() -> Path:
    """The folder below `artifacts/` whose checkpoints changed last.

    Where there is none, as in a fresh clone, the exported model that comes with the code; stderr says so.

    Raises:
        UserError: no run there has a checkpoint, and no model came with the code.
    """
    runs = [folder for folder in ARTIFACTS.iterdir() if has_checkpoint(folder)]
    if runs:
        return max(runs, key=lambda folder: checkpoint_folder(folder).stat().st_mtime)
    if is_exported(PRETRAINED):
        print(
            f"no run of your own in {ARTIFACTS}: taking {PRETRAINED.name}/, which comes with the code",
            file=sys.stderr,
        )
        return PRETRAINED
    raise UserError(f"no trained run in {ARTIFACTS}: {_HOW_TO_TRAIN}")


def checkpoint_folder(workdir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return workdir / "checkpoints"


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has at least one whole checkpoint."""
    folder = checkpoint_folder(workdir)
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())


_HOW_TO_TRAIN = "train one with python train.py --config configs/shakespeare_cpu.py"
