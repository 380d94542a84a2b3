"""Train a GPT: python train.py --config configs/shakespeare_cpu.py (see gpt_jax/commands/train.py)."""

import time

STARTED = time.monotonic()  # the seconds of a run count from here, imports included

import sys  # noqa: E402
from functools import partial  # noqa: E402

from gpt_jax.commands.run_main import run_main  # noqa: E402
from gpt_jax.commands.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_main(partial(main, started=STARTED)))
