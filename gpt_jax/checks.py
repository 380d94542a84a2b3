"""Checks of settings: each failure is one line that names the setting, its value and what would be right."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, get_origin

from gpt_jax.errors import UserError

MAX_INT = 2**32  # no integer setting makes sense above this
MAX_UNROLLED = 64  # largest number of copies that a loop in the model's code may compile to

# Old names of settings. Using one is an error that names the new one; stored runs are migrated when read.
RENAMED = {
    "model.embedding_skip": "model.x0_residual",
    "optimizer.final_fraction": "optimizer.min_lr_ratio",
    "train.accumulate": "train.grad_accum_steps",
}
# Settings that are gone, and the value with which they had no effect: stored settings may still have them.
REMOVED = {"optimizer.ema_decay": 0.0, "optimizer.skip_grad_norm_factor": 0.0}


class UnknownSettingError(UserError):
    """A setting, or a choice for one, that does not exist."""


def unknown_setting(prefix: str, key: str, known: Iterable[str]) -> UnknownSettingError:
    """An error that names the nearest of the `known` settings of a group, or the new name of an old one."""
    shown = key if key.isprintable() else repr(key)  # an error is one line
    if prefix + key in RENAMED:
        return UnknownSettingError(
            f"unknown setting {prefix}{shown}: it is now called {RENAMED[prefix + key]}"
        )
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return UnknownSettingError(f"unknown setting {prefix}{shown}: {hint}")


def build(cls: type, values: Any, prefix: str = "") -> Any:
    """A dataclass of settings from nested dictionaries, each key and type checked."""
    if not isinstance(values, dict):
        raise UserError(f"{prefix[:-1] or 'config'} = {values!r} must be a group of settings")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_setting(prefix, str(key), fields)
        wanted = fields[key].type
        if dataclasses.is_dataclass(wanted):
            arguments[key] = build(wanted, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            arguments[key] = _checked(value, wanted, f"{prefix}{key}")
    return cls(**arguments)


def _checked(value: Any, wanted: Any, name: str) -> Any:
    """`value` as type `wanted`; an int serves as a float, a bool never as a number."""
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            choices = ", ".join(map(repr, get_args(wanted)))
            raise UnknownSettingError(f"{name} = {value!r} must be one of {choices}")
        return value
    if type(value) is int and abs(value) > MAX_INT:
        raise UserError(f"{name} must lie within {MAX_INT:,} of 0")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UserError(f"{name} = {value!r} must be of type {wanted.__name__}")
    if wanted is float and not math.isfinite(value):
        raise UserError(f"{name} = {value} must be a finite number")
    return value


# Range checks, by the wording of the error.
RANGES: dict[str, Callable[[float], bool]] = {
    "be above 0": lambda value: value > 0,
    "be 0 or above": lambda value: value >= 0,
    "lie in [0, 1)": lambda value: 0 <= value < 1,
    "lie in [0, 1]": lambda value: 0 <= value <= 1,
    f"be {MAX_UNROLLED} or below": lambda value: value <= MAX_UNROLLED,
}


def check_range(config: Any, group: str, wanted: str, *names: str) -> None:
    """Check settings of a group against one of `RANGES`."""
    for name in names:
        value = getattr(config, name)
        if not RANGES[wanted](value):
            raise UserError(f"{group}.{name} = {value} must {wanted}")


def check_divides(divisor: int, divisor_name: str, number: int, name: str) -> None:
    """Raise `UserError` unless `number` can be divided among `divisor` devices."""
    if number % divisor:
        raise UserError(
            f"{name} = {number} cannot be split equally over {divisor_name} = {divisor} devices: use a "
            f"multiple of {divisor}, or another {divisor_name}"
        )
