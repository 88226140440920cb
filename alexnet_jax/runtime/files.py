"""Files that appear complete or not at all, locks, and the paths that a user names."""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alexnet_jax.errors import UserError

log = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of file systems such as Lustre's and FUSE's


def user_path(path: str | Path, name: str) -> Path:
    """Return the path that a user gives as `name`, a flag or a field of a config, with `~` expanded.

    Raises:
      UserError: an empty path, an unknown user after `~`, or the address of a bucket.
    """
    text = os.fspath(path)
    if not text:
        raise UserError(f"{name} is empty; expected a path (. for the current folder)")
    if re.match(r"\w{2,}:/", text):  # pathlib makes one slash of two
        raise UserError(f"{name}={text}: expected a path on a disk; copy a bucket to one, or mount it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{name}={text}: ~ has no home directory here; expected a path without it") from None


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it replaces `path` when the block ends, and is removed if it raises."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def finite(value: Any) -> Any:
    """Return a value of JSON's types with None for each number that is not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, the complete file or nothing; raises OSError."""
    with replaced(path) as temporary, open(temporary, "w") as file:
        json.dump(finite(value), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one per line; a line that a power failure truncated is dropped with a warning.

    Raises:
      OSError: the file cannot be read.
    """
    objects = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            log.warning("Warning: line %d of %s is incomplete; dropped", number, path)
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


def raise_open_files_limit() -> None:
    """Raise this process's limit of open files as far as the system allows: a data set may have thousands of files."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS reports no limit and takes none
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
