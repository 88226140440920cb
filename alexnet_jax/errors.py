"""The base class of errors that a user can correct, and errors on one line."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """An error whose text is for the user: what is wrong, what was expected, what to do.

    The commands print the text without a traceback and exit with code 1.
    """


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return an exception's text on one line of at most `limit` characters, or the name of its type if it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


@contextlib.contextmanager
def errors_on_one_line() -> Iterator[None]:
    """Print a UserError or OSError of the block on one line and exit with code 1; other errors keep their traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
