"""The tables of the benchmark, from its records."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_jax.tables import table

Record = dict[str, Any]
LEAST = 1e-8  # seconds; a smaller difference of two times is noise


def dtypes_of(part: Record) -> list[str]:
    """Return the dtypes of a part, float32 first."""
    return sorted(part["rates"]["matmul"], reverse=True)


def _count(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def fastest(case: Record) -> Record | None:
    """Return PyTorch's fastest mode in a case."""
    return max(case["peers"], key=lambda peer: peer["images_per_s"], default=None)


def case_line(case: Record) -> str:
    """Return a case on one line, for the terminal."""
    peers = "; ".join(f"{p['mode']} {_count(p['images_per_s'])}, ratio {p['ratio']:.2f}" for p in case["peers"])
    failed = "; ".join(f"{name} failed: {error}" for name, error in case["peer_errors"].items())
    torch = f" (PyTorch: {'; '.join(filter(None, (peers, failed)))})" if peers or failed else ""
    return f"{case['pass']} {case['dtype']} batch {case['batch']}: {_count(case['images_per_s'])} images/s{torch}"


def agreement(part: Record) -> str:
    """Return the difference between PyTorch's results and ours, on one line."""
    name, worst = max(part["differences"].items(), key=lambda item: item[1])
    return (
        f"With the same weights and images, without dropout, our logits and gradients in float32 differ from those of "
        f"PyTorch {part['torch']['version']} in float64 by at most {worst:.1e} of the largest element ({name})."
    )


def _step(part: Record) -> str:
    matmul, copy = part["rates"]["matmul"], part["rates"]["copy"]
    names = list(dict.fromkeys(p["mode"] for case in part["cases"] for p in case["peers"]))
    head = ["pass", "dtype", "batch", "images/s", "of the matrix product", "of the copy", "compile (s)",
            "spread", "program (MB)", "peak (MB)", *(f"PyTorch {n}" for n in names)]  # fmt: skip
    head += ["ratio to the fastest"] * bool(names)
    rows = []
    for case in part["cases"]:
        peers = {p["mode"]: _count(p["images_per_s"]) for p in case["peers"]}
        peak = case.get("device_peak_bytes") or case.get("resident_peak_bytes")
        best = fastest(case)
        rows.append([
            case["pass"], case["dtype"], case["batch"], _count(case["images_per_s"]),
            f"{case['flops'] / case['seconds'] / matmul[case['dtype']]:.0%}",
            f"{case['bytes'] / case['seconds'] / copy:.0%}", f"{case['compile_s']:.1f}", _spread(case["rounds_s"]),
            _count(case["program_bytes"] / 1e6), _count(peak / 1e6) if peak else "unknown",
            *(peers.get(n, "—") for n in names), *([f"{best['ratio']:.2f}"] if best else ["—"] * bool(names)),
        ])  # fmt: skip
    measured = ", ".join(f"{matmul[dtype] / 1e9:,.0f} GFLOP/s in a {dtype} matrix product" for dtype in dtypes_of(part))
    notes = (
        f"Spread: interquartile range of {len(part['cases'][0]['rounds_s'])} rounds, relative to their median. "
        "Program: the memory of the compiled program. Peak: the memory in use, on a GPU of the device since the start, "
        "on a CPU of the process."
    )
    lines = [
        f"The device reaches {measured} and {copy / 1e9:.1f} GB/s in a copy. {notes}",
        table(rows, head, markdown=True),
    ]
    if part["torch"]:
        lines.append(agreement(part))
    return "\n\n".join([*lines, *_memory(part)])


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return f"{(high - low) / middle:.0%}"


def memory_model(part: Record, dtype: str) -> tuple[float, float] | None:
    """Return (bytes without images, bytes per image) of the train step, from the two largest batches."""
    cases = [c for c in part["cases"] if c["pass"] == "training" and c["dtype"] == dtype][-2:]
    if len(cases) < 2:
        return None
    small, large = cases
    slope = (large["program_bytes"] - small["program_bytes"]) / (large["batch"] - small["batch"])
    return large["program_bytes"] - slope * large["batch"], slope


def _memory(part: Record) -> list[str]:
    lines = []
    for dtype in dtypes_of(part):
        if model := memory_model(part, dtype):
            fixed, image = model
            donated = next(c["donated_bytes"] for c in part["cases"] if c["pass"] == "training")
            lines.append(
                f"Memory of a train step in {dtype}: {fixed / 1e6:.0f} MB and {image / 1e6:.2f} MB per image; "
                f"{part['memory_bytes'] / 1e9:.1f} GB are enough for a batch of "
                f"{int((part['memory_bytes'] - fixed) / image):,} (computed). Donated: parameters, momentum and "
                f"counters, {donated / 1e6:.0f} MB."
            )
    return lines


def roofline(record: Record, rates: Record) -> float:
    """Return the share of the roofline that a layer reaches.

    It is the time of computing at the matrix product's rate, or that of moving the minimum of bytes at the copy's rate
    if that is longer, divided by the measured time.
    """
    least = max(record["flops"] / rates["matmul"][record["dtype"]], record["bytes"] / rates["copy"])
    return least / record["seconds"]


def _layers(part: Record) -> str:
    head = ("layer", "pass", "dtype", "ms", "GFLOP/s", "GB/s", "of the roofline")
    rows = [
        (r["layer"], r["pass"], r["dtype"], _count(1e3 * r["seconds"]), _count(r["flops"] / r["seconds"] / 1e9),
         _count(r["bytes"] / r["seconds"] / 1e9), f"{roofline(r, part['rates']):.0%}")
        if r["seconds"] > LEAST else (r["layer"], r["pass"], r["dtype"], *["—"] * 4)
        for r in part["layers"]
    ]  # fmt: skip
    totals = []
    for dtype in dict.fromkeys(r["dtype"] for r in part["layers"]):
        total = sum(r["seconds"] for r in part["layers"] if r["dtype"] == dtype)
        totals.append(f"{1e3 * total:.0f} ms in {dtype}")
    text = (
        f"Each layer alone, {part['batch']} images; bytes: the minimum, each array moved once. Operations are counted "
        "by the layer's definition; a convolution that needs fewer (on a CPU, Winograd's) may exceed 100%. Sum: "
    )
    return f"{text}{', '.join(totals)}.\n\n{table(rows, head, markdown=True)}"


def _operations(part: Record) -> str:
    rows = [
        (r["network"], r["batch"], ", ".join(r["plain"]) or "none", _count(1e3 * r["seconds"]),
         _spread(r["rounds_s"]), f"{r['ratio']:.2f}")
        for r in part["records"]
    ]  # fmt: skip
    head = ("network", "batch", "operations of XLA", "step (ms)", "spread", "relative to this project's")
    return (
        "A train step in float32 on one device, with the project's own operations (none of XLA) and with XLA's "
        f"instead; medians of alternating rounds.\n\n{table(rows, head, markdown=True)}"
    )


def _growth(part: Record) -> str:
    rows = [
        (name, point["value"], _count(point["flops"] / 1e9), _count(1e3 * point["seconds"]),
         _count(point["flops"] / point["seconds"] / 1e9), f"{part['exponents'][name]:.2f}")
        for name, curve in part["curves"].items() for point in curve
    ]  # fmt: skip
    head = ("with", "value", "GFLOP", "step (ms)", "GFLOP/s", "exponent")
    return (
        f"A train step of {part['batch']} images, unless the batch grows; the exponent p of time ~ FLOP^p over the "
        f"three largest values, 1 is linear.\n\n{table(rows, head, markdown=True)}"
    )


def _devices(part: Record) -> str:
    head = ("devices", "step (s)", "relative to one device")
    one = part["curve"][0]["seconds"]
    rows = [(p["value"], f"{p['seconds']:.3f}", f"{p['seconds'] / one:.2f}") for p in part["curve"]]
    shared = " The devices are virtual and share the CPU's cores: equal times mean linear cost." * part["virtual"]
    return f"Data parallel, {part['batch']} images over all devices.{shared}\n\n{table(rows, head, markdown=True)}"


def _loop(part: Record) -> str:
    mesh = " × ".join(f"{size} {axis}" for axis, size in part["mesh"].items())
    head = ("data set", "batch", "mesh", "train step alone (images/s)", "training loop (images/s)", "overhead")
    rates = (_count(part[f"{which}_images_per_s"]) for which in ("step_alone", "loop"))
    row = (part["dataset"], part["batch"], mesh, *rates, f"{part['overhead']:.1%}")
    return f"Medians of windows of {part['window']} steps, alternating.\n\n{table([row], head, markdown=True)}"


def _start(part: Record) -> str:
    head = ("config", "first start (s)", "second start (s)", "programs in the cache", "MB")
    rows = [
        (name, f"{r['first_s']:.1f}", f"{r['second_s']:.1f}", r["programs"], f"{r['cache_bytes'] / 1e6:.1f}")
        for name, r in part["configs"].items()
    ]  # fmt: skip
    text = "From the command to the end of its first step, batch 32, on a part of the data."
    return f"{text}\n\n{table(rows, head, markdown=True)}"


SECTIONS = {
    "step": ("Training and inference", _step),
    "layers": ("Layers", _layers),
    "operations": ("The project's operations and XLA's", _operations),
    "growth": ("Growth", _growth),
    "devices": ("Devices", _devices),
    "loop": ("Training loop", _loop),
    "stream": ("Training loop with the streaming input pipeline", _loop),
    "start": ("First and second start", _start),
}


def summary(records: Record) -> str:
    """Return the main figures as a table, each with its device and date."""
    rows = []

    def add(part, what, value):
        quick = ", a small network (--quick)" * records[part]["quick"]
        rows.append((what + quick, value, records[part]["device"], records[part]["date"]))

    if part := records.get("step"):
        largest = max(case["batch"] for case in part["cases"])
        for case in (c for c in part["cases"] if c["batch"] == largest):
            share = case["flops"] / case["seconds"] / part["rates"]["matmul"][case["dtype"]]
            text = f"{_count(case['images_per_s'])} images/s, {share:.0%} of the matrix product's rate"
            if best := fastest(case):
                text += f"; {best['ratio']:.2f} × PyTorch's fastest ({best['mode']}: {_count(best['images_per_s'])})"
            add("step", f"{case['pass']}, {case['dtype']}, batch {largest}", text)
        for dtype in dtypes_of(part):
            if model := memory_model(part, dtype):
                add("step", f"memory of a train step, {dtype}",
                    f"{model[0] / 1e6:.0f} MB and {model[1] / 1e6:.2f} MB per image")  # fmt: skip
    if part := records.get("operations"):
        for r in part["records"]:
            if len(r["plain"]) > 1:
                what = f"XLA's operations instead of this project's, {r['network']} network, batch {r['batch']}"
                add("operations", what, f"a train step takes {r['ratio']:.2f} times as long")
    if part := records.get("growth"):
        for name, exponent in part["exponents"].items():
            add("growth", f"growth with the {name}", f"time ~ FLOP^{exponent:.2f}")
    if part := records.get("devices"):
        one, last = part["curve"][0], part["curve"][-1]
        virtual = "virtual " * part["virtual"]
        add("devices", f"growth with {virtual}devices, batch {part['batch']}",
            f"{last['value']} take {last['seconds'] / one['seconds']:.2f} of the time of one")  # fmt: skip
    for name, what in (("loop", "training loop"), ("stream", "training loop with the streaming input pipeline")):
        if part := records.get(name):
            looped, alone = (_count(part[f"{which}_images_per_s"]) for which in ("loop", "step_alone"))
            text = f"{looped} images/s, train step alone {alone}: {part['overhead']:+.1%}"
            add(name, f"{what} on {part['dataset']}, batch {part['batch']}", text)
    if part := records.get("start"):
        for name, r in part["configs"].items():
            add("start", f"command to first step, {name}", f"{r['first_s']:.1f} s; second start {r['second_s']:.1f} s")
    return table(rows, ("what", "measured", "device", "date"), markdown=True)


def section(part: str, record: Record) -> str:
    """Return a part in Markdown, with its device and date."""
    title, text = SECTIONS[part]
    quick = "; a small network, --quick" if record["quick"] else ""
    malloc = f", {record['malloc']}" if record.get("malloc") else ""
    about = f"{record['device']}, {record['date']}, JAX {record['jax']}{malloc}{quick}"
    return f"## {title}\n\n{about}\n\n{text(record)}"


def markdown(records: Record) -> str:
    """Return the main figures and every part that was measured, in Markdown."""
    sections = [section(part, records[part]) for part in SECTIONS if part in records]
    return "\n\n".join(["# Benchmark", summary(records), *sections]) + "\n"
