"""The two kinds of errors that end a command with one line instead of a traceback."""


class UserError(Exception):
    """Bad input: the message names the thing, its value and what would be right, in one line."""


class RunError(Exception):
    """A run cannot continue (the disk is full, the loss is NaN): one line that says what is still there."""
