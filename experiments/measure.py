"""What a program costs: operations, bytes, time, and the rates that a device reaches at best."""

import contextlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import sharding
from alexnet_jax.data import Batch
from alexnet_jax.preprocess import Preprocess


def random_batch(shape: tuple[int, ...], batch: int, num_classes: int, mesh=None) -> tuple[Batch, Preprocess]:
    """Random uint8 images [batch, *shape] with labels, on the mesh, and how they reach the network."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch, *shape), dtype=np.uint8)
    labels = random.integers(0, num_classes, batch, dtype=np.int32)
    data = Batch(*sharding.place((images, labels), mesh or sharding.one_device(), sharding.BATCH))
    mean = np.full((1, 1, shape[-1]), 128, np.float32)
    return data, Preprocess(mean, pad=0, crop=shape[0], resize=0, flip=True, lighting=None, scale=1.0)


def flops(traced: jax.stages.Traced) -> float | None:
    """The floating-point operations of a traced function: a multiply-add is two, one with a padding zero none."""
    # Lowered for a TPU, where a convolution is one by its definition: on a CPU `ops.conv` needs fewer multiplications.
    return (traced.lower(lowering_platforms=("tpu",)).cost_analysis() or {}).get("flops")


def device() -> str:
    """The device by its name, a CPU with its cores."""
    here = jax.devices()[0]
    if here.platform != "cpu":
        return here.device_kind
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{found.group(1) if found else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def size(tree: Any) -> int:
    """Bytes of the arrays (or shapes) of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of a compiled program: what it holds at once while it runs, and how much of its input it may overwrite."""
    of = compiled.memory_analysis()
    held = of.argument_size_in_bytes + of.output_size_in_bytes + of.temp_size_in_bytes - of.alias_size_in_bytes
    return {"program_bytes": held, "donated_bytes": of.alias_size_in_bytes}


def device_memory() -> int:
    """Bytes that a program may take: the device's limit, or the memory of the machine on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The peak of memory from here on: of a GPU since its start, of the process (resident) on a CPU under Linux."""

    def __init__(self):
        with contextlib.suppress(OSError):  # another system: the peak since the process started, or nothing at all
            Path("/proc/self/clear_refs").write_text("5")

    def record(self) -> dict[str, int]:
        if stats := jax.devices()[0].memory_stats():
            return {"device_peak_bytes": stats["peak_bytes_in_use"]}
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return {}
        return {"resident_peak_bytes": 1024 * int(status.split("VmHWM:")[1].split()[0])}


def repeats(first: float) -> int:
    """How many calls to measure together, when one takes `first` seconds: a quarter of a second of them, but two."""
    return int(min(1000, max(2, 0.25 // max(first, 1e-9))))


def seconds(call: Callable[[], Any], count: int) -> float:
    """A call's share of `count` calls, one after the other, the device waited for at the end."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def median_seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """The median of `rounds` measurements of a call; one call more comes first."""
    seconds(call, 1)
    count = repeats(seconds(call, 1))
    return statistics.median(seconds(call, count) for _ in range(rounds))


def matmul_rate(dtype: str, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product of that dtype, 2048² on a CPU and 8192² elsewhere: the best of `rounds`."""
    n = 2048 if jax.devices()[0].platform == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    call = partial(jax.jit(jnp.matmul), a, a)
    seconds(call, 1)
    count = repeats(seconds(call, 1))
    return 2 * n**3 / min(seconds(call, count) for _ in range(rounds))


def copy_rate(rounds: int = 5) -> float:
    """Bytes/s, read and written, of scaling 256 MB (1 GB on an accelerator) into other memory: the best of `rounds`."""
    n = (64 if jax.devices()[0].platform == "cpu" else 256) * 1_000_000
    x, y = jnp.ones(n), jnp.zeros(n)
    # Into memory that is there already; XLA's plain copy on a CPU is slower than this, by a factor of five.
    copy = jax.jit(lambda x, y: 1.5 * x, donate_argnums=1, keep_unused=True)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        y = jax.block_until_ready(copy(x, y))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(times[1:])
