"""Compile for accelerators that this machine does not have: python -m experiments.compiled --workdir DIR

The train step or the inference of the paper's network is compiled for a described GPU or TPU slice. The bytes that its
operations read and write are counted, and its time is estimated from the data sheet of the chip.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from alexnet_jax import AlexNet, paper_sgd, sharding
from alexnet_jax.data.batch import Batch
from alexnet_jax.errors import errors_on_one_line
from alexnet_jax.inference import predict
from alexnet_jax.model import LAYERS
from alexnet_jax.ops import CUDA, OPS
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.runtime.files import write_json
from alexnet_jax.tables import table
from alexnet_jax.train_step import create_state, make_train_step, state_specs
from experiments.command import make_workdir, write_text
from experiments.compiled.targets import Target, TargetError, find
from experiments.compiled.traffic import INPUT, OTHER, UPDATE, Operation, operations

STORED, CROP = (256, 256, 3), 224  # of section 2 and section 4.1
TOWERS = {"one_device": 1, "data": 1, "tower": 2, "data_tower": 2}


def lower(target: Target, mode: str, batch: int, dtype: str, layout: str) -> jax.stages.Lowered:
    """Return the lowered program: the project's train step, or the inference on center crops.

    Raises:
      TargetError: devices that the layout cannot use.
    """
    devices, towers = target.devices[: 1 if layout == "one_device" else None], TOWERS[layout]
    if len(devices) % towers or (layout == "tower" and len(devices) != 2) or batch % (len(devices) // towers):
        raise TargetError(
            f"--layout={layout}: {target.name} has {len(target.devices)} device(s) and the batch {batch} images; "
            "expected devices that the towers and a batch that the data axis divide"
        )
    mesh = Mesh(np.array(devices).reshape(-1, towers), (sharding.DATA, sharding.TOWER))
    gpu = target.devices[0].platform in ("gpu", "cuda")
    model = AlexNet(dtype=jnp.dtype(dtype), ops=CUDA if gpu else OPS)
    mean = np.full((1, 1, STORED[-1]), 128, np.float32)
    preprocess = Preprocess(mean, pad=0, crop=CROP, resize=0, flip=True, lighting=None, scale=1.0)
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    optimizer = paper_sgd()
    state = jax.eval_shape(partial(create_state, model, optimizer, (CROP, CROP, STORED[-1]), 0))
    state = jax.tree.map(place, state, state_specs(state))
    images = place(jax.ShapeDtypeStruct((batch, *STORED), jnp.uint8), sharding.BATCH)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if mode == "inference":
            function = partial(predict, model, preprocess=preprocess, ten_crop=False)
            return jax.jit(lambda params, images: function(params, images)).lower(state.params, images)
        labels = place(jax.ShapeDtypeStruct((batch,), jnp.int32), sharding.BATCH)
        key = place(jax.eval_shape(lambda: jax.random.key(0)), sharding.REPLICATED)
        step = make_train_step(model, optimizer, preprocess, lambda step, plateau: jnp.float32(0.01), mesh)
        return step.trace(state, Batch(images, labels), key).lower()


def measure(target: Target, mode: str, batch: int, dtype: str, layout: str, workdir: Path) -> dict[str, Any]:
    """Compile one case, write its program, and return its record; bytes and FLOP are those of one device."""
    lowered = lower(target, mode, batch, dtype, layout)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds, text = time.perf_counter() - start, compiled.as_text()
    name = "_".join((target.name.replace(":", "-"), mode, str(batch), dtype, layout))
    (workdir / f"{name}.hlo.txt").write_text(text)
    program, memory = operations(text), compiled.memory_analysis()
    total = sum(operation.bytes for operation in program)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "target": target.name, "chip": target.chip.name, "mode": mode, "batch": batch, "dtype": dtype, "layout": layout,
        "jax": jax.__version__, "operations": len(program), "bytes": total, "compile_s": seconds,
        "memory_bytes": held - memory.alias_size_in_bytes, "estimated_ms_of_bytes": 1e3 * total / target.chip.bandwidth,
        "layers": by_layer(program),
    }  # fmt: skip


def by_layer(program: list[Operation]) -> list[dict[str, Any]]:
    """Return the operations and bytes of each layer, forward and backward, in the order of the network."""
    keys = [(layer, backward) for layer in (INPUT, *LAYERS, OTHER) for backward in (False, True)] + [(UPDATE, False)]
    rows = []
    for layer, backward in keys:
        of_layer = [op for op in program if (op.layer, op.backward) == (layer, backward)]
        if of_layer:
            read, written = (sum(getattr(op, name) * op.trips for op in of_layer) for name in ("read", "written"))
            pass_name = "backward" if backward else "forward"
            rows.append({
                "layer": layer, "pass": "" if layer in (INPUT, UPDATE) else pass_name, "operations": len(of_layer),
                "read": read, "written": written,
            })  # fmt: skip
    return rows


def markdown(records: list[dict[str, Any]]) -> str:
    """Return a table of the cases, and one of the layers of each."""
    rows = [
        (
            r["target"], r["layout"].replace("_", " "), r["mode"], f"{r['batch']:,}", r["dtype"],
            f"{r['bytes'] / 1e9:.2f}", str(r["operations"]), f"{r['memory_bytes'] / 1e9:.2f}",
            f"{r['estimated_ms_of_bytes']:.2f}", f"{r['compile_s']:.0f}",
        )
        for r in records
    ]  # fmt: skip
    header = ("target", "layout", "mode", "batch", "dtype", "GB moved", "operations", "memory (GB)",
              "estimate, of the bytes alone (ms)", "compiled in (s)")  # fmt: skip
    parts = [table(rows, header, markdown=True)]
    for r in records:
        layers = [
            (x["layer"], x["pass"], str(x["operations"]), f"{x['read'] / 1e6:,.0f}", f"{x['written'] / 1e6:,.0f}")
            for x in r["layers"]
        ]
        title = f"{r['target']}, {r['layout'].replace('_', ' ')}, {r['mode']}, batch {r['batch']:,}, {r['dtype']}"
        layer_header = ("layer", "pass", "operations", "read (MB)", "written (MB)")
        parts.append(f"{title}\n\n{table(layers, layer_header, markdown=True)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for compiled.json, compiled.md and the programs")
    parser.add_argument("--target", default="h100", help="with commas: h100, h100:2, v5e:2x2, … (default: h100)")
    parser.add_argument("--batch", default="512", help="images in a step over all devices, with commas (default: 512)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="(default: bfloat16)")
    parser.add_argument("--mode", default="train", choices=("train", "inference"), help="(default: train)")
    parser.add_argument("--layout", default="one_device", choices=TOWERS, help="(default: one_device)")
    flags = parser.parse_args()
    with errors_on_one_line():
        if not all(batch.isdecimal() and int(batch) for batch in flags.batch.split(",")):
            raise TargetError(f"--batch={flags.batch}: expected positive numbers with commas, as in 128,512")
        targets = [find(name) for name in flags.target.split(",")]
        make_workdir(flags.workdir)
        records = []
        for target in targets:
            for batch in map(int, flags.batch.split(",")):
                records.append(measure(target, flags.mode, batch, flags.dtype, flags.layout, flags.workdir))
                write_json(flags.workdir / "compiled.json", records)
        write_text(flags.workdir / "compiled.md", markdown(records))
    print(f"{markdown(records)}\nWritten to {flags.workdir}")


if __name__ == "__main__":
    main()
