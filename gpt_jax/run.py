"""A trained model, read back from its run: to sample from, to look into, to evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.batches import micro_batch_size
from gpt_jax.checkpoint import METADATA, Checkpoints
from gpt_jax.config import ARTIFACTS, Config, MeshConfig
from gpt_jax.errors import UserError
from gpt_jax.integrity import DamagedError
from gpt_jax.loss import LossOfTokens, make_loss_of_tokens
from gpt_jax.model import GPT, Params, unstack_layers
from gpt_jax.sampler import generate_tokens
from gpt_jax.sampling import SamplingRules, make_rules
from gpt_jax.sharding import make_mesh
from gpt_jax.tokenizer import CharTokenizer
from gpt_jax.train_state import abstract_params, count_params
from gpt_jax.train_step import SAMPLE_STREAM, stream

WINDOWS = ("half", "exact")
MOST_COMPRESSION = 100  # no parameters worth reading are packed tighter; a bomb is


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says beside its arrays; as JSON, it is data and never code.

    Attributes:
        config: the settings of the run.
        tokenizer: text to ids and back.
        fingerprint: of the text, see `gpt_jax.corpus`.
        step: updates done.
        val_loss: at this step, by the headline protocol; None for one saved between evaluations.
        recent_losses: those that the next line of metrics.jsonl is the mean of.
        versions: of the libraries.
    """

    config: Config
    tokenizer: CharTokenizer
    fingerprint: str
    step: int
    val_loss: float | None
    recent_losses: list[float]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        own = {"config": self.config.to_dict(), "tokenizer": self.tokenizer.to_json()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | own

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Metadata":
        """The inverse of `to_dict`.

        Raises:
            UserError: something is missing or not what it should be; it is named.
        """
        val_loss, losses, versions = map(values.get, ("val_loss", "recent_losses", "versions"))
        sound = {
            "config": True,  # checks itself
            "tokenizer": isinstance(values.get("tokenizer"), str),
            "fingerprint": isinstance(values.get("fingerprint"), str),
            "step": type(values.get("step")) is int,
            "val_loss": val_loss is None or type(val_loss) in (int, float),
            "recent_losses": isinstance(losses, list) and all(type(x) in (int, float) for x in losses),
            "versions": isinstance(versions, dict) and all(isinstance(x, str) for x in versions.values()),
        }
        for name, is_sound in sound.items():
            if name not in values or not is_sound:
                raise UserError(f"{name} is missing or not what it should be")
        read = {
            "config": Config.from_dict(values["config"]),
            "tokenizer": CharTokenizer.from_json(values["tokenizer"]),
        }
        return cls(**{name: values[name] for name in sound} | read)


def read_metadata(checkpoints: Checkpoints, step: int) -> Metadata:
    """What the checkpoint of `step` says of itself.

    Raises:
        DamagedError: nothing that makes sense.
    """
    try:
        return Metadata.from_dict(checkpoints.metadata(step))
    except DamagedError:
        raise
    except UserError as error:
        raise DamagedError(f"checkpoint {checkpoints.folder / str(step)}: {METADATA}: {error}") from None


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
    """

    config: Config
    model: GPT
    params: Params
    tokenizer: CharTokenizer
    step: int
    metadata: Metadata

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

    def loss(self, text: str) -> float:
        """Nats per character of a text, by the headline protocol (`gpt_jax.loss`).

        Raises:
            UserError: unknown characters, or fewer than two characters.
        """
        if len(text) < 2:
            raise UserError(f"text of {len(text)} character(s) must have 2 or more to have a loss")
        return self._loss_of_tokens(self.params, self.tokenizer.encode(text))

    @cached_property
    def _loss_of_tokens(self) -> LossOfTokens:
        batch_size = micro_batch_size(self.config.train, self.config.model.context, n_shards=1)
        return make_loss_of_tokens(self.model, batch_size)

    @property
    def _line_end(self) -> str:
        characters = self.tokenizer.characters
        return "\n" if "\n" in characters else characters[0]


@partial(jax.jit, static_argnums=0)
def _logits(model: GPT, params: Params, tokens_BxT: np.ndarray) -> jax.Array:
    return model.apply({"params": params}, tokens_BxT)[0]


def load(workdir: str | Path, which: str = "best") -> Run:
    """Read the model of a run. A damaged checkpoint is named on stderr and the next good one taken.

    Args:
        workdir: the folder of the run.
        which: "best" (by validation loss) or "last".

    Raises:
        UserError: there is no checkpoint, or its arrays do not fit its settings.
        RunError: no checkpoint is whole.
    """
    workdir = Path(workdir).expanduser()
    if which not in ("best", "last"):
        raise UserError(f"which = {which!r} must be 'best' or 'last'")
    if not has_checkpoint(workdir):
        raise UserError(f"no trained run in {workdir}: {_HOW_TO_TRAIN}")
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
    config, tokenizer = metadata.config, metadata.tokenizer
    model = GPT(config.model, tokenizer.vocab_size, stacked=False)
    return Run(config, model, jax.jit(unstack_layers)(params), tokenizer, metadata.step, metadata)


def newest_run() -> Path:
    """The folder below `artifacts/` whose checkpoints changed last.

    Raises:
        UserError: no run there has a checkpoint.
    """
    runs = [folder for folder in ARTIFACTS.iterdir() if has_checkpoint(folder)]
    if not runs:
        raise UserError(f"no trained run in {ARTIFACTS}: {_HOW_TO_TRAIN}")
    return max(runs, key=lambda folder: checkpoint_folder(folder).stat().st_mtime)


def checkpoint_folder(workdir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return workdir / "checkpoints"


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has at least one whole checkpoint."""
    folder = checkpoint_folder(workdir)
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())


_HOW_TO_TRAIN = "train one with python train.py --config configs/shakespeare_cpu.py"
