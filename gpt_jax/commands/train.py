"""The command train."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt_jax.commands.arguments import ArgumentParser, config_of
from gpt_jax.config_files import describe_configs
from gpt_jax.errors import UserError
from gpt_jax.parallel.devices import local_devices, make_deterministic
from gpt_jax.paths import ARTIFACTS, EXAMPLE_CONFIG, expand
from gpt_jax.storage.checkpoints import hide_tracebacks_of_orbax
from gpt_jax.storage.compilation_cache import use_compilation_cache
from gpt_jax.trainer.run import train

PURPOSE = "Train a GPT. The same command resumes a run that was stopped."
EXAMPLES = (
    "--config configs/shakespeare_cpu.py --minutes 5",
    "--config configs/smoke.py --config.train.steps=50",
)


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """Parse the flags and train.

    Args:
        arguments: the command line's; None: those of the process.
        started: when the process started, by `time.monotonic`; the seconds of the run count from there.
    """
    started = time.monotonic() if started is None else started
    parser = ArgumentParser("train", PURPOSE, EXAMPLES, takes_config=True)
    flag = parser.add_argument
    flag("--workdir", type=Path, metavar="DIR", help="the run (artifacts/<name of the config>)")
    flag("--minutes", type=float, metavar="M", help="make as many steps as fit into this time")
    flag("--deterministic", action="store_true", help="the same bits in each run: one CPU thread, slower")
    flags = parser.parse_args(arguments)
    if flags.config is None and (configs := describe_configs()):
        device = local_devices()[0]
        fitting = EXAMPLE_CONFIG if device.platform == "cpu" else "configs/shakespeare.py"
        print(f"configs/ has:\n{configs}", file=sys.stderr)
        kind = "CPU" if device.platform == "cpu" else device.device_kind
        raise UserError(f"--config is missing: try --config {fitting}, which suits this {kind}")
    config = config_of(flags)
    if flags.deterministic:
        make_deterministic()
    use_compilation_cache()
    hide_tracebacks_of_orbax()
    workdir = flags.workdir or ARTIFACTS / flags.config.stem
    return train(config, expand(workdir), started, flags.minutes)
