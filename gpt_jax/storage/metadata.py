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
        recent_losses: the training losses since the last line of metrics.jsonl.
        versions: of gpt_jax and the libraries.
        compute_dtype: the type of the activations in the newest updates; None where it was not recorded.
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
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        own = {"config": self.config.to_dict(), "tokenizer": self.tokenizer.to_json()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | own

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Metadata":
        """The inverse of `to_dict`, for any format version.

        Raises:
            FormatError: it is of another version, which this one cannot read.
            UserError: something is missing or wrong; it is named.
        """
        stored_version = format_version(stored)
        values = {"compute_dtype": None} | migrate(stored)
        val_loss, losses, versions = map(values.get, ("val_loss", "recent_losses", "versions"))
        valid = {
            "config": True,  # checks itself
            "tokenizer": isinstance(values.get("tokenizer"), str),
            "fingerprint": isinstance(values.get("fingerprint"), str),
            "step": type(values.get("step")) is int and 0 <= values["step"] < 2**31,
            "val_loss": val_loss is None or type(val_loss) is float,
            "recent_losses": isinstance(losses, list) and all(type(x) is float for x in losses),
            "versions": isinstance(versions, dict) and all(isinstance(x, str) for x in versions.values()),
            "compute_dtype": values["compute_dtype"] in (None, *get_args(Dtype)),
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


def library_versions() -> dict[str, str]:
    """The versions to record."""
    libraries = ("jax", "flax", "optax", "orbax-checkpoint")
    return {"gpt_jax": __version__} | {name: version(name) for name in libraries}
