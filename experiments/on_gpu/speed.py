"""Time the paper's network at 224×224 in bfloat16 and PyTorch's: python -m experiments.on_gpu.speed --workdir DIR

Each case is compiled while PyTorch compiles the same in another process; then both run in alternation. The most
important cases are first; those for which the budget leaves no time are recorded as skipped.
"""

import argparse
import concurrent.futures
import gzip
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax import AlexNet
from alexnet_jax.errors import one_line
from alexnet_jax.ops import OPS, PLAIN, Ops
from alexnet_jax.runtime.files import write_json
from experiments import measure
from experiments.benchmark.layers import step_bytes
from experiments.benchmark.peer import Peer, network
from experiments.benchmark.programs import Call, inference, training_step

# The operations of each variant; None: those that the network uses by default on this device.
VARIANTS: dict[str, Ops | None] = {
    "default": None,
    "no fused kernels": OPS,
    "no fused kernels, XLA's LRN": OPS._replace(local_response_norm=PLAIN.local_response_norm),
    "no fused kernels, XLA's max pooling": OPS._replace(max_pool=PLAIN.max_pool),
    "XLA's operations": PLAIN,
}
TORCH = {"compiled": True, "channels_last": True}
ROUNDS = 7


class Case(NamedTuple):
    """A program to time."""

    mode: str  # "training" or "inference"
    batch: int
    ops: str = "default"

    def __str__(self) -> str:
        return f"{self.mode} {self.batch}" + (f", {self.ops}" if self.ops != "default" else "")


def cases(batches: Sequence[int]) -> list[Case]:
    """Return the cases, the most important first: the middle batch before the largest and the smallest."""
    small, middle, large = sorted(batches)
    compared = [Case(mode, batch) for mode in ("training", "inference") for batch in (middle, large, small)]
    return compared + [Case("training", middle, name) for name in list(VARIANTS)[1:]]


def compile_case(case: Case, model: AlexNet, shape: tuple[int, int, int]) -> Call:
    """Compile a case and run it once."""
    make = training_step if case.mode == "training" else inference
    call = make(model.clone(ops=VARIANTS[case.ops]), case.batch, shape)
    measure.seconds(call.run, 1)
    return call


def time_case(case: Case, call: Call, peer: Peer | None) -> dict[str, Any]:
    """Return the median seconds of a step, from rounds that alternate with PyTorch."""
    times, torch_times = [], []
    measure.seconds(call.run, 3)
    count = measure.repeats(measure.seconds(call.run, 3))
    torch_count = measure.repeats(peer.ask("time", name=str(case), steps=3)["seconds"] / 3) if peer else 0
    for _ in range(ROUNDS):
        measure.seconds(call.run, 1)
        times.append(measure.seconds(call.run, count))
        if peer:
            torch_times.append(peer.ask("time", name=str(case), steps=torch_count)["seconds"] / torch_count)
    seconds = statistics.median(times)
    record = {"seconds": seconds, "images_per_s": case.batch / seconds, "rounds_s": times}
    if peer:
        torch_s = statistics.median(torch_times)
        record |= {
            "torch_images_per_s": case.batch / torch_s,
            "ratio": torch_s / seconds,
            "torch_rounds_s": torch_times,
        }
    return record


def measure_case(
    case: Case, model: AlexNet, shape: tuple[int, int, int], pool: concurrent.futures.Executor, peer: Peer | None,
    workdir: Path,
) -> dict[str, Any]:  # fmt: skip
    """Compile a case in this process and in PyTorch's at the same time, time both, and return the record."""
    future, answer = pool.submit(compile_case, case, model, shape), None
    if peer and case.ops == "default":
        what = {"network": network(model, shape), "batch": case.batch, "dtype": "bfloat16", **TORCH}
        answer = peer.ask("open", name=str(case), train=case.mode == "training", **what)
        answer = answer or {"error": peer.last_error()}
    call = future.result()
    record = call.cost | {"bytes": step_bytes(model, case.batch, shape)[case.mode]}
    record |= time_case(case, call, peer if answer and "error" not in answer else None)
    if answer and "error" in answer:
        record["torch_error"] = answer["error"]
    if peer:
        peer.ask("close")
    name = str(case).replace(", ", "_").replace(" ", "_").replace("'", "")
    (workdir / f"{name}.hlo.txt.gz").write_bytes(gzip.compress(call.text().encode()))
    return record


def line(case: Case, record: dict[str, Any], matmul: float) -> str:
    """Return a record as a line of text."""
    text = f"{case}: {record['images_per_s']:,.0f} images/s ({1e3 * record['seconds']:.2f} ms per step)"
    text += f", {record['flops'] / record['seconds'] / matmul:.0%} of the matrix product's rate"
    if "ratio" in record:
        text += f", {record['ratio']:.2f} × PyTorch's {record['torch_images_per_s']:,.0f}"
    return text + f"; compiled in {record['compile_s']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.on_gpu.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for speed.json and the compiled programs")
    parser.add_argument("--budget", type=float, default=180, help="seconds (default: 180)")
    parser.add_argument("--batches", default="128,512,2048", help="three, with commas (default: 128,512,2048)")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has PyTorch (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that it works")
    flags = parser.parse_args()
    start = time.monotonic()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room on the same GPU
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is one of the figures
    flags.workdir.mkdir(parents=True, exist_ok=True)
    model, shape = AlexNet(dtype=jnp.bfloat16), (224, 224, 3)
    if flags.quick:
        model, shape = model.clone(num_classes=10, widths=(8, 16, 16, 16, 16, 32, 32)), (64, 64, 3)
    todo = cases([int(batch) for batch in flags.batches.split(",")])

    peer = Peer(flags.torch_python)
    version = peer.ask("version")
    rates = {"matmul": measure.matmul_rate("bfloat16", 3), "copy": measure.copy_rate(3)}
    result: dict[str, Any] = {
        "device": measure.device(),
        "jax": jax.__version__,
        "torch": version,
        **rates,
        "cases": [],
    }
    print(f"{result['device']}, JAX {jax.__version__}, PyTorch {version}: matrix product {rates['matmul'] / 1e12:.0f} "
          f"TFLOP/s, copy {rates['copy'] / 1e12:.2f} TB/s", flush=True)  # fmt: skip

    pool, longest = concurrent.futures.ThreadPoolExecutor(1), 0.0
    for case in todo:
        begin = time.monotonic()
        record = case._asdict()
        if begin + longest > start + flags.budget:
            record["skipped"] = "no time"
        else:
            try:
                record |= measure_case(case, model, shape, pool, peer if version else None, flags.workdir)
            except Exception as error:  # the other cases are kept
                record["error"] = one_line(error)
            longest = max(longest, time.monotonic() - begin)
        result["cases"].append(record)
        print(line(case, record, rates["matmul"]) if "seconds" in record else record, flush=True)
        write_json(flags.workdir / "speed.json", result)
    peer.close()


if __name__ == "__main__":
    main()
