"""Bad input ends in one line for the user, never in a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message names the thing, its value and what would be right, in one line."""


def run_main(main: Callable[[], int | None]) -> int:
    """Call `main`; turn a `UserError` into one line on stderr.

    Returns:
        The exit status: what `main` returns (None is 0), or 2 for bad input.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
