"""The mesh of devices and the sharding of arrays: the two GPUs of section 3.2, in addition to data parallelism.

Images and labels are split over the axis `data`. Every kernel and bias, its gradient and its momentum are split over
the axis `tower` along the output channels (units), and are never gathered; `model.AlexNet` gathers activations, at the
layers that figure 2 of the paper connects to both towers.
"""

import contextlib
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax.errors import UserError, one_line
from alexnet_jax.runtime.workers import available_cores

DATA, TOWER = "data", "tower"
REPLICATED = PartitionSpec()
BATCH = PartitionSpec(DATA)


class DeviceError(UserError):
    """A platform without a device."""


def check_axes(data: int, tower: int, cpu_devices: int) -> None:
    """Check the arguments of `make_mesh`; raises ValueError if no number of devices could make such a mesh."""
    if tower not in (1, 2):
        raise ValueError(f"mesh.tower={tower}: the network has two towers; expected 1 or 2")
    if data == 0 or data < -1:
        raise ValueError(f"mesh.data={data}: expected a positive number, or -1 for all devices")
    if cpu_devices < 1:
        raise ValueError(f"mesh.cpu_devices={cpu_devices}: expected at least 1")


def make_mesh(data: int = -1, tower: int = 1, cpu_devices: int = 1) -> Mesh:
    """Return the mesh of the devices, [data, tower].

    Args:
      data: the number of parts of a batch; −1: the number of devices ÷ `tower`.
      tower: the number of parts of the network: 1, or 2 for each tower on devices of its own.
      cpu_devices: virtual devices that the CPU is split into, if JAX has not started its backend yet.

    Raises:
      ValueError: no such mesh on these devices.
      DeviceError: there are no devices.
    """
    check_axes(data, tower, cpu_devices)
    if cpu_devices > 1:
        with contextlib.suppress(RuntimeError):  # the backend is running (a notebook): use its devices
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        _start_backend(threads=available_cores() + cpu_devices)
    devices = all_devices()
    if data == -1 and len(devices) % tower == 0:
        data = len(devices) // tower
    if data == -1 or data * tower > len(devices):
        raise ValueError(
            f"mesh of data={data}, tower={tower} does not fit {len(devices)} {devices[0].platform.upper()} device(s); "
            "expected data × tower of at most that (on a CPU, cpu_devices is the number of virtual devices)"
        )
    if data * tower < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh of data={data}, tower={tower} leaves out some of the {len(devices)} devices of "
            f"{jax.process_count()} processes; expected data × tower to equal that number"
        )
    return Mesh(np.array(devices[: data * tower]).reshape(data, tower), (DATA, TOWER))


def _start_backend(threads: int) -> None:
    """Start JAX's backend with so many threads for its CPU devices, unless $PJRT_NPROC has another number.

    A device that waits in a collective holds a thread of XLA's pool. With only one thread per core two devices can wait
    for each other until XLA aborts.
    """
    unset = "PJRT_NPROC" not in os.environ
    os.environ.setdefault("PJRT_NPROC", str(threads))
    try:
        all_devices()  # starts the backend, which reads the variable once
    finally:
        if unset:
            del os.environ["PJRT_NPROC"]


def all_devices() -> list[jax.Device]:
    """Return `jax.devices()`; raises DeviceError if there are none of the platform that the user asks for."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that one of the platforms has started
        platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
        reason = f" ({one_line(error)})" if str(error) else ""
        raise DeviceError(
            f"JAX_PLATFORMS={platforms}: JAX finds no such device{reason}; expected a platform of this machine for "
            "which JAX is installed, such as cpu"
        ) from None


def one_device() -> Mesh:
    """Return a mesh of the first device alone."""
    return make_mesh(data=1)


def tower_specs(params: Any) -> Any:
    """Return the partition of a tree of kernels and biases, and of scalars: the last axis of each over `tower`."""
    return jax.tree.map(lambda x: PartitionSpec(*(None,) * (x.ndim - 1), TOWER) if x.ndim else REPLICATED, params)


def place(tree: Any, mesh: Mesh, specs: Any = REPLICATED) -> Any:
    """Return the tree on the mesh; `specs` is one PartitionSpec for all, or a tree of them.

    With several processes each holds the whole tree, or arrays that are on the mesh already.
    """
    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda _: specs, tree)

    def put(x, spec):
        target = NamedSharding(mesh, spec)
        if target.is_fully_addressable:
            return jax.device_put(x, target)
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(target, x.ndim):
            return x
        # `device_put` would compare the copies of all processes.
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(put, tree, specs)
