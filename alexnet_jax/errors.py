"""The base class of errors that a user can correct, and an exception's text on one line."""


class UserError(Exception):
    """An error whose text is for the user: what is wrong, what was expected, what to do.

    The commands print the text without a traceback and exit with code 1.
    """


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return an exception's text on one line of at most `limit` characters, or the name of its type if it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
