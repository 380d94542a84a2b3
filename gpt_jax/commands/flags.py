"""The flag --config and its settings, for commands that take a config file."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gpt_jax.commands.arguments import describe_unknown
from gpt_jax.commands.paths import CHECKOUT
from gpt_jax.config import RENAMED, Config, flatten
from gpt_jax.errors import UserError

# Config files are in the repository only.
EXAMPLE = (
    "--config configs/shakespeare_cpu.py" if CHECKOUT else "--config FILE, a Python file with get_config()"
)

config_flags.DEFINE_config_file("config", help_string="A config file, such as configs/smoke.py.")


def parse(argv: list[str]) -> tuple[Path, Config]:
    """The config file and the settings of a command line; the other flags are then in `absl.flags.FLAGS`.

    Raises:
        UserError: an unknown flag or setting, a bad value, or no config file.
    """
    names = _names()
    for argument in argv:
        if argument.startswith("--config."):
            _check_setting(argument, names)
    try:
        rest = flags.FLAGS(argv)[1:]
        values = flags.FLAGS.config and flags.FLAGS.config.to_dict()
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):  # these exist only together with --config
            raise UserError(f"--config is missing: try {EXAMPLE}") from None
        raise UserError(describe_unknown(f"--{error.flagname}", names)) from None
    except Exception as error:  # absl, ml_collections and config files raise many types
        what = "unknown setting " if isinstance(error, KeyError | AttributeError) else ""
        text = str(error.args[0] if error.args else repr(error)).replace(r"\n", " ")
        if "No such file" in text:
            what = f"no such config file: try {EXAMPLE}; "
        raise UserError(what + " ".join(text.replace("\\", "").replace("'", "").split())) from None
    if rest:
        raise UserError(describe_unknown(rest[0], names))
    if values is None:
        raise UserError(f"--config is missing: try {EXAMPLE}")
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])), Config.from_dict(values)


def _names() -> list[str]:
    """The flags of this program, without those of libraries."""
    modules = flags.FLAGS.flags_by_module_dict()
    return [flag.name for module, found in modules.items() if module.startswith("gpt_jax.") for flag in found]


def _check_setting(argument: str, names: list[str]) -> None:
    name = argument.removeprefix("--config.").partition("=")[0]
    if name in RENAMED:
        raise UserError(f"unknown setting {name}: it is now called {RENAMED[name]}")
    if name not in flatten(Config()):
        raise UserError(describe_unknown(argument, names))
