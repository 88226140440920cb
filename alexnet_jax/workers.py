"""Processes that work for this one."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator


def start_worker() -> None:
    """Called in a worker first: leaves Ctrl-C to the parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM come at the end of the block: a worker that is half started dies with a traceback."""
    if threading.current_thread() is not threading.main_thread():  # which has the handlers
        yield
        return
    received = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received:
        signal.raise_signal(number)
