"""Bad input ends in one line for the user, never in a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message names the thing, its value and what would be right, in one line."""


def run_main(main: Callable[[], int | None]) -> int:
    """Call `main`; turn a `UserError`, or a file that cannot be used, into one line on stderr.

    Returns:
        The exit status: what `main` returns (None is 0), 2 for bad input, 130 after Ctrl-C.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 2
