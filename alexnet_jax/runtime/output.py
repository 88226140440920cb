"""Output in any encoding: what it cannot encode is printed as an escape. The name of a command in its help."""

import io
import sys
from pathlib import Path


def escape_output() -> None:
    """Print a character that the encoding of stdout or stderr lacks as an escape, such as \\xe9; a command calls it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            stream.reconfigure(errors="backslashreplace")


def escaped(text: str) -> str:
    """Return text of a file's name with what is not UTF-8 as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def command_name(module: str) -> str:
    """Return the command as it was called, for its help: the script that pip installs, or `python -m` with a module."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("alexnet-") else f"python -m {module}"
