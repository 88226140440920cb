"""SIGINT and SIGTERM: raised, collected while training, and deferred while worker processes start."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _in_main_thread() -> bool:
    """Return whether this thread may set signal handlers; a notebook's worker thread may not."""
    return threading.current_thread() is threading.main_thread()


class Stopped(KeyboardInterrupt):
    """A signal in a block of `raised_signals`; no `Exception`, so that it is not reported as a corrupt file."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Raise Stopped at a SIGINT or SIGTERM of the block."""

    def handle(number, frame):
        raise Stopped(number)

    if not _in_main_thread():
        yield
        return
    handlers = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Yield a list that receives the first SIGINT and SIGTERM of the block; a second one acts as before the block.

    If the block ends without an exception, the first one then acts as before the block.
    """
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving a checkpoint and exiting; press again to exit immediately\n".encode())

    if _in_main_thread():
        handlers.update({number: signal.signal(number, handle) for number in STOP_SIGNALS})
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM at the end of the block: a worker that is still starting would print a traceback."""
    if not _in_main_thread():
        yield
        return
    received: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: received.append(number)) for n in STOP_SIGNALS}
    try:
        yield
    finally:
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
    for number in received:
        signal.raise_signal(number)
