"""The tables and the picture of `experiments.benchmark`, from what it measured."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
LEAST = 1e-8  # seconds that are a difference of two, and not noise alone


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows))


def _dtypes(part: Record) -> list[str]:
    return sorted(part["rates"]["matmul"], reverse=True)  # float32 first


def _count(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def fastest(case: Record) -> Record | None:
    """PyTorch's fastest form in a case."""
    return max(case["peers"], key=lambda peer: peer["images_per_s"], default=None)


def case_line(case: Record) -> str:
    """A case in one line, as it is measured."""
    peers = "; ".join(f"{p['form']} {_count(p['images_per_s'])}, ratio {p['ratio']:.2f}" for p in case["peers"])
    failed = "; ".join(f"{name} failed: {error}" for name, error in case["peer_errors"].items())
    beside = f" (PyTorch: {'; '.join(filter(None, (peers, failed)))})" if peers or failed else ""
    return f"{case['pass']} {case['dtype']} batch {case['batch']}: {_count(case['images_per_s'])} images/s{beside}"


def agreement(part: Record) -> str:
    """How far PyTorch's results are from ours, in one line."""
    name, worst = max(part["differences"].items(), key=lambda item: item[1])
    return (
        f"With the same weights and images, without dropout, our logits and gradients in float32 differ from those of "
        f"PyTorch {part['torch']['version']} in float64 by at most {worst:.1e} of the largest element ({name})."
    )


def _step(part: Record) -> str:
    matmul, copy = part["rates"]["matmul"], part["rates"]["copy"]
    names = list(dict.fromkeys(p["form"] for case in part["cases"] for p in case["peers"]))
    head = ["pass", "dtype", "batch", "images/s", "of the matrix product", "of the copy", "compile (s)",
            "spread", "program (MB)", "peak (MB)", *(f"PyTorch {n}" for n in names)]  # fmt: skip
    head += ["ratio to the fastest"] * bool(names)
    rows = []
    for case in part["cases"]:
        peers = {p["form"]: _count(p["images_per_s"]) for p in case["peers"]}
        peak = case.get("device_peak_bytes") or case.get("resident_peak_bytes")
        best = fastest(case)
        rows.append([
            case["pass"], case["dtype"], case["batch"], _count(case["images_per_s"]),
            f"{case['flops'] / case['seconds'] / matmul[case['dtype']]:.0%}",
            f"{case['bytes'] / case['seconds'] / copy:.0%}", f"{case['compile_s']:.1f}", _spread(case["rounds_s"]),
            _count(case["program_bytes"] / 1e6), _count(peak / 1e6) if peak else "not told",
            *(peers.get(n, "—") for n in names), *([f"{best['ratio']:.2f}"] if best else ["—"] * bool(names)),
        ])  # fmt: skip
    measured = ", ".join(f"{matmul[dtype] / 1e9:,.0f} GFLOP/s in a {dtype} matrix product" for dtype in _dtypes(part))
    notes = (
        f"Spread is that of the middle half of {len(part['cases'][0]['rounds_s'])} rounds, of their median. Program is "
        "what the compiled step holds at once; peak what was seen, on a GPU of the device since the start, on a CPU of "
        "the whole process."
    )
    lines = [f"The device reaches {measured} and {copy / 1e9:.1f} GB/s in a copy. {notes}", _table(head, rows)]
    if part["torch"]:
        lines.append(agreement(part))
    return "\n\n".join([*lines, *_memory(part)])


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return f"{(high - low) / middle:.0%}"


def memory_model(part: Record, dtype: str) -> tuple[float, float] | None:
    """Bytes of the training program as (bytes without images, bytes an image), from the two largest batches."""
    cases = [c for c in part["cases"] if c["pass"] == "training" and c["dtype"] == dtype][-2:]
    if len(cases) < 2:
        return None
    small, large = cases
    slope = (large["program_bytes"] - small["program_bytes"]) / (large["batch"] - small["batch"])
    return large["program_bytes"] - slope * large["batch"], slope


def _memory(part: Record) -> list[str]:
    lines = []
    for dtype in _dtypes(part):
        if found := memory_model(part, dtype):
            fixed, image = found
            donated = next(c["donated_bytes"] for c in part["cases"] if c["pass"] == "training")
            lines.append(
                f"Memory of a training step in {dtype}: {fixed / 1e6:.0f} MB and {image / 1e6:.2f} MB an image, so "
                f"that {part['memory_bytes'] / 1e9:.1f} GB hold a batch of "
                f"{int((part['memory_bytes'] - fixed) / image):,} (computed). Donated: parameters, velocities and "
                f"counters, {donated / 1e6:.0f} MB."
            )
    return lines


def roofline(record: Record, rates: Record) -> float:
    """The share of what the device could do: the longer of computing at the matrix product's rate and moving the least
    bytes at the copy's, by the measured time."""
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
        f"Each layer alone, {part['batch']} images; bytes are the least, each array moved once. Operations are those "
        "of the definition, so that a convolution that needs fewer (on a CPU, Winograd's) may pass 100%. Together: "
    )
    return f"{text}{', '.join(totals)}.\n\n{_table(head, rows)}"


def _forms(part: Record) -> str:
    rows = [
        (r["network"], r["batch"], ", ".join(r["plain"]) or "none", _count(1e3 * r["seconds"]),
         _spread(r["rounds_s"]), f"{r['ratio']:.2f}")
        for r in part["records"]
    ]  # fmt: skip
    head = ("network", "batch", "operations in XLA's form", "step (ms)", "spread", "of this project's")
    return (
        "A training step in float32 on one device, with the operations that `ops.py` writes by hand and with XLA's in "
        f"their place; medians of alternating rounds.\n\n{_table(head, rows)}"
    )


def _growth(part: Record) -> str:
    rows = [
        (name, point["value"], _count(point["flops"] / 1e9), _count(1e3 * point["seconds"]),
         _count(point["flops"] / point["seconds"] / 1e9), f"{part['exponents'][name]:.2f}")
        for name, curve in part["curves"].items() for point in curve
    ]  # fmt: skip
    head = ("against", "value", "GFLOP", "step (ms)", "GFLOP/s", "exponent")
    return (
        f"A training step, {part['batch']} images where the batch is not what grows; the exponent p of time ~ FLOP^p "
        f"over the three largest, 1 is linear.\n\n{_table(head, rows)}"
    )


def _devices(part: Record) -> str:
    head = ("devices", "step (s)", "of one device's")
    one = part["curve"][0]["seconds"]
    rows = [(p["value"], f"{p['seconds']:.3f}", f"{p['seconds'] / one:.2f}") for p in part["curve"]]
    shared = " The devices are virtual and share the CPU's cores: equal times are linear cost." * part["virtual"]
    return f"Data parallel, {part['batch']} images over all devices.{shared}\n\n{_table(head, rows)}"


def _loop(part: Record) -> str:
    mesh = " × ".join(f"{size} {axis}" for axis, size in part["mesh"].items())
    head = ("data set", "batch", "mesh", "bare step (images/s)", "loop (images/s)", "the loop adds")
    row = (part["dataset"], part["batch"], mesh, _count(part["bare_images_per_s"]), _count(part["loop_images_per_s"]),
           f"{part['overhead']:.1%}")  # fmt: skip
    return f"Medians of windows of {part['window']} steps, alternating.\n\n{_table(head, [row])}"


def _start(part: Record) -> str:
    head = ("recipe", "first start (s)", "second start (s)", "programs kept", "MB")
    rows = [
        (name, f"{r['first_s']:.1f}", f"{r['second_s']:.1f}", r["programs"], f"{r['cache_bytes'] / 1e6:.1f}")
        for name, r in part["recipes"].items()
    ]  # fmt: skip
    return f"From the command to the end of its first step, batch 32, a part of the data.\n\n{_table(head, rows)}"


SECTIONS = {
    "step": ("Training and inference", _step),
    "layers": ("Layer by layer", _layers),
    "forms": ("The operations written by hand", _forms),
    "growth": ("Growth", _growth),
    "devices": ("Devices", _devices),
    "loop": ("The loop", _loop),
    "stream": ("The loop, streaming", _loop),
    "start": ("The second start", _start),
}


def summary(records: Record) -> str:
    """The main figures, each with its device and date."""
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
                text += f"; {best['ratio']:.2f} × PyTorch's fastest ({best['form']}: {_count(best['images_per_s'])})"
            add("step", f"{case['pass']}, {case['dtype']}, batch {largest}", text)
        for dtype in _dtypes(part):
            if found := memory_model(part, dtype):
                add("step", f"memory of a training step, {dtype}",
                    f"{found[0] / 1e6:.0f} MB and {found[1] / 1e6:.2f} MB an image")  # fmt: skip
    if part := records.get("forms"):
        for r in part["records"]:
            if len(r["plain"]) > 1:
                add("forms", f"XLA's operations in place of this project's, {r['network']} network, batch {r['batch']}",
                    f"a training step takes {r['ratio']:.2f} times as long")  # fmt: skip
    if part := records.get("growth"):
        for name, exponent in part["exponents"].items():
            add("growth", f"growth with the {name}", f"time ~ FLOP^{exponent:.2f}")
    if part := records.get("devices"):
        one, last = part["curve"][0], part["curve"][-1]
        virtual = "virtual " * part["virtual"]
        add("devices", f"growth with {virtual}devices, batch {part['batch']}",
            f"{last['value']} take {last['seconds'] / one['seconds']:.2f} of the time of one")  # fmt: skip
    for name, what in (("loop", "the loop"), ("stream", "the loop, streaming")):
        if part := records.get(name):
            loop = f"{_count(part['loop_images_per_s'])} images/s, bare step {_count(part['bare_images_per_s'])}"
            add(name, f"{what} on {part['dataset']}, batch {part['batch']}", f"{loop}: {part['overhead']:+.1%}")
    if part := records.get("start"):
        for name, r in part["recipes"].items():
            add("start", f"command to first step, {name}", f"{r['first_s']:.1f} s; second start {r['second_s']:.1f} s")
    return _table(("what", "measured", "device", "date"), rows)


def section(part: str, record: Record) -> str:
    """A part that was measured, in Markdown, with its device and date."""
    title, text = SECTIONS[part]
    quick = "; a small network, --quick" if record["quick"] else ""
    malloc = f", {record['malloc']}" if record.get("malloc") else ""
    about = f"{record['device']}, {record['date']}, JAX {record['jax']}{malloc}{quick}"
    return f"## {title}\n\n{about}\n\n{text(record)}"


def markdown(records: Record) -> str:
    """The main figures, then every part that was measured."""
    sections = [section(part, records[part]) for part in SECTIONS if part in records]
    return "\n\n".join(["# Benchmark", summary(records), *sections]) + "\n"


def plot(records: Record, path: Path) -> None:
    """Layers under the roofline, images/s beside PyTorch, growth and devices: what was measured of them."""
    from matplotlib.figure import Figure

    panels = []
    if part := records.get("layers"):
        panels += [(partial(_draw_roofline, dtype=dtype), part) for dtype in _dtypes(part)]
    if part := records.get("step"):
        measured = dict.fromkeys((case["pass"], case["dtype"]) for case in part["cases"])
        panels += [(partial(_draw_speed, which=which, dtype=dtype), part) for which, dtype in measured]
    others = {"growth": _draw_growth, "devices": _draw_devices}
    panels += [(draw, records[name]) for name, draw in others.items() if name in records]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 5 * rows), layout="constrained")
    for i, (draw, part) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw(axes, part)
        axes.grid(alpha=0.3)
        axes.set_title(f"{axes.get_title()}: {part['device']}, {part['date']}", fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _draw_roofline(axes, part: Record, dtype: str) -> None:
    known = [r for r in part["layers"] if r["flops"] > 0 and r["seconds"] > LEAST and r["dtype"] == dtype]
    intensity = [r["flops"] / r["bytes"] for r in known]
    top, copy = part["rates"]["matmul"][dtype], part["rates"]["copy"]
    reach = np.array([min(intensity) / 4, top / copy, max(intensity) * 8])  # room for names
    axes.loglog(reach, np.minimum(top, copy * reach) / 1e9, "k-", linewidth=1, label="roofline")
    for which in ("forward", "backward", "update"):
        points = [r for r in known if r["pass"] == which]
        x, y = ([r["flops"] / r[by] / unit for r in points] for by, unit in (("bytes", 1), ("seconds", 1e9)))
        axes.loglog(x, y, "o", markersize=4, label=which)
        _label(axes, [r["layer"] for r in points], x, y, "right" if which == "backward" else "left")
    axes.set(xlabel="FLOP a byte (least bytes)", ylabel="GFLOP/s", title=f"Layers, {dtype}, {part['batch']} images")


def _label(axes, names: Sequence[str], x: Sequence[float], y: Sequence[float], side: str) -> None:
    """Names beside their points, on a logarithmic scale; points that are hardly apart have one label together."""
    at = np.log10(np.array([x, y])).T
    apart = np.abs(at[:, None] - at[None]) > (0.3, 0.07)  # decades: what a label covers
    groups = {}
    for i, name in enumerate(names):
        first = next((j for j in groups if not apart[i, j].any()), i)
        groups.setdefault(first, []).append(name)
    for i, together in groups.items():
        axes.annotate(", ".join(together), (x[i], y[i]), fontsize=7, ha="left" if side == "right" else "right",
                      va="center", xytext=(5 if side == "right" else -5, 0), textcoords="offset points")  # fmt: skip


def _draw_speed(axes, part: Record, which: str, dtype: str) -> None:
    cases = [c for c in part["cases"] if c["pass"] == which and c["dtype"] == dtype]
    curves = {"this project": [(c["batch"], c["images_per_s"]) for c in cases]}
    for form in dict.fromkeys(peer["form"] for case in cases for peer in case["peers"]):
        speeds = [{peer["form"]: peer["images_per_s"] for peer in case["peers"]} for case in cases]
        # No line over a batch at which it was not measured.
        curves[f"PyTorch {form}"] = [(c["batch"], s.get(form, np.nan)) for c, s in zip(cases, speeds, strict=True)]
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
    _count_axis(axes, [c["batch"] for c in cases])
    axes.set(xlabel="batch", ylabel="images/s", title=f"{which.capitalize()}, {dtype}")


def _count_axis(axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(bottom=0)


def _draw_growth(axes, part: Record) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, curve in part["curves"].items():
        x, y = ([point[key] for point in curve] for key in ("flops", "seconds"))
        label = f"{name} {curve[0]['value']} to {curve[-1]['value']}: exponent {part['exponents'][name]:.2f}"
        axes.loglog(np.array(x) / 1e9, y, "o-", markersize=4, label=label)
    low, high = axes.get_xlim()
    start = axes.get_ylim()[0]
    axes.loglog((low, high), (start, start * high / low), "k:", linewidth=1, label="linear")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="GFLOP a step", ylabel="seconds a step", title="Growth")


def _draw_devices(axes, part: Record) -> None:
    counts, seconds = ([point[key] for point in part["curve"]] for key in ("value", "seconds"))
    axes.plot(counts, seconds, "o-", markersize=4, label="measured")
    # Virtual devices share the cores, so that their work takes one device's time at best; real ones divide it.
    axes.plot(
        counts, [seconds[0] / (1 if part["virtual"] else n) for n in counts], "k:", linewidth=1, label="linear cost"
    )
    _count_axis(axes, counts)
    kind = "virtual devices" if part["virtual"] else "devices"
    axes.set(xlabel=kind, ylabel="seconds a step", title=f"Data parallel, {part['batch']} images")
