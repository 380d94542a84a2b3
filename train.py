"""Train a GPT: `python train.py --config configs/shakespeare.py`.

Every setting of a config can be overridden, `--config.model.n_layer=4`. Run again, it resumes.
"""

import time

STARTED = time.monotonic()

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from gpt_jax.config import ARTIFACTS, Config  # noqa: E402
from gpt_jax.errors import UserError, run_main  # noqa: E402
from gpt_jax.trainer import train  # noqa: E402

config_flags.DEFINE_config_file("config", help_string="A config file, configs/*.py.")
flags.DEFINE_string("workdir", None, "Where the run goes (default: artifacts/<name of the config>).")


def main() -> int:
    """Parse the flags and train."""
    config_file, config = parse(sys.argv)
    workdir = flags.FLAGS.workdir
    return train(
        config,
        Path(workdir).expanduser() if workdir else ARTIFACTS / config_file.stem,
        STARTED,
    )


def parse(argv: list[str]) -> tuple[Path, Config]:
    """The config file and the settings that the command line asks for."""
    try:
        rest = flags.FLAGS(argv)[1:]
        values = flags.FLAGS.config
    except UserError:
        raise
    except Exception as error:  # absl and ml_collections raise all sorts, and so may a config file
        raise UserError(" ".join(str(error).split()) or repr(error)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags begin with --")
    if values is None:
        raise UserError("--config is missing: try --config configs/shakespeare_cpu.py")
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])), Config.from_dict(values)


if __name__ == "__main__":
    sys.exit(run_main(main))
