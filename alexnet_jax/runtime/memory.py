"""How much memory is free on the devices of this process."""

import math
from pathlib import Path

import jax


def free_bytes(devices: list[jax.Device]) -> int | None:
    """Return the free memory of each of these devices of this process, the least of them; None if it is not known.

    Devices of a CPU share the memory of the machine, or of its container.
    """
    if devices[0].platform == "cpu":
        host = min(_machine_bytes(Path("/proc/meminfo")), _container_bytes(Path("/sys/fs/cgroup")))
        return None if host == math.inf else int(host / len(devices))
    stats = [device.memory_stats() or {} for device in devices]
    if any("bytes_limit" not in x for x in stats):
        return None
    return min(x["bytes_limit"] - x.get("bytes_in_use", 0) for x in stats)


def _machine_bytes(meminfo: Path) -> float:
    """Return the memory that is available without swapping; infinite if the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return math.inf


def _container_bytes(cgroup: Path) -> float:
    """Return the memory that a container may still use: of cgroup v2 or v1; infinite without a limit."""
    for folder, limit, used, cache in (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(stat.get(cache, 0))
            return int((folder / limit).read_text()) - taken
        except (OSError, ValueError):  # "max"
            continue
    return math.inf
