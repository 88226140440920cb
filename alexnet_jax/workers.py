"""Processes that work for this one."""

import multiprocessing
import os
import signal
import threading


def start_worker() -> None:
    """Called in a worker first: leaves Ctrl-C to the parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
