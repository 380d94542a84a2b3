"""`python -m gpt_jax COMMAND`, which is also the console script `gpt-jax`."""

import difflib
import importlib
import sys
import time
from typing import Any

from gpt_jax.commands.run_main import run_main
from gpt_jax.errors import UserError

COMMANDS = {
    "train": "train a GPT, or resume a run that was stopped",
    "sample": "write text with a trained model",
    "evaluate": "the loss of a trained model on a text",
    "explain": "what a trained model makes of a text: surprise, guesses, attention",
    "plots": "draw the losses, learning rate, gradient norm and speed of runs",
    "prepare": "tokenize texts once, for runs that read them from files",
    "export": "write a trained model to a folder of a few megabytes",
    "compile": "what a run costs on absent TPUs or GPUs, read from its programs",
}
HELP = """\
usage: python -m gpt_jax COMMAND [flags]

A small GPT trainer in JAX and Flax.

commands:
{commands}

python -m gpt_jax COMMAND --help shows the flags of a command.

examples:
  python -m gpt_jax train --config configs/smoke.py --workdir runs/a
  python -m gpt_jax sample --workdir runs/a --length 1000"""


def main(started: float | None = None) -> int:
    """Run the command that the process's arguments name; the exit status.

    Args:
        started: when the process started, by `time.monotonic`; None: now.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    started = time.monotonic() if started is None else started

    def run() -> Any:
        if name in ("-h", "--help"):
            print(HELP.format(commands="\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())))
            return 0
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {name!r}: {meant}")
        # Imported by name: each command imports only what it needs.
        command = importlib.import_module(f"gpt_jax.commands.{name}").main
        return command(arguments, started) if name == "train" else command(arguments)

    return run_main(run)


def old_form(name: str, module: str) -> None:
    """End `python -m gpt_jax.<name>` with its new form. `module`: the caller's `__name__`."""
    if module == "__main__":
        print(f"error: python -m gpt_jax.{name} is now called python -m gpt_jax {name}", file=sys.stderr)
        sys.exit(2)
