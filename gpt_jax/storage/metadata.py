"""Metadata of checkpoints and exported models, and migrations of older formats.

docs/code.md says how to change the format.
"""

import copy
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from typing import Any, get_args

from gpt_jax.checks import REMOVED, UnknownSettingError
from gpt_jax.config import Config, Dtype
from gpt_jax.data.tokenizers import Tokenizer, tokenizer_from_json
from gpt_jax.errors import UserError
from gpt_jax.version import __version__

FORMAT_VERSION = 3
PARENT = {"path": str, "source": str, "step": int, "sha256": str}  # of the parameters


class FormatError(UserError):
    """Another version of gpt_jax wrote this, and this version cannot read it. It is not damaged."""


@dataclass(frozen=True)
class Metadata:
    """The metadata of a checkpoint, stored as JSON."""

    config: Config
    tokenizer: Tokenizer
    fingerprint: str  # of the text, see `data/corpus.py`
    step: int  # updates done
    val_loss: float | None  # of the whole validation split at this step; None: not evaluated
    recent_losses: list[float]  # the training losses since the last line of metrics.jsonl
    versions: dict[str, str]  # gpt_jax and the libraries, by name
    compute_dtype: Dtype | None = None  # of the activations in the newest updates; None: not recorded
    val_loss_part: float | None = None  # val_loss of the first `train.eval_tokens` tokens, if that is set
    best_loss: float | None = None  # the lowest validation loss so far
    since_best: int = 0  # evaluations after it
    total_steps: int | None = None  # of the run, where `--minutes` chose them; else `config.train.steps`
    # The numbers of this step, where a stop interrupted its evaluation; a resumed run evaluates it first.
    unfinished: dict[str, float] | None = None
    parent: dict[str, Any] | None = None  # the model of `init_from`: its values are those of `PARENT`
    format_version: int = FORMAT_VERSION  # version it was stored in

    def to_dict(self) -> dict[str, Any]:
        """The metadata as values that JSON has."""
        return vars(self) | {"config": self.config.to_dict(), "tokenizer": self.tokenizer.to_json()}

    def losses(self) -> dict[str, float]:
        """The validation losses of this step by name."""
        losses = {"val_loss": self.val_loss, "val_loss_part": self.val_loss_part}
        return {name: loss for name, loss in losses.items() if loss is not None}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Metadata":
        """The inverse of `to_dict`, for any format version; raises a `FormatError` if it cannot be read.

        A `UserError` names what is missing or wrong.
        """
        defaults = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        values = defaults | migrate(stored)
        for name, is_valid in _VALID.items():
            if name not in values or not is_valid(values[name]):
                raise UserError(f"{name} is missing or has a wrong value")
        try:
            config = Config.from_dict(values["config"])
        except UnknownSettingError as error:
            raise _unsupported(error, values) from None
        read = {"config": config, "tokenizer": tokenizer_from_json(values["tokenizer"])}
        return cls(**{name: values[name] for name in _VALID} | read)


def _is_loss(value: Any) -> bool:
    return value is None or type(value) is float


_VALID: dict[str, Callable[[Any], bool]] = {
    "format_version": lambda _: True,  # checked by `migrate`
    "config": lambda _: True,  # checks itself
    "tokenizer": lambda value: isinstance(value, str),
    "fingerprint": lambda value: isinstance(value, str),
    "step": lambda value: type(value) is int and 0 <= value < 2**31,
    "val_loss": _is_loss,
    "val_loss_part": _is_loss,
    "best_loss": _is_loss,
    "since_best": lambda value: type(value) is int and value >= 0,
    "recent_losses": lambda value: isinstance(value, list) and {*map(type, value)} <= {float},
    "versions": lambda value: isinstance(value, dict) and {*map(type, value.values())} <= {str},
    "compute_dtype": lambda value: value in (None, *get_args(Dtype)),
    "total_steps": lambda value: value is None or (type(value) is int and 0 < value < 2**31),
    "unfinished": lambda value: (
        value is None or (isinstance(value, dict) and {*map(type, value.values())} <= {int, float})
    ),
    "parent": lambda value: (
        value is None or (isinstance(value, dict) and {k: type(v) for k, v in value.items()} == PARENT)
    ),
}


def library_versions() -> dict[str, str]:
    """The versions to record."""
    libraries = ("jax", "flax", "optax", "orbax-checkpoint")
    return {"gpt_jax": __version__} | {name: version(name) for name in libraries}


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """Metadata of any version, as stored, in the current format; "format_version" stays what it was.

    Raises a `FormatError` if a newer gpt_jax wrote it, or if it cannot be read any more.
    """
    stored = values.get("format_version")
    if type(stored) is not int or stored < 1:
        raise UserError(f"format_version = {stored!r} must be a positive integer")
    if stored > FORMAT_VERSION:
        raise FormatError(
            f"format {stored}, written by {_writer(values)}, is newer than format {FORMAT_VERSION} of this "
            f"gpt_jax {__version__}: install the newer version"
        )
    if stored < min(MIGRATIONS):
        raise _unsupported(f"format {stored}", values)
    values = copy.deepcopy(values)
    for old in range(stored, FORMAT_VERSION):
        MIGRATIONS[old](values)
    return values


def _unsupported(what: object, values: dict[str, Any]) -> FormatError:
    """An error for something that this version does not have, in metadata that says who wrote it."""
    return FormatError(
        f"{what}; written by {_writer(values)}, and gpt_jax {__version__} does not have it: use the version "
        f"that wrote it"
    )


def _migrate_2(values: dict[str, Any]) -> None:
    """Two settings were removed, and the bigram embedding of a large vocabulary has another hash."""
    config = values.get("config")
    groups = config if isinstance(config, dict) else {}
    for name, without_effect in REMOVED.items():
        group, key = groups.get(name.partition(".")[0]), name.partition(".")[2]
        if isinstance(group, dict) and (value := group.pop(key, without_effect)) != without_effect:
            raise _unsupported(f"{name} = {value!r}", values)
    model, tokenizer = groups.get("model"), values.get("tokenizer")
    if isinstance(model, dict) and model.get("bigram") and isinstance(tokenizer, str):
        vocab_size = tokenizer_from_json(tokenizer).vocab_size
        if (vocab_size + 1) * vocab_size > 2**14:
            raise _unsupported(f"model.bigram with the old hash for {vocab_size:,} tokens", values)


# By version: from its metadata to that of the next version.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {2: _migrate_2}


def _writer(values: dict[str, Any]) -> str:
    versions = values.get("versions")
    found = versions.get("gpt_jax") if isinstance(versions, dict) else None
    return f"gpt_jax {found}" if isinstance(found, str) else "another version of gpt_jax"
