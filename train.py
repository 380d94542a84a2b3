"""Train a GPT: python train.py --config configs/shakespeare_cpu.py

Every setting of a config can be overridden: --config.model.n_layer=4. The run goes to artifacts/<name of the
config>/, or to --workdir. The same command again resumes it. --deterministic: repeatable to the bit, slower.
"""

import time

STARTED = time.monotonic()  # the seconds of a run count from here, imports included

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from gpt_jax.backend import make_deterministic  # noqa: E402
from gpt_jax.command_line import parse  # noqa: E402
from gpt_jax.compilation import use_compilation_cache  # noqa: E402
from gpt_jax.config import ARTIFACTS  # noqa: E402
from gpt_jax.errors import run_main  # noqa: E402
from gpt_jax.trainer import train  # noqa: E402

flags.declare_key_flag("config")  # so that --help shows it
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


if __name__ == "__main__":
    sys.exit(run_main(main))
