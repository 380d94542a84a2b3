"""`sample --interactive`: type a line, and the model continues it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count

from gpt_jax.errors import UserError


def prompt_loop(stream: Callable[[str, int], Iterator[Sequence[str]]]) -> None:
    """Continue each line of stdin, on stdout, until there are no more (Ctrl-D).

    On a terminal, Ctrl-C ends a text, or the line that is being typed, and not the program; the lines can be
    edited, and the arrow keys bring back earlier ones.

    Args:
        stream: a function of a line and its number that yields the pieces of its text.
    """
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - `input` uses it
    is_typed = sys.stdin.isatty()
    for number in count():
        try:
            line = input("> " if is_typed else "")
            for texts in stream(line, number):
                print(texts[0], end="", flush=True)
        except EOFError:
            break
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except UnicodeError:
            print("error: the line is not UTF-8", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            if not is_typed:
                raise
        print(flush=True)
    if is_typed:
        print(flush=True)  # the line of the prompt has no end
