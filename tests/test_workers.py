"""The cores that a process may use."""

import math
import os

import pytest

from alexnet_jax.runtime import workers


@pytest.mark.parametrize("files,quota", [
    ({"cpu.max": "150000 100000\n"}, 1.5),
    ({"cpu.max": "max 100000\n"}, math.inf),
    ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
    ({}, math.inf),
])  # fmt: skip
def test_a_containers_quota(tmp_path, files, quota):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert workers._cpu_quota(tmp_path) == quota


@pytest.mark.parametrize("affinity,process,count,quota,expected", [
    (6, None, 8, math.inf, 6),
    (6, 3, 8, math.inf, 3),  # Python 3.13
    (None, None, 8, math.inf, 8),  # macOS
    (None, None, None, math.inf, 1),
    (6, None, 8, 1.5, 2),
    (6, None, 8, 0.1, 1),
])  # fmt: skip
def test_cores_of_every_system(monkeypatch, affinity, process, count, quota, expected):
    for name, value in {
        "sched_getaffinity": affinity and (lambda pid: set(range(affinity))),
        "process_cpu_count": process and (lambda: process),
    }.items():
        if value:
            monkeypatch.setattr(os, name, value, raising=False)
        else:
            monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    monkeypatch.setattr(workers, "_cpu_quota", lambda cgroup: quota)
    assert workers.available_cores() == expected
