"""`python -m gpt_jax.export`: see `commands/export.py`."""

import sys

from gpt_jax.commands.export import main
from gpt_jax.commands.run_main import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
