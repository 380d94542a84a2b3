"""Train a GPT: python train.py --config configs/shakespeare_cpu.py

Every setting of a config can be overridden: --config.model.n_layer=4. The run goes to artifacts/<name of the
config>/, or to --workdir. The same command again resumes it. --deterministic: repeatable to the bit, slower.
"""

import time

STARTED = time.monotonic()  # the seconds of a run count from here, imports included

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from gpt_jax.backend import make_deterministic  # noqa: E402
from gpt_jax.compilation import use_compilation_cache  # noqa: E402
from gpt_jax.config import ARTIFACTS, Config  # noqa: E402
from gpt_jax.errors import UserError, run_main  # noqa: E402
from gpt_jax.trainer import train  # noqa: E402

config_flags.DEFINE_config_file("config", help_string="A config file, such as configs/smoke.py.")
flags.DEFINE_string("workdir", None, "Where the run goes.")
flags.DEFINE_bool("deterministic", False, "Repeatable bit for bit: one CPU thread, no unordered GPU sums.")


def main() -> int:
    """Parse the flags and train."""
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}{flags.FLAGS.main_module_help()}")
        return 0
    config_file, config = parse(sys.argv)
    if flags.FLAGS.deterministic:
        make_deterministic()
    use_compilation_cache()
    return train(config, Path(flags.FLAGS.workdir or ARTIFACTS / config_file.stem).expanduser(), STARTED)


def parse(argv: list[str]) -> tuple[Path, Config]:
    """The config file and the settings that the command line asks for."""
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


if __name__ == "__main__":
    sys.exit(run_main(main))
