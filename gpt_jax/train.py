"""`python -m gpt_jax.train`, the same as train.py: see `commands/train.py`."""

import time

STARTED = time.monotonic()  # most imports come after this line: the seconds of a run include them

import sys  # noqa: E402
from functools import partial  # noqa: E402

from gpt_jax.commands.run_main import READER_PATIENCE, run_main  # noqa: E402
from gpt_jax.commands.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_main(partial(main, STARTED), READER_PATIENCE))
