"""The settings of a run from a config file, from Python values, and from overrides of single settings."""

import ast
import json
import runpy
import textwrap
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from gpt_jax.checks import REMOVED, unknown_setting
from gpt_jax.config import Config, flatten
from gpt_jax.errors import UserError
from gpt_jax.paths import CHECKOUT, expand

GET_CONFIG = "a config file is a Python file whose get_config() returns a ml_collections.ConfigDict"


def read_config(
    source: Config | Mapping[str, Any] | ml_collections.ConfigDict | str | Path,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Settings, all of them checked, with `overrides` such as {"train.batch_size": 16}.

    The path of a config file can be that of Python with a `get_config()`, or of the JSON of a run
    (config.json) or of an exported model (model.json).

    Raises:
        UserError: the file cannot be used, or a setting is wrong: one line that names it.
    """
    if isinstance(source, str | Path):
        source = _read_file(expand(source))
    if not isinstance(source, Config | Mapping | ml_collections.ConfigDict):
        raise UserError(f"config = {source!r} must be settings, or the path of a config file")
    values: Any = source if isinstance(source, Mapping) else source.to_dict()
    values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    known = flatten(Config())
    for name, value in (overrides or {}).items():
        if name not in known:
            raise unknown_setting("", name, known)
        group, _, key = name.rpartition(".")
        target = values.setdefault(group, {}) if group else values
        if not isinstance(target, dict):
            raise UserError(f"{group} = {target!r} must be a group of settings")
        target[key] = value
    return Config.from_dict(values)  # only now: a file's values may be valid with the overrides only


def describe_configs() -> str:
    """The config files of the repository, a line each, from their docstrings; "" where there are none."""
    lines = []
    for path in sorted((CHECKOUT / "configs").glob("*.py")) if CHECKOUT else ():
        about = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        lines.append(f"  {path.name:<23}  {textwrap.shorten(about, 52, placeholder=' ...')}")
    return "\n".join(lines)


def _read_file(path: Path) -> Any:
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"config file {path} {reason}: {GET_CONFIG}")
    if path.suffix == ".json":
        return _read_json(path)
    try:
        names = runpy.run_path(str(path))
        get_config = names.get("get_config")
        config = get_config() if callable(get_config) else None
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"config file {error.filename}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # whatever the user's code raises
        here = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {here[-1].lineno}" if here else ""
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"config file {path}{line}: {what}") from None
    if not callable(get_config):
        is_nanogpt = "batch_size" in names or "n_layer" in names
        hint = " (nanoGPT's settings have other names here: --config.train.batch_size)" if is_nanogpt else ""
        raise UserError(f"config file {path} has no get_config(): {GET_CONFIG}{hint}")
    if not isinstance(config, Config | Mapping | ml_collections.ConfigDict):
        raise UserError(f"config file {path}: get_config() returned {type(config).__name__}; {GET_CONFIG}")
    return config


def _read_json(path: Path) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"config file {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path} is not a JSON object with settings")
    settings = values.get("config", values)  # an exported model has its settings in "config"
    for name, without_effect in REMOVED.items():
        group, key = name.split(".")
        stored = settings.get(group) if isinstance(settings, dict) else None
        if isinstance(stored, dict) and stored.pop(key, without_effect) != without_effect:
            raise UserError(f"config file {path} sets {name}, which this version does not have")
    return settings
