"""The paper's network at 224×224 in bfloat16 next to PyTorch: python -m experiments.on_gpu.speed --workdir DIR

Each case compiles in JAX while PyTorch compiles its own in another process; then both take turns. The cases stand in
the order of their worth, and those that the budget leaves no time for are recorded as skipped.
"""

import argparse
import gzip
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax import AlexNet
from alexnet_jax.ops import OPS, PLAIN, Ops
from alexnet_jax.runtime.files import write_json
from experiments import measure
from experiments.benchmark import inference, training_step
from experiments.layers import step_bytes
from experiments.peer import Peer, network

# XLA's own operation in the place of one of ours, and all of them.
VARIANTS: dict[str, Ops | None] = {
    "ours": None,  # of `ops_for`
    "no fused kernel": OPS,
    "no fused kernel, XLA's LRN": OPS._replace(local_response_norm=PLAIN.local_response_norm),
    "no fused kernel, XLA's max pooling": OPS._replace(max_pool=PLAIN.max_pool),
    "XLA's operations": PLAIN,
}
TORCH = {"compiled": True, "channels_last": True}


class Case(NamedTuple):
    """A program to time."""

    mode: str  # "training" or "inference"
    batch: int
    ops: str = "ours"
    torch: bool = True


def cases(batches: list[int]) -> list[Case]:
    """The cases in the order of their worth: the middle batch, the largest, the smallest; then XLA's operations."""
    order = sorted(batches, key=lambda batch: abs(batches.index(batch) - len(batches) // 2))
    compared = [Case(mode, batch) for mode in ("training", "inference") for batch in order]
    return compared + [Case("training", order[0], name, torch=False) for name in list(VARIANTS)[1:]]


def measure_case(case: Case, peer: Peer | None, shape: tuple[int, int, int], model: AlexNet, rounds: int, out: Path):
    """Compile and time one case; the record of its medians, and of PyTorch's."""
    model, answers = model.clone(ops=VARIANTS[case.ops]), {}

    def open_peer():
        what = {"network": network(model, shape), "batch": case.batch, "dtype": "bfloat16"}
        answers["torch"] = peer.ask("open", name="torch", train=case.mode == "training", **what, **TORCH)

    thread = threading.Thread(target=open_peer if peer else lambda: None)
    thread.start()
    start = time.perf_counter()
    make = training_step if case.mode == "training" else inference
    call = make(model, case.batch, shape)
    measure.seconds(call.run, 2)
    ready_s = time.perf_counter() - start
    thread.join()
    opened = answers.get("torch") or ({"error": peer.last_words()} if peer else {})
    counts = {"jax": measure.repeats(measure.seconds(call.run, 3)), "torch": measure.repeats(opened.get("seconds", 1))}
    times = {"jax": [], "torch": []}
    for _ in range(rounds):
        measure.seconds(call.run, 1)
        times["jax"].append(measure.seconds(call.run, counts["jax"]))
        if "seconds" in opened:
            times["torch"].append(peer.ask("time", name="torch", steps=counts["torch"])["seconds"] / counts["torch"])
    if peer:
        peer.ask("close")
    seconds = statistics.median(times["jax"])
    record = {
        **case._asdict(), "seconds": seconds, "images_per_s": case.batch / seconds, "ready_s": ready_s, **call.cost,
        "bytes": step_bytes(model, case.batch, shape)[case.mode], "rounds_s": times["jax"],
    }  # fmt: skip
    if times["torch"]:
        torch_s = statistics.median(times["torch"])
        record |= {"torch_images_per_s": case.batch / torch_s, "ratio": torch_s / seconds, "torch_rounds_s": times["torch"]}
    elif "error" in opened:
        record["torch_error"] = opened["error"]
    if out:
        name = f"{case.mode}_{case.batch}_{case.ops.replace(' ', '_').replace(chr(39), '')}.hlo.txt.gz"
        (out / name).write_bytes(gzip.compress(call.text().encode()))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.on_gpu.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for speed.json and the compiled programs")
    parser.add_argument("--budget", type=float, default=180, help="seconds (default: 180)")
    parser.add_argument("--batches", default="128,512,2048", help="three, with commas (default: 128,512,2048)")
    parser.add_argument("--cases", help="MODE:BATCH or MODE:BATCH:OPERATIONS, with commas (default: all of the table)")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has PyTorch (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that it works")
    flags = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room on the same GPU
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is one of the figures
    end = time.monotonic() + flags.budget
    flags.workdir.mkdir(parents=True, exist_ok=True)
    model, side, rounds = AlexNet(dtype=jnp.bfloat16), 224, 5
    if flags.quick:
        model, side, rounds = model.clone(num_classes=10, widths=(8, 16, 16, 16, 16, 32, 32)), 64, 2
    todo = cases([int(batch) for batch in flags.batches.split(",")])
    if flags.cases:
        todo = [Case(mode, int(batch), *rest) for mode, batch, *rest in (c.split(":") for c in flags.cases.split(","))]
    result: dict[str, Any] = {"device": measure.device(), "jax": jax.__version__, "cases": [], "skipped": []}
    peer = Peer(flags.torch_python)
    version = peer.ask("version")
    result |= {"torch": version, "matmul": {"bfloat16": measure.matmul_rate("bfloat16", 3)}, "copy": measure.copy_rate(3)}
    print(f"{result['device']}, JAX {jax.__version__}, PyTorch {version}: matrix product "
          f"{result['matmul']['bfloat16'] / 1e12:.0f} TFLOP/s, copy {result['copy'] / 1e12:.2f} TB/s", flush=True)  # fmt: skip
    longest = 0.0
    for case in todo:
        if end - time.monotonic() < 1.1 * longest:
            result["skipped"].append(case._asdict())
            continue
        start = time.monotonic()
        try:
            record = measure_case(case, peer if version and case.torch else None, (side, side, 3), model, rounds, flags.workdir)
            share = record["flops"] / record["seconds"] / result["matmul"]["bfloat16"]
            torch = f", {record['ratio']:.2f} × PyTorch's {record['torch_images_per_s']:,.0f}" if "ratio" in record else ""
            print(f"{case.mode} {case.batch} {case.ops}: {record['images_per_s']:,.0f} images/s ({1e3 * record['seconds']:.2f} "
                  f"ms), {share:.0%} of the matrix product{torch}{record.get('torch_error', '')}", flush=True)  # fmt: skip
            result["cases"].append(record)
        except Exception as error:  # the other cases are kept
            message = " ".join(str(error).split())[:300]
            result["cases"].append({**case._asdict(), "error": message})
            print(f"{case.mode} {case.batch} {case.ops}: {message}", flush=True)
        longest = max(longest, time.monotonic() - start)
        write_json(flags.workdir / "speed.json", result)
    peer.close()
    for case in result["skipped"]:
        print(f"skipped, no time: {case}", flush=True)
    write_json(flags.workdir / "speed.json", result)


if __name__ == "__main__":
    main()
