"""What a layout of the network on several devices costs: python -m experiments.sharding --workdir DIR

Compiles the whole train step of the paper's network for each layout, reads the communication back from the program, and
times it. In a notebook, `study()` returns the same records.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax import AlexNet, activations, cross_entropy, paper_sgd, sharding
from alexnet_jax.data import Batch
from alexnet_jax.model import LAYERS
from alexnet_jax.ops import PLAIN, ops_for
from alexnet_jax.sharding import DATA, TOWER
from alexnet_jax.train import device_name
from alexnet_jax.train_step import TrainState, apply_gradients, create_state, make_train_step
from experiments.collectives import Collective, collectives
from experiments.measure import flops, random_batch


class Rule(NamedTuple):
    """How the layers whose name matches are laid out, for XLA's partitioner."""

    layers: str  # a regular expression
    kernels: str | None = None  # the mesh axis that keeps the output channels (units) in parts
    gather: bool = False  # whether those parts are gathered before use
    batch: str | None = DATA  # the mesh axis that splits the batch of this layer; None: each device sees all of it


class Layout(NamedTuple):
    """A mesh, and the partition rules; without rules the project's own train step, which places its own collectives."""

    name: str
    data: int  # devices along `data`; −1: all that `tower` leaves
    tower: int
    rules: tuple[Rule, ...] = ()


LAYOUTS = (
    Layout("one_device", 1, 1),
    Layout("data", -1, 1),
    Layout("tower", 1, 2),
    Layout("data_tower", -1, 2),
    # Krizhevsky (2014), "One weird trick": convolutions split the batch, fully connected layers split their units.
    Layout("one_weird_trick", -1, 1, (Rule("conv"), Rule("fc", kernels=DATA, batch=None))),
    # FSDP or ZeRO-3: everything is stored in parts, and gathered when its layer needs it.
    Layout("fully_sharded", -1, 1, (Rule("", kernels=DATA, gather=True),)),
)


def _rule(layout: Layout, layer: str) -> Rule:
    return next(rule for rule in layout.rules if re.match(rule.layers, layer))


def _param_specs(layout: Layout, params: Any) -> Any:
    """Where each kernel and bias is stored: its last axis over the rule's mesh axis."""
    if not layout.rules:
        return sharding.tower_specs(params)
    return {
        layer: {name: P(*(None,) * (x.ndim - 1), _rule(layout, layer).kernels) for name, x in leaves.items()}
        for layer, leaves in params.items()
    }


def make_partitioned_step(layout: Layout, model, optimizer, preprocess, learning_rate, mesh):
    """The step of `train_step.make_train_step` with its collectives left to XLA, which follows the layout's rules."""
    place = lambda x, *spec: lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))  # noqa: E731

    def follow_rules(layer, args, kwargs, context):
        name = context.module.name
        if name not in LAYERS or context.method_name != "__call__":
            return layer(*args, **kwargs)
        rule = _rule(layout, name)
        split_units = None if rule.gather else rule.kernels
        with jax.named_scope(name):  # what moves for a layer's sake bears its name
            args = jax.tree.map(lambda x: place(x, rule.batch), args)
        outputs = layer(*args, **kwargs)
        with jax.named_scope(name):
            return jax.tree.map(lambda x: place(x, rule.batch, *(None,) * (x.ndim - 2), split_units), outputs)

    def train_step(state: TrainState, batch: Batch, key: jax.Array):
        image_key, dropout_key = jax.random.split(key)
        images = preprocess.train(image_key, batch.images)

        def loss_fn(params):
            params = dict(params)
            for layer in LAYERS:
                if _rule(layout, layer).gather:
                    with jax.named_scope(layer):
                        params[layer] = jax.tree.map(place, params[layer])
            with nn.intercept_methods(follow_rules):
                logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
            with jax.named_scope("fc8"):
                logits = place(logits, _rule(layout, "fc8").batch)
            with jax.named_scope("metrics"):
                return cross_entropy(logits, batch.labels), logits

        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state, rate = apply_gradients(state, gradients, optimizer, learning_rate)
        with jax.named_scope("metrics"):
            error = jnp.mean(jnp.argmax(logits, axis=-1) != batch.labels)
        return state, {"loss": loss, "error": error, "learning_rate": rate}

    def shardings(state):
        specs = jax.tree.map(lambda _: P(), state).replace(
            params=_param_specs(layout, state.params), opt_state=_opt_specs(layout, state.opt_state)
        )
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    return train_step, shardings


def _opt_specs(layout: Layout, opt_state: Any) -> Any:
    return type(opt_state)(*(_param_specs(layout, field) for field in opt_state))


def expected(layout: Layout, model: AlexNet, shape: tuple[int, ...], batch: int, data: int, tower: int):
    """The communication that the layout needs and no more, in float32: a list like `collectives()` gives.

    Args:
      shape: [H, W, C] of an image.
      batch: images in a step, over all devices.
      data, tower: the mesh.
    """
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    maps = jax.eval_shape(partial(activations, model), params, image)
    weights = {layer: 4 * sum(x.size for x in jax.tree.leaves(params[layer])) for layer in LAYERS}
    seen = {"conv3": "pool2", "fc6": "pool5", "fc7": "fc6", "fc8": "fc7"}  # what a layer sees where towers meet
    found = []

    def gather(layer, axis, parts, arrays, images):  # forward, and its transpose
        whole = sum(4 * images * maps[name].size for name in arrays)
        found.append(Collective.make("all-gather", layer, axis, False, whole, parts))
        found.append(Collective.make("reduce-scatter", layer, axis, True, whole, parts))

    for layer in LAYERS:
        rule = _rule(layout, layer) if layout.rules else Rule("")
        if tower > 1 and layer in seen:
            gather(layer, TOWER, tower, [seen[layer]] + ["fc8"] * (layer == "fc8"), batch // data)
        if data > 1 and rule.gather:
            found.append(Collective.make("all-gather", layer, DATA, False, weights[layer], data))
            found.append(Collective.make("reduce-scatter", layer, DATA, True, weights[layer], data))
        elif data > 1 and rule.kernels:
            gather(layer, DATA, data, [seen[layer]] + ["fc8"] * (layer == "fc8"), batch)
        elif data > 1:
            found.append(Collective.make("all-reduce", layer, DATA, True, weights[layer] // tower, data))
    axes = [axis for axis, size in ((DATA, data), (TOWER, tower)) if size > 1]
    if axes:
        found.append(Collective.make("all-reduce", "metrics", "+".join(axes), False, 8, data * tower))  # loss, error
    return sorted(found, key=lambda c: (c.backward, (*LAYERS, "metrics").index(c.layer), c.axis, c.kind))


def _fitted(layout: Layout, model: AlexNet, devices: int, batch: int) -> Layout:
    """The layout with its devices along `data` counted; raises ValueError if it, the batch or the widths do not fit."""
    data = devices // layout.tower if layout.data == -1 else layout.data
    if not data or data * layout.tower > devices or layout.data == -1 and devices % layout.tower:
        raise ValueError(f"--devices={devices}: {layout.name} needs a multiple of {layout.tower}")
    if batch < 1 or batch % data:
        raise ValueError(f"--batch={batch}: {layout.name} splits a batch into {data} parts; expected a multiple of it")
    widths = dict(zip(LAYERS, (*model.widths, model.num_classes), strict=True))
    for layer, width in widths.items():
        if layout.rules and _rule(layout, layer).kernels and width % data:
            raise ValueError(
                f"--devices={devices}: {layout.name} splits the {width} output channels of {layer} into {data} parts; "
                "expected a divisor of it"
            )
    return layout._replace(data=data)


def _bytes_on_first_device(tree: Any, device: jax.Device) -> int:
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)


def measure(layout: Layout, model: AlexNet, shape: tuple[int, ...], batch: int, steps: int = 3) -> dict[str, Any]:
    """Compiles and runs the train step of one layout on random images.

    Returns:
      A record: bytes are of one device and one step, times in seconds, `step_s` the median of `steps`.

    Raises:
      ValueError: a mesh that does not fit the devices, or a batch or widths that they cannot share.
    """
    layout = _fitted(layout, model, jax.device_count(), batch)
    mesh = sharding.make_mesh(layout.data, layout.tower)
    data, preprocess = random_batch(shape, batch, model.num_classes, mesh)
    optimizer, rate, key = paper_sgd(), lambda step, plateau: jnp.float32(0.01), jax.random.key(1)
    if layout.rules:
        model = model.clone(ops=(model.ops or ops_for(jax.devices()[0]))._replace(conv=PLAIN.conv))
        state = create_state(model, optimizer, shape, 0)
        step, shardings = make_partitioned_step(layout, model, optimizer, preprocess, rate, mesh)
        state = jax.device_put(state, shardings(state))
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), None))
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
    for _ in range(steps + 1):  # the first warms up
        start = time.perf_counter()
        state, metrics = compiled(state, data, key)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    found = collectives(compiled.as_text(), mesh)
    least = expected(layout, model, shape, batch, mesh.shape[DATA], mesh.shape[TOWER])
    return record | {
        "step_s": statistics.median(times[1:]),
        "received_bytes": sum(c.received for c in found),
        "minimum_bytes": sum(c.received for c in least),
        "collectives": [c._asdict() for c in found],
        "expected": [c._asdict() for c in least],
    }


def study(
    layouts: Sequence[str] | None = None,
    devices: int = 8,
    batch: int = 32,
    steps: int = 3,
    model: AlexNet | None = None,
    shape: tuple[int, ...] = (224, 224, 3),
) -> list[dict[str, Any]]:
    """The records of several layouts, by default of all in `LAYOUTS` that fit, with the paper's network.

    Args:
      devices: the devices to use. Virtual ones of the CPU are made where JAX has not started its backend yet.
      batch: images in a step, over all devices.
      shape: [H, W, C] of an image.

    Raises:
      ValueError: an unknown layout, too few devices, or a batch or widths that they cannot share.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    for name in layouts or ():
        if name not in known:
            raise ValueError(f"--layouts: unknown layout {name!r}; the known ones are {', '.join(known)}")
    if sharding.make_mesh(cpu_devices=devices).size < devices:
        raise ValueError(f"--devices={devices}: there are {jax.device_count()} {jax.devices()[0].platform} device(s)")
    model, fitted = model or AlexNet(), []
    for name in layouts or known:
        try:
            fitted.append(_fitted(known[name], model, devices, batch))
        except ValueError as error:
            if layouts:
                raise
            print(f"Left out: {error}", file=sys.stderr)
    return [measure(layout, model, shape, batch, steps) for layout in fitted]


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table; memory and traffic are those of one device."""
    head = (
        "layout", "data × tower", "received (MB)", "minimum (MB)", "between", "parameters (MB)", "optimizer (MB)",
        "temporary (MB)", "GFLOP", "compile (s)", "step (s)",
    )  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for r in records:
        where = sorted({c["axis"] for c in r["collectives"]})
        rows.append((
            r["layout"].replace("_", " "), f"{r['mesh'][DATA]} × {r['mesh'][TOWER]}",
            f"{r['received_bytes'] / 1e6:.1f}", f"{r['minimum_bytes'] / 1e6:.1f}", ", ".join(where) or "nothing",
            f"{r['parameter_bytes'] / 1e6:.0f}", f"{r['optimizer_bytes'] / 1e6:.0f}",
            f"{r['temporary_bytes'] / 1e6:.0f}", f"{r['flops'] / 1e9:.1f}" if r["flops"] else "not told",
            f"{r['compile_s']:.1f}", f"{r['step_s']:.2f}",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def layer_table(record: dict[str, Any]) -> str:
    """The collectives of one record as a Markdown table, beside the least that the layout needs."""
    key = lambda c: (c["layer"], "backward" if c["backward"] else "forward", c["axis"], c["kind"])  # noqa: E731
    found = {key(c): c for c in record["collectives"]}
    least = {key(c): c for c in record["expected"]}
    rows = [("layer", "pass", "axis", "collective", "received (kB)", "minimum (kB)"), ("---",) * 6]
    for k in found | least:
        size = lambda which, k=k: f"{which[k]['received'] / 1e3:.1f}" if k in which else "—"  # noqa: E731
        rows.append((*k, size(found), size(least)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A row a layout, a column a layer: forward above backward, coloured by the mesh axis, with the MB received."""
    from matplotlib.figure import Figure

    columns = [*LAYERS, "metrics"]
    colours = {DATA: "tab:blue", TOWER: "tab:orange", f"{DATA}+{TOWER}": "tab:green"}
    largest = max([c["received"] for r in records for c in r["collectives"]], default=1)
    figure = Figure(figsize=(1.15 * len(columns) + 2, 1.1 * len(records) + 1.4), layout="constrained")
    axes = figure.subplots()
    for row, record in enumerate(records):
        for column, layer in enumerate(columns):
            for top, backward in ((-0.42, False), (0.02, True)):
                received = Counter()
                for c in record["collectives"]:
                    if c["layer"] == layer and c["backward"] == backward:
                        received[c["axis"]] += c["received"]
                height = 0.4 / max(len(received), 1)
                for i, (axis, size) in enumerate(sorted(received.items())):
                    width = 0.25 + 0.65 * max(0.0, 1 + np.log10(size / largest) / 6)
                    middle = row + top + (i + 0.5) * height
                    axes.barh(middle, width, height, column - width / 2, color=colours.get(axis, "tab:gray"))
                    small = f"{size / 1e3:.0f} kB" if size >= 1e3 else f"{size} B"
                    text = f"{size / 1e6:.1f}" if size >= 1e5 else small
                    mark = "◀" if backward else "▶"
                    axes.text(column, middle, f"{mark} {text}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.xaxis.tick_top()
    names = [f"{r['layout'].replace('_', ' ')}\n{r['mesh'][DATA]} × {r['mesh'][TOWER]}" for r in records]
    axes.set_yticks(range(len(records)), names)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(records) - 0.45, -0.55)
    axes.hlines(np.arange(len(records) - 1) + 0.5, -0.6, len(columns), color="0.85", linewidth=0.8)
    handles = [axes.barh(0, 0, color=colour, label=f"over {axis}") for axis, colour in colours.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False)
    batch = records[0]["batch"]
    axes.set_title(
        f"MB that a device receives in a step of {batch} images, wide on a logarithmic scale: ▶ forward, ◀ backward",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.sharding", description=__doc__.splitlines()[0])
    names = [layout.name for layout in LAYOUTS]
    parser.add_argument("--workdir", type=Path, required=True, help="for sharding.json, sharding.md, sharding.png")
    parser.add_argument("--devices", type=int, default=8, help="devices to use; virtual ones on a CPU (default: 8)")
    parser.add_argument("--layouts", help=f"with commas: {', '.join(names)} (default: all that fit the devices)")
    parser.add_argument("--batch", type=int, default=32, help="images in a step, over all devices (default: 32)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, of which the median counts (default: 3)")
    flags = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is one of the figures
    try:
        for name in ("devices", "batch", "steps"):
            if vars(flags)[name] < 1:
                raise ValueError(f"--{name}={vars(flags)[name]}: expected a positive number")
        layouts = None if flags.layouts is None else flags.layouts.split(",")
        flags.workdir.mkdir(parents=True, exist_ok=True)
        records = study(layouts, flags.devices, flags.batch, flags.steps)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:
        sys.exit(f"Error: --workdir={flags.workdir}: {error}")
    (flags.workdir / "sharding.json").write_text(json.dumps(records, indent=2) + "\n")
    layers = "\n\n".join(f"{r['layout']}\n\n{layer_table(r)}" for r in records if r["collectives"])
    (flags.workdir / "sharding.md").write_text(f"{table(records)}\n\n{layers}\n")
    plot(records, flags.workdir / "sharding.png")
    print(f"{layers}\n\n{table(records)}\n\nWritten to {flags.workdir}")


if __name__ == "__main__":
    main()
