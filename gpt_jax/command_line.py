"""The flag --config and its settings, for commands that take a config file."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gpt_jax.config import Config
from gpt_jax.errors import UserError

config_flags.DEFINE_config_file("config", help_string="A config file, such as configs/smoke.py.")


def parse(argv: list[str]) -> tuple[Path, Config]:
    """The config file and the settings that the command line asks for; other flags go to `absl.flags.FLAGS`.

    Raises:
        UserError: an unknown flag or setting, a bad value, or no config file.
    """
    try:
        rest = flags.FLAGS(argv)[1:]
        values = flags.FLAGS.config and flags.FLAGS.config.to_dict()
    except Exception as error:  # absl, ml_collections and config files raise all sorts
        what = "unknown setting " if isinstance(error, KeyError | AttributeError) else ""
        text = str(error.args[0] if error.args else repr(error)).replace(r"\n", " ")
        if "No such file" in text:
            what = "no config file there: try --config configs/shakespeare_cpu.py; "
        raise UserError(what + " ".join(text.replace("\\", "").replace("'", "").split())) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags begin with --")
    if values is None:
        raise UserError("--config is missing: try --config configs/shakespeare_cpu.py")
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])), Config.from_dict(values)
