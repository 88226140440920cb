"""Worker processes of this process: how many, how they start, and that they end."""

import contextlib
import math
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from alexnet_jax.runtime.signals import deferred_signals


def available_cores() -> int:
    """Return the number of CPU cores that this process may use: those of the system, its affinity and its container."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; respects the affinity and $PYTHON_CPU_COUNT
        cores = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1  # macOS
    return max(1, math.ceil(min(cores, _cpu_quota(Path("/sys/fs/cgroup")))))


def counted_cores() -> str:
    """Return the number of these cores as text."""
    cores = available_cores()
    return f"{cores} core{'s' if cores > 1 else ''}"


def _cpu_quota(cgroup: Path) -> float:
    """Return how many cores' time a container may use: of cgroup v2 or v1; infinite without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return math.inf
    try:
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (ValueError, ZeroDivisionError):  # "max"
        return math.inf


MAIN_GUARD = (
    "a worker cannot start, because it imports the script that started it: expected a file whose calls stand below "
    'if __name__ == "__main__":'
)


@contextlib.contextmanager
def started_workers() -> Iterator[list[BaseProcess]]:
    """Yield a list that receives, at the end of the block, the processes that it has started.

    They never receive SIGINT and SIGTERM, and this process receives them at the end of the block.
    """
    before = set(multiprocessing.active_children())
    workers: list[BaseProcess] = []
    with deferred_signals():
        try:
            yield workers
        finally:
            workers += set(multiprocessing.active_children()) - before


def kill(workers: Iterable[BaseProcess]) -> None:
    """End processes at once, whatever they do."""
    for worker in workers:
        worker.kill()


def start_worker() -> None:
    """Exit when the parent does; a worker calls this first."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
