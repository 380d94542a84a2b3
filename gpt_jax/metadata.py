"""What a checkpoint says beside its arrays."""

from dataclasses import dataclass, fields
from typing import Any, get_args

from gpt_jax.backend import Dtype
from gpt_jax.checkpoint import METADATA, Checkpoints
from gpt_jax.config import Config
from gpt_jax.errors import UserError
from gpt_jax.integrity import DamagedError
from gpt_jax.tokenizer import CharTokenizer


@dataclass(frozen=True)
class Metadata:
    """As JSON, it is data and never code.

    Attributes:
        config: the settings of the run.
        tokenizer: text to ids and back.
        fingerprint: of the text, see `gpt_jax.corpus`.
        step: updates done.
        val_loss: at this step, by the headline protocol; None for one saved between evaluations.
        recent_losses: those that the next line of metrics.jsonl is the mean of.
        versions: of the libraries.
        compute_dtype: "float32" or "bfloat16", what the newest updates were computed in; None in checkpoints
            written before it was recorded.
    """

    config: Config
    tokenizer: CharTokenizer
    fingerprint: str
    step: int
    val_loss: float | None
    recent_losses: list[float]
    versions: dict[str, str]
    compute_dtype: Dtype | None = None

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
        values = {"compute_dtype": None} | values
        val_loss, losses, versions = map(values.get, ("val_loss", "recent_losses", "versions"))
        sound = {
            "config": True,  # checks itself
            "tokenizer": isinstance(values.get("tokenizer"), str),
            "fingerprint": isinstance(values.get("fingerprint"), str),
            "step": type(values.get("step")) is int and 0 <= values["step"] < 2**31,
            "val_loss": val_loss is None or type(val_loss) is float,
            "recent_losses": isinstance(losses, list) and all(type(x) is float for x in losses),
            "versions": isinstance(versions, dict) and all(isinstance(x, str) for x in versions.values()),
            "compute_dtype": values["compute_dtype"] in (None, *get_args(Dtype)),
        }
        for name, is_sound in sound.items():
            if name not in values or not is_sound:
                raise UserError(f"{name} is missing or not what it should be")
        read = {
            "config": Config.from_stored(values["config"]),
            "tokenizer": CharTokenizer.from_json(values["tokenizer"]),
        }
        return cls(**{name: values[name] for name in sound} | read)


def read_metadata(checkpoints: Checkpoints, step: int) -> Metadata:
    """What the checkpoint of `step` says of itself.

    Raises:
        DamagedError: nothing that makes sense.
    """
    where = f"checkpoint {checkpoints.folder / str(step)}: {METADATA}"
    try:
        metadata = Metadata.from_dict(checkpoints.metadata(step))
    except DamagedError:
        raise
    except UserError as error:
        raise DamagedError(f"{where}: {error}") from None
    if metadata.step != step:  # a folder that somebody renamed
        raise DamagedError(f"{where}: it is that of step {metadata.step}")
    return metadata
