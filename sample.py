"""Write text with a trained model: python sample.py --length 10000 (see gpt_jax/commands/sample.py)."""

import sys

from gpt_jax.commands.run_main import run_main
from gpt_jax.commands.sample import main

if __name__ == "__main__":
    sys.exit(run_main(main))
