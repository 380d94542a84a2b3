"""Train a GPT: python train.py --config configs/shakespeare_cpu.py

Every setting of a config can be overridden: --config.model.n_layer=4. The run goes to artifacts/<name of the
config>/, or to --workdir. The same command resumes it. --minutes 5: fewer steps, where needed, to end within
that time. --deterministic: repeatable to the bit, but slower.
"""

import sys
import time
from pathlib import Path

from absl import flags

from gpt_jax.commands.flags import parse
from gpt_jax.commands.paths import ARTIFACTS
from gpt_jax.commands.training_run import train
from gpt_jax.parallel.devices import make_deterministic
from gpt_jax.storage.compilation_cache import use_compilation_cache

flags.declare_key_flag("config")  # so that --help shows it
flags.DEFINE_string("workdir", None, "The folder of the run.")
flags.DEFINE_float("minutes", None, "Make as many steps as fit into this time, train.steps at most.")
flags.DEFINE_bool("deterministic", False, "Repeatable bit for bit: one CPU thread, no unordered GPU sums.")


def main(started: float | None = None) -> int:
    """Parse the flags and train.

    Args:
        started: when the process started, by `time.monotonic`; the seconds of the run count from there.
    """
    started = time.monotonic() if started is None else started
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}{flags.FLAGS.module_help(__name__)}")
        return 0
    config_file, config = parse(sys.argv)
    if flags.FLAGS.deterministic:
        make_deterministic()
    use_compilation_cache()
    workdir = Path(flags.FLAGS.workdir or ARTIFACTS / config_file.stem).expanduser()
    return train(config, workdir, started, flags.FLAGS.minutes)
