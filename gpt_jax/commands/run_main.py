"""Run a command's `main`: errors become one line on stderr and an exit status."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from gpt_jax.errors import RunError, UserError
from gpt_jax.monitor.output import steady_output


def run_main(main: Callable[[], int | None]) -> int:
    """Call `main`, and turn an error that a user can fix into one line on stderr.

    Returns:
        The exit status: what `main` returns (None is 0), or 2 for bad input or a file that cannot be used. A
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
    """Exit without waiting for other threads, as sys.exit would.

    After a failed save, Orbax's threads can wait ten minutes for the rest of it. All that could be saved is
    on the disk by now.
    """
    os._exit(status)
