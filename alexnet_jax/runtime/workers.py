"""Worker processes of this process."""

import multiprocessing
import os
import signal
import threading


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit when the parent does; a worker calls this first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
