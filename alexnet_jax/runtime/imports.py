"""Libraries that change the user's logging."""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def unchanged_logging() -> Iterator[None]:
    """Remove the handlers that the block adds to the root logger, as absl does when TFDS or Orbax first logs."""
    handlers = logging.root.handlers[:]
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers


@unchanged_logging()
def import_quietly(name: str) -> Any:
    """Import a module and return it; a handler that this adds to the root logger, as Grain and Orbax do, is removed."""
    return importlib.import_module(name)
