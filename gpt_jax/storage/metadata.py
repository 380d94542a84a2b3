"""What a checkpoint or an exported model says besides its arrays."""

from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any, get_args

from gpt_jax.config import Config, Dtype, UnknownSettingError
from gpt_jax.data.tokenizers import Tokenizer, tokenizer_from_json
from gpt_jax.errors import UserError
from gpt_jax.storage.format import FORMAT_VERSION, format_version, migrate, removed_setting
from gpt_jax.version import __version__


@dataclass(frozen=True)
class Metadata:
    """Stored as JSON: data, never code.

    Attributes:
        config: the settings of the run.
        tokenizer: text to ids and back.
        fingerprint: of the text, see `data/corpus.py`.
        step: updates done.
        val_loss: at this step, by the headline protocol; None for a checkpoint between evaluations.
        val_loss_part: the same on the first `train.eval_tokens` tokens, where the settings ask for that.
        recent_losses: the training losses since the last line of metrics.jsonl.
        versions: of gpt_jax and the libraries.
        compute_dtype: the type of the activations in the newest updates; None where it was not recorded.
        best_loss, since_best: the lowest validation loss so far, and how many evaluations came after it.
        total_steps: updates of the whole run, where `--minutes` chose it; else `config.train.steps` says it.
        unfinished: the numbers of this step, for metrics.jsonl, where a stop interrupted its evaluation; a
            resumed run evaluates it first.
        format_version: the format that the arrays are stored in.
    """

    config: Config
    tokenizer: Tokenizer
    fingerprint: str
    step: int
    val_loss: float | None
    recent_losses: list[float]
    versions: dict[str, str]
    compute_dtype: Dtype | None = None
    val_loss_part: float | None = None
    best_loss: float | None = None
    since_best: int = 0
    total_steps: int | None = None
    unfinished: dict[str, float] | None = None
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        own = {"config": self.config.to_dict(), "tokenizer": self.tokenizer.to_json()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | own

    def losses(self) -> dict[str, float]:
        """The validation losses of this step by name."""
        losses = {"val_loss": self.val_loss, "val_loss_part": self.val_loss_part}
        return {name: loss for name, loss in losses.items() if loss is not None}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Metadata":
        """The inverse of `to_dict`, for any format version.

        Raises:
            FormatError: it is of another version, which this one cannot read.
            UserError: something is missing or wrong; it is named.
        """
        stored_version = format_version(stored)
        optional = ("compute_dtype", "val_loss_part", "best_loss", "total_steps", "unfinished")
        values: dict[str, Any] = {**dict.fromkeys(optional), "since_best": 0, **migrate(stored)}
        losses, versions = values.get("recent_losses"), values.get("versions")
        total_steps, unfinished = values["total_steps"], values["unfinished"]
        valid = {
            "config": True,  # checks itself
            "tokenizer": isinstance(values.get("tokenizer"), str),
            "fingerprint": isinstance(values.get("fingerprint"), str),
            "step": type(values.get("step")) is int and 0 <= values["step"] < 2**31,
            **{name: _is_loss(values.get(name)) for name in ("val_loss", "val_loss_part", "best_loss")},
            "since_best": type(values["since_best"]) is int and values["since_best"] >= 0,
            "recent_losses": isinstance(losses, list) and all(type(x) is float for x in losses),
            "versions": isinstance(versions, dict) and all(isinstance(x, str) for x in versions.values()),
            "compute_dtype": values["compute_dtype"] in (None, *get_args(Dtype)),
            "total_steps": total_steps is None or (type(total_steps) is int and 0 < total_steps < 2**31),
            "unfinished": unfinished is None or (isinstance(unfinished, dict) and _are_numbers(unfinished)),
        }
        for name, is_valid in valid.items():
            if name not in values or not is_valid:
                raise UserError(f"{name} is missing or has a wrong value")
        try:
            config = Config.from_dict(values["config"])
        except UnknownSettingError as error:
            raise removed_setting(error, values) from None
        read = {"config": config, "tokenizer": tokenizer_from_json(values["tokenizer"])}
        return cls(**{name: values[name] for name in valid} | read, format_version=stored_version)


def _is_loss(value: Any) -> bool:
    return value is None or type(value) is float


def _are_numbers(values: dict[str, Any]) -> bool:
    return all(type(value) in (int, float) for value in values.values())


def library_versions() -> dict[str, str]:
    """The versions to record."""
    libraries = ("jax", "flax", "optax", "orbax-checkpoint")
    return {"gpt_jax": __version__} | {name: version(name) for name in libraries}
