"""`python -m gpt_jax COMMAND`: see `commands/main.py`."""

import time

STARTED = time.monotonic()  # the seconds of a run count from here, most imports included

import sys  # noqa: E402

from gpt_jax.commands.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(STARTED))
