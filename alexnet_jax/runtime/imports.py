"""Imports of libraries that change the user's logging."""

import importlib
import logging
from typing import Any


def import_quietly(name: str) -> Any:
    """Import a module and return it; a handler that this adds to the root logger, as Grain and Orbax do, is removed."""
    handlers = logging.root.handlers[:]
    module = importlib.import_module(name)
    logging.root.handlers[:] = handlers
    return module
