"""Imports of libraries that change the user's logging."""

import importlib
import logging
from typing import Any


def import_quietly(name: str) -> Any:
    """Return a module, imported without the handler that its import gives the root logger, as Grain's and Orbax' do."""
    handlers = logging.root.handlers[:]
    module = importlib.import_module(name)
    logging.root.handlers[:] = handlers
    return module
