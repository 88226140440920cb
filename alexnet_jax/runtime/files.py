"""Files that appear complete or not at all."""

import contextlib
import json
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it replaces `path` when the block ends without an exception."""
    temporary = path.with_name(f"{path.name}.tmp")
    yield temporary
    temporary.replace(path)


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


def raise_open_files_limit() -> None:
    """Raise this process's limit of open files as far as the system allows: a data set may have thousands of files."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS reports no limit and takes none
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
