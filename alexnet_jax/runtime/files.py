"""Files that appear complete or not at all, and locks."""

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of file systems such as Lustre's and FUSE's


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it replaces `path` when the block ends without an exception."""
    temporary = path.with_name(f"{path.name}.tmp")
    yield temporary
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, the complete file or nothing; raises OSError."""
    with replaced(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one a line; a line that a power failure has torn is dropped with a warning.

    Raises:
      OSError: the file cannot be read.
    """
    objects = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            objects.append(json.loads(line))
        except ValueError:
            log.warning("Warning: line %d of %s is torn; dropped", number, path)
    return objects


def lock(file: int, path: Path, wait: bool = False) -> None:
    """Lock an open file against other processes; the system releases the lock when the file is closed.

    A file system without locks is named in a warning, and nothing is locked.

    Args:
      file: its descriptor.
      path: is named in the warning.
      wait: wait for the process that holds the lock.

    Raises:
      BlockingIOError: another process holds it, unless `wait`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("Warning: %s is on a file system without locks; start one process at a time in it", path)
