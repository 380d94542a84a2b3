"""The version of the format of checkpoints and exported models, and how older versions are read.

Version 1 (until November 2026) had no `format_version`, other names for some settings, and exported models
with unstacked layers. To change the format: raise `FORMAT_VERSION`, add a function to `MIGRATIONS` that turns
the metadata of the version before into the new one, rename arrays in `RENAMED_ARRAYS`, and keep a small
checkpoint and a small exported model of the new version in tests/data/.
"""

import copy
from collections.abc import Callable
from typing import Any

from gpt_jax.config import RENAMED
from gpt_jax.errors import UserError
from gpt_jax.version import __version__

FORMAT_VERSION = 2


class FormatError(UserError):
    """Another version of gpt_jax wrote this, and this version cannot read it. It is not damaged."""


# By version: names of parameters that the next version changed.
RENAMED_ARRAYS = {1: {"embedding_skip": "x0_residual"}}


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """Metadata of any version, as stored, in the current format.

    Raises:
        FormatError: a newer gpt_jax wrote it.
    """
    version = format_version(values)
    if version > FORMAT_VERSION:
        raise FormatError(
            f"format {version}, written by {_writer(values)}, is newer than format {FORMAT_VERSION} of this "
            f"gpt_jax {__version__}: install the newer version"
        )
    values = copy.deepcopy(values)
    for old in range(version, FORMAT_VERSION):
        MIGRATIONS[old](values)
    return values | {"format_version": FORMAT_VERSION}


def format_version(values: dict[str, Any]) -> int:
    """The version that stored metadata is in.

    Raises:
        UserError: it is not a positive integer.
    """
    version = values.get("format_version", 1)
    if type(version) is not int or version < 1:
        raise UserError(f"format_version = {version!r} must be a positive integer")
    return version


def array_names(tree: Any, version: int) -> Any:
    """Rename the keys of a tree from the current names to those of an older version."""
    for old in reversed(range(version, FORMAT_VERSION)):
        tree = _rename(tree, {new: before for before, new in RENAMED_ARRAYS.get(old, {}).items()})
    return tree


def current_array_names(tree: Any, version: int) -> Any:
    """The inverse of `array_names`."""
    for old in range(version, FORMAT_VERSION):
        tree = _rename(tree, RENAMED_ARRAYS.get(old, {}))
    return tree


def removed_setting(error: UserError, values: dict[str, Any]) -> FormatError:
    """For a setting that this version does not have: an error that names the versions."""
    return FormatError(
        f"{error}; written by {_writer(values)}, and gpt_jax {__version__} does not have it: use the version "
        f"that wrote it"
    )


def _migrate_1(values: dict[str, Any]) -> None:
    """Settings were renamed; `unroll` and `remat` were bools."""
    config = values.get("config")
    if not isinstance(config, dict):
        return
    for old, new in RENAMED.items():
        group, name = old.split(".")
        settings = config.get(group)
        if isinstance(settings, dict) and name in settings:
            settings[new.split(".")[1]] = settings.pop(name)
    model = config.get("model")
    if isinstance(model, dict):
        # Their defaults, True and False, become "auto", which does the same on a CPU.
        if isinstance(model.get("unroll"), bool):
            model["unroll"] = "auto" if model["unroll"] else "no"
        if isinstance(model.get("remat"), bool):
            model["remat"] = "block" if model["remat"] else "auto"
    values.setdefault("compute_dtype", None)


MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {1: _migrate_1}


def _rename(tree: Any, names: dict[str, str]) -> Any:
    if isinstance(tree, dict):
        return {names.get(name, name): _rename(leaf, names) for name, leaf in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a NamedTuple, as optax's states are
        return type(tree)(*(_rename(leaf, names) for leaf in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_rename(leaf, names) for leaf in tree)
    return tree


def _writer(values: dict[str, Any]) -> str:
    versions = values.get("versions")
    found = versions.get("gpt_jax") if isinstance(versions, dict) else None
    return f"gpt_jax {found}" if isinstance(found, str) else "another version of gpt_jax"
