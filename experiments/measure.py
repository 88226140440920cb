"""Operations, bytes and seconds of a program, and the highest rates of a device."""

import contextlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import sharding
from alexnet_jax.data import Batch
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.runtime.workers import counted_cores


def random_batch(shape: tuple[int, ...], batch: int, num_classes: int, mesh=None) -> tuple[Batch, Preprocess]:
    """Return random uint8 images [batch, *shape] with labels, on the mesh, and their preprocessing."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch, *shape), dtype=np.uint8)
    labels = random.integers(0, num_classes, batch, dtype=np.int32)
    data = Batch(*sharding.place((images, labels), mesh or sharding.one_device(), sharding.BATCH))
    mean = np.full((1, 1, shape[-1]), 128, np.float32)
    return data, Preprocess(mean, pad=0, crop=shape[0], resize=0, flip=True, lighting=None, scale=1.0)


def flops(traced: jax.stages.Traced) -> float | None:
    """Return the floating-point operations of a traced function; a multiply-add is two, with a padding zero none."""
    # Lowered for a platform without implementations of its own: Winograd's convolution on a CPU and crops by products
    # on a TPU have other counts.
    return (traced.lower(lowering_platforms=("rocm",)).cost_analysis() or {}).get("flops")


def device() -> str:
    """Return the name of the device; of a CPU with its cores."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return first.device_kind
    name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{name.group(1) if name else 'CPU'}, {counted_cores()}"


def size(tree: Any) -> int:
    """Return the bytes of the arrays (or shapes) of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Return the bytes of a compiled program: its memory while it runs, and how much of its input is donated."""
    sizes = compiled.memory_analysis()
    donated = sizes.alias_size_in_bytes
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - donated
    return {"program_bytes": total, "donated_bytes": donated}


def device_memory() -> int:
    """Return the bytes that a program may allocate: the device's limit, or on a CPU the memory of the machine."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The peak of memory: of a GPU since its start, on a CPU the process's resident memory since this was created."""

    def __init__(self):
        with contextlib.suppress(OSError):  # not Linux
            Path("/proc/self/clear_refs").write_text("5")

    def record(self) -> dict[str, int]:
        """Return the bytes with the name of what they are; nothing on a CPU without Linux."""
        if stats := jax.devices()[0].memory_stats():
            return {"device_peak_bytes": stats["peak_bytes_in_use"]}
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return {}
        return {"resident_peak_bytes": 1024 * int(status.split("VmHWM:")[1].split()[0])}


def repeats(first: float) -> int:
    """Return how many calls of `first` seconds to time together: as many as take 0.25 s, at least two."""
    return int(min(1000, max(2, 0.25 // max(first, 1e-9))))


def seconds(call: Callable[[], Any], count: int) -> float:
    """Return the seconds of a call, the mean of `count` in sequence, until the device has finished the last."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def median_seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """Return the median of `rounds` measurements of a call; the first call is not counted."""
    seconds(call, 1)
    count = repeats(seconds(call, 1))
    return statistics.median(seconds(call, count) for _ in range(rounds))


def matmul_rate(dtype: str, rounds: int = 5) -> float:
    """Return FLOP/s of a square matrix product, 2048² on a CPU and 8192² elsewhere: the highest of `rounds`."""
    n = 2048 if jax.devices()[0].platform == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    call = partial(jax.jit(jnp.matmul), a, a)
    seconds(call, 1)
    count = repeats(seconds(call, 1))
    return 2 * n**3 / min(seconds(call, count) for _ in range(rounds))


def copy_rate(rounds: int = 5) -> float:
    """Return bytes/s, read and written, of scaling 256 MB (1 GB on an accelerator): the highest of `rounds`."""
    n = (64 if jax.devices()[0].platform == "cpu" else 256) * 1_000_000
    x, y = jnp.ones(n), jnp.zeros(n)
    # Into memory that is allocated already, which is faster than a plain copy on a CPU.
    copy = jax.jit(lambda x, y: 1.5 * x, donate_argnums=1, keep_unused=True)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        y = jax.block_until_ready(copy(x, y))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(times[1:])


def rates(dtypes: Sequence[str], rounds: int, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the highest rates of the device, now or `before`: `matmul` in FLOP/s by dtype, `copy` in bytes/s."""
    now = {"matmul": {dtype: matmul_rate(dtype, rounds) for dtype in dtypes}, "copy": copy_rate(rounds)}
    return jax.tree.map(max, before, now) if before else now
