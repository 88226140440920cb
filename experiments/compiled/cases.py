"""One case: a program of the project, lowered for described devices, compiled, and counted."""

import importlib.util
import math
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from alexnet_jax import AlexNet, sharding
from alexnet_jax.config import check_config
from alexnet_jax.data.batch import Batch
from alexnet_jax.errors import UserError, one_line
from alexnet_jax.flags import CONFIGS
from alexnet_jax.inference import predict_on_mesh
from alexnet_jax.ops import ops_for
from alexnet_jax.optimizer import learning_rate_at
from alexnet_jax.preprocess import Preprocess, Statistics
from alexnet_jax.setup import build_model, build_optimizer, fit_preprocess
from alexnet_jax.train_step import create_state, make_train_step, state_specs
from alexnet_jax.trained_layers import frozen_layers, layers_of
from experiments.compiled.floor import Floor, floor
from experiments.compiled.targets import Target
from experiments.compiled.traffic import PLACES, Operation, loops_and_gathers, operations
from experiments.sharding import LAYOUTS, Layout, collectives, expected
from experiments.sharding.collectives import KINDS
from experiments.sharding.layouts import fit
from experiments.sharding.partitioned import make_partitioned_step, state_shardings

MODES = ("train", "inference")
MACOS = sys.platform == "darwin"
# Of the data sets of the configs: [H, W, C] of a stored image, and the classes.
DATASETS = {
    "fashion_mnist": ((28, 28, 1), 10), "cifar10": ((32, 32, 3), 10), "imagenet2012_256": ((256, 256, 3), 1000),
    "images_256": ((256, 256, 3), 100),  # a folder of one's own: any number
}  # fmt: skip


class Case(NamedTuple):
    """What is compiled; the batch is that of all devices."""

    target: Target
    config: str
    mode: str
    batch: int
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        config = self.config.replace(":", "-").replace("/", "-").removesuffix(".py")
        target = self.target.name.replace(":", "-")
        return f"{target}_{config}_{self.mode}_{self.batch}_{self.dtype}_{self.layout}"


def load_config(name: str) -> ml_collections.ConfigDict:
    """Return a config by the name or path of its file, with `:ARGUMENT` behind it or not; raises UserError."""
    path, _, argument = name.partition(":")
    path = Path(path) if path.endswith(".py") else CONFIGS / f"{path}.py"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.py") if not p.stem.startswith("_")))
        raise UserError(f"--config={name}: no such config; expected one of {names}, or a file of your own")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*[argument] * bool(argument))
    except Exception as error:  # any exception of a user's file
        raise UserError(f"--config={name}: {one_line(error)}") from None
    check_config(config)
    if config.dataset not in DATASETS:
        raise UserError(f"--config={name}: dataset {config.dataset!r}: expected one of {', '.join(DATASETS)}")
    return config


class Program(NamedTuple):
    """A program that is ready to be lowered, and what it is made of."""

    function: Any  # jitted
    arguments: tuple
    mesh: Mesh
    layout: Layout
    model: AlexNet
    preprocess: Preprocess
    stored: tuple[int, ...]

    def compile(self) -> jax.stages.Compiled:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # the kernels ask for the device
            return self.function.trace(*self.arguments).lower().compile()


def build(case: Case) -> Program:
    """Return the project's program of a case, with shapes for arrays.

    Raises:
      UserError: a layout, a batch or widths that do not fit the devices.
    """
    config = load_config(case.config)
    stored, classes = DATASETS[config.dataset]
    model = build_model(config, classes).clone(dtype=jnp.dtype(case.dtype), ops=ops_for(case.target.devices[0]))
    known = {layout.name: layout for layout in LAYOUTS}
    devices = case.target.devices[:1] if case.layout == "one_device" else case.target.devices
    try:
        layout = fit(known[case.layout], model, len(devices), case.batch)
    except UserError as error:
        raise UserError(f"{case.target.name}: {error}") from None
    if layout.data * layout.tower != len(devices):
        raise UserError(f"{case.target.name}: --layout={case.layout} uses {layout.tower} of {len(devices)} devices")
    mesh = Mesh(np.array(devices).reshape(layout.data, layout.tower), (sharding.DATA, sharding.TOWER))
    preprocess = fit_preprocess(config, Statistics(np.zeros(stored), np.ones(3), np.eye(3)))

    def placed(x, spec):
        spec = spec if isinstance(spec, NamedSharding) else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

    optimizer, frozen = build_optimizer(config), frozen_layers(config.freeze, layers_of(config.widths))
    state = jax.eval_shape(partial(create_state, model, optimizer, preprocess.image_shape, 0, frozen=frozen))
    images = placed(jax.ShapeDtypeStruct((case.batch, *stored), jnp.uint8), sharding.BATCH)
    made = partial(Program, mesh=mesh, layout=layout, model=model, preprocess=preprocess, stored=stored)
    if case.mode == "inference":
        if layout.rules:
            raise UserError(f"--layout={case.layout}: it is one of training alone")
        params = jax.tree.map(placed, state.params, sharding.tower_specs(state.params))
        options = dict(preprocess=preprocess, model=model, ten_crop=False, mesh=mesh)
        return made(jax.jit(partial(predict_on_mesh, **options)), (params, images))
    labels = placed(jax.ShapeDtypeStruct((case.batch,), jnp.int32), sharding.BATCH)
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.REPLICATED)
    rate: Callable = partial(learning_rate_at, base=config.learning_rate, warmup_steps=config.warmup_steps)
    if layout.rules and frozen:
        raise UserError(f"--layout={case.layout}: it trains all layers; expected a config without frozen ones")
    if layout.rules:
        shardings = state_shardings(layout, state, mesh)
        step = make_partitioned_step(layout, model, optimizer, preprocess, rate, mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        state = jax.tree.map(placed, state, shardings)
    else:
        step = make_train_step(model, optimizer, preprocess, rate, mesh, frozen)
        state = jax.tree.map(placed, state, state_specs(state))
    return made(step, (state, Batch(images, labels), key))


def memory_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Return the memory that a program needs on a device, and its parts, in bytes."""
    sizes = compiled.memory_analysis()
    parts = {name: getattr(sizes, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    return parts | {"total": parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]}


def measure(case: Case, workdir: Path) -> dict[str, Any]:
    """Compile a case, write its program, and return its record; bytes and FLOP are those of one device.

    Raises:
      UserError: a layout, a batch or widths that do not fit the devices, or a program that does not fit their memory.
    """
    program = build(case)
    start = time.perf_counter()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{case.name}: XLA does not compile it: {one_line(error)}") from None
    seconds, text = time.perf_counter() - start, compiled.as_text()
    (workdir / f"{case.name}.hlo.txt").write_text(text)
    found, chip = operations(text), case.target.chip
    model, layout, side = program.model, program.layout, program.preprocess.image_shape[0]
    data, tower = layout.data, layout.tower
    floors = floor(model, program.stored, side, case.batch, data, tower, case.mode == "train")
    rows = by_layer(found, floors, chip.bandwidth, chip.flops)
    record = {
        "name": case.name, "target": case.target.name, "chip": chip.name, "config": case.config, "mode": case.mode,
        "batch": case.batch,
        "dtype": case.dtype, "layout": case.layout, "mesh": {"data": data, "tower": tower},
        "versions": _versions(case.target), "operations": len(found),
        "bytes": sum(x.bytes for x in found), "floor": sum(x.bytes for x in floors.values()),
        "flops": sum(x.flops for x in floors.values()), **loops_and_gathers(text),
        "memory": memory_bytes(compiled), "device_memory": chip.memory,
        "estimated_ms": sum(row["estimated_ms"] for row in rows), "compile_s": seconds,
        "compile_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if MACOS else 1024),
        "layers": rows, "collectives": [], "expected": [], "asynchronous": [],
    }  # fmt: skip
    if program.mesh.size > 1 and case.mode == "train":
        shape = program.preprocess.image_shape
        record["collectives"] = [c._asdict() for c in collectives(text, program.mesh)]
        record["expected"] = [c._asdict() for c in expected(layout, model, shape, case.batch, data, tower)]
        record["asynchronous"] = [
            {"kind": x.kind.removesuffix("-start"), "layer": x.layer, "operations": x.while_concurrent}
            for x in found if x.kind.endswith("-start") and x.kind.removesuffix("-start") in KINDS
        ]  # fmt: skip
    return record


def _versions(target: Target) -> dict[str, str]:
    plugin = "libtpu" if target.chip.name.startswith("TPU") else "jax-cuda13-plugin"
    names = ("jax", "jaxlib", plugin)
    return {name: metadata.version(name) for name in names if importlib.util.find_spec(name.replace("-", "_"))}


def by_layer(
    found: list[Operation], floors: dict[tuple[str, bool], Floor], bandwidth: float, flops: float
) -> list[dict[str, Any]]:
    """Return the operations, bytes, floor and FLOP of each part of a program, forward before backward.

    The estimate is the roofline's: the longer of the bytes at the chip's bandwidth and the FLOP at its rate.
    """
    rows = []
    for key in [(part, backward) for part in PLACES for backward in (False, True)]:
        of_part, part_floor = [x for x in found if (x.layer, x.backward) == key], floors.get(key, Floor(0, 0))
        if not of_part and not part_floor.bytes:
            continue
        read, written = (sum(getattr(x, name) * x.trips for x in of_part) for name in ("read", "written"))
        rows.append({
            "layer": key[0], "pass": "backward" if key[1] else "forward", "operations": len(of_part), "read": read,
            "written": written, "floor": part_floor.bytes, "flops": part_floor.flops,
            "estimated_ms": 1e3 * max((read + written) / bandwidth, part_floor.flops / flops),
        })  # fmt: skip
    return rows


def largest_batch(case: Case, precision: float = 0.05) -> int:
    """Return the largest batch whose program fits the device's memory; each try compiles.

    Memory grows nearly linearly with the batch, so the last two tries give bounds of the bisection: about five tries in
    all. The answer is a multiple of 64 images a device, or of less by `precision`; it is 0 if 64 do not fit.
    """
    unit = 64 * (len(case.target.devices) if case.layout not in ("one_device", "tower") else 1)
    limit = case.target.chip.memory
    sizes: dict[int, float] = {}

    def memory(units):
        try:
            total = memory_bytes(build(case._replace(batch=units * unit)).compile())["total"]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise UserError(
                    f"{case.name}: XLA does not compile a batch of {units * unit}: {one_line(error)}"
                ) from None
            return math.inf  # XLA itself finds that it does not fit
        print(f"batch {units * unit:,}: {total / 1e9:.2f} GB", file=sys.stderr)
        return total

    low, high, units = 0, math.inf, 1
    while high - low > max(1, precision * low):
        sizes[units] = memory(units)
        low, high = (units, high) if sizes[units] <= limit else (low, units)
        units = int((low + high) // 2 if high < math.inf else 2 * low)
        finite = sorted((n, size) for n, size in sizes.items() if size < math.inf)[-2:]
        if len(finite) == 2 and finite[1][1] > finite[0][1]:
            (n, size), (n2, size2) = finite
            expected = n2 + (limit - size2) * (n2 - n) / (size2 - size)
            bounds = (int(expected * (1 + sign * precision / 2.5)) for sign in (-1, 1))
            units = next((bound for bound in bounds if low < bound < high), units)
    return low * unit
