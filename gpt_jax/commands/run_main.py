"""Run a command's `main`: errors become one line on stderr and an exit status."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from gpt_jax.errors import RunError, UserError
from gpt_jax.jax_settings import default_jax_settings
from gpt_jax.monitor.output import steady_output


def run_main(main: Callable[[], int | None]) -> int:
    """Call `main`, and turn an error that a user can fix into one line on stderr.

    Args:
        main: the `main` of a command.

    Returns:
        The exit status: what `main` returns (None is 0), or 2 for bad input or a file that cannot be used.
        The process exits at once with 1 on a `RunError`, 130 on Ctrl-C, and 128 + n if signal n stopped it.
    """
    with steady_output(), default_jax_settings():
        try:
            status = main() or 0
            if status > 128:  # a signal stopped it: a thread may still be compiling
                _end_at_once(status)
            return status
        except UserError as error:
            _print_error(error)
        except RunError as error:
            _print_error(error)
            _end_at_once(1)
        except OSError as error:
            if error.filename is None:
                raise
            _print_error(f"{error.filename}: {error.strerror}")
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            _end_at_once(130)
        return 2


def _print_error(error: object) -> None:
    """One line, even if a path in it has two."""
    print("error: " + str(error).replace("\n", r"\n"), file=sys.stderr)


def _end_at_once(status: int) -> NoReturn:
    """Exit without waiting for other threads, as sys.exit would.

    After a failed save, Orbax's threads can wait ten minutes for the rest of it. All that could be saved is
    on the disk by now.
    """
    os._exit(status)
