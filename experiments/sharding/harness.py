"""Compile and run the train step of each layout, and record its cost."""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alexnet_jax import AlexNet, paper_sgd, sharding
from alexnet_jax.errors import UserError
from alexnet_jax.report import device_name
from alexnet_jax.sharding import DATA, TOWER
from alexnet_jax.train_step import create_state, make_train_step
from experiments.measure import flops, random_batch
from experiments.sharding.collectives import collectives
from experiments.sharding.layouts import LAYOUTS, Layout, fit
from experiments.sharding.partitioned import make_partitioned_step, state_shardings
from experiments.sharding.theory import expected


def _bytes_on_first_device(tree: Any, device: jax.Device) -> int:
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)


def measure(layout: Layout, model: AlexNet, shape: tuple[int, ...], batch: int, steps: int = 3) -> dict[str, Any]:
    """Compile and run the train step of one layout on random images.

    Args:
      shape: [H, W, C] of an image.
      batch: images in a step, over all devices.
      steps: timed steps.

    Returns:
      A record: bytes are those of one device and one step, times are in seconds, `step_s` is the median of `steps`.

    Raises:
      UserError: the layout, the batch or the widths do not fit the devices.
    """
    layout = fit(layout, model, jax.device_count(), batch)
    mesh = sharding.make_mesh(layout.data, layout.tower)
    data, preprocess = random_batch(shape, batch, model.num_classes, mesh)
    optimizer, rate, key = paper_sgd(), lambda step, plateau: jnp.float32(0.01), jax.random.key(1)
    if layout.rules:
        state = create_state(model, optimizer, shape, 0)
        shardings = state_shardings(layout, state, mesh)
        state = jax.device_put(state, shardings)
        step = make_partitioned_step(layout, model, optimizer, preprocess, rate, mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    else:
        state = create_state(model, optimizer, shape, 0, mesh)
        step = make_train_step(model, optimizer, preprocess, rate, mesh)
    traced = step.trace(state, data, key)
    start = time.perf_counter()
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()
    first = mesh.devices.flat[0]
    record = {
        "layout": layout.name,
        "device": device_name(mesh),
        "mesh": dict(mesh.shape),
        "batch": batch,
        "parameter_bytes": _bytes_on_first_device(state.params, first),
        "optimizer_bytes": _bytes_on_first_device(state.opt_state, first),
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": (compiled.cost_analysis() or {}).get("flops") if layout.rules else flops(traced),
        "compile_s": compile_s,
    }
    times = []
    for _ in range(steps + 1):  # the first is not counted
        start = time.perf_counter()
        state, metrics = compiled(state, data, key)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    actual = collectives(compiled.as_text(), mesh)
    minimum = expected(layout, model, shape, batch, mesh.shape[DATA], mesh.shape[TOWER])
    return record | {
        "step_s": statistics.median(times[1:]),
        "received_bytes": sum(c.received for c in actual),
        "minimum_bytes": sum(c.received for c in minimum),
        "collectives": [c._asdict() for c in actual],
        "expected": [c._asdict() for c in minimum],
    }


def study(
    layouts: Sequence[str] | None = None,
    devices: int = 8,
    batch: int = 32,
    steps: int = 3,
    model: AlexNet | None = None,
    shape: tuple[int, ...] = (224, 224, 3),
) -> list[dict[str, Any]]:
    """Return the records of several layouts, by default of all in `LAYOUTS` that fit, with the paper's network.

    Args:
      layouts: names of `LAYOUTS`.
      devices: the devices to use. If JAX has not started its backend yet, a CPU is split into as many virtual ones.
      batch: images in a step, over all devices.
      steps: timed steps.
      shape: [H, W, C] of an image.

    Raises:
      UserError: an unknown layout, a number that is not positive, too few devices, or a batch or widths that do not
        fit them.
    """
    for name, value in {"devices": devices, "batch": batch, "steps": steps}.items():
        if value < 1:
            raise UserError(f"--{name}={value}: expected a positive number")
    layouts_by_name = {layout.name: layout for layout in LAYOUTS}
    for name in layouts or ():
        if name not in layouts_by_name:
            raise UserError(f"--layouts: unknown layout {name!r}; expected some of {', '.join(layouts_by_name)}")
    if sharding.make_mesh(cpu_devices=devices).size < devices:
        raise UserError(f"--devices={devices}: there are {jax.device_count()} {jax.devices()[0].platform} device(s)")
    model, fitted = model or AlexNet(), []
    for name in layouts or layouts_by_name:
        try:
            fitted.append(fit(layouts_by_name[name], model, devices, batch))
        except UserError as error:
            if layouts:
                raise
            print(f"Skipped: {error}", file=sys.stderr)
    return [measure(layout, model, shape, batch, steps) for layout in fitted]
