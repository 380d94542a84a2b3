"""What goes wrong ends in one line, never in a traceback."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from gpt_jax.output import steady_output


class UserError(Exception):
    """Bad input: the message names the thing, its value and what would be right, in one line."""


class RunError(Exception):
    """A run cannot go on (the disk is full, the loss is NaN): one line that says what is still there."""


def run_main(main: Callable[[], int | None]) -> int:
    """Call `main`; turn what goes wrong in a way that a user can mend into one line on stderr.

    Returns:
        The exit status: what `main` returns (None is 0), 2 for bad input or a file that cannot be used. A
        `RunError` ends the process at once, with 1, and Ctrl-C with 130.
    """
    with steady_output():
        try:
            return main() or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            _end_at_once(1)
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            _end_at_once(130)
        return 2


def _end_at_once(status: int) -> NoReturn:
    """Not by sys.exit, which waits for all threads.

    After a save that failed, those of Orbax 0.12 can wait ten minutes for the rest of it. What could be kept
    is on the disk by now.
    """
    os._exit(status)
