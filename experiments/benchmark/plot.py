"""The plots of the benchmark: layers as shares of the roofline, images/s compared with PyTorch, growth and devices."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.benchmark.report import LEAST, Record, dtypes_of, roofline
from experiments.command import save_figure
from experiments.style import WIDTH, styled


@styled
def plot(records: Record, path: Path) -> None:
    """Plot the parts that were measured."""
    panels = []
    if part := records.get("layers"):
        panels += [(partial(_draw_layers, dtype=dtype), part) for dtype in dtypes_of(part)]
    if part := records.get("step"):
        measured = dict.fromkeys((case["pass"], case["dtype"]) for case in part["cases"])
        panels += [(partial(_draw_speed, which=which, dtype=dtype), part) for which, dtype in measured]
    others = {"growth": _draw_growth, "devices": _draw_devices}
    panels += [(draw, records[name]) for name, draw in others.items() if name in records]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH / 2 * columns, 3.6 * rows), layout="constrained")
    for i, (draw, part) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw(axes, part)
        axes.set_title(f"{axes.get_title()}\n{part['device']}, {part['date']}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below the panel, not over its lines
    save_figure(figure, path)


def _draw_layers(axes: Axes, part: Record, dtype: str) -> None:
    records = [r for r in part["layers"] if r["seconds"] > LEAST and r["dtype"] == dtype]
    names = list(dict.fromkeys(r["layer"] for r in records))
    for which, shift in {"forward": -0.2, "backward": 0.2, "update": 0.0}.items():
        points = [r for r in records if r["pass"] == which]
        shares = [100 * roofline(r, part["rates"]) for r in points]
        axes.barh([names.index(r["layer"]) + shift for r in points], shares, height=0.38, label=which)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="% of the roofline", title=f"Layers, {dtype}, {part['batch']} images")


def _draw_speed(axes: Axes, part: Record, which: str, dtype: str) -> None:
    cases = [c for c in part["cases"] if c["pass"] == which and c["dtype"] == dtype]
    curves = {"this project": [(c["batch"], c["images_per_s"]) for c in cases]}
    for mode in dict.fromkeys(peer["mode"] for case in cases for peer in case["peers"]):
        speeds = [{peer["mode"]: peer["images_per_s"] for peer in case["peers"]} for case in cases]
        # NaN: no line over a batch at which it was not measured.
        curves[f"PyTorch {mode}"] = [(c["batch"], s.get(mode, np.nan)) for c, s in zip(cases, speeds, strict=True)]
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
    _count_axis(axes, [c["batch"] for c in cases])
    axes.set(xlabel="batch", ylabel="images/s", title=f"{which.capitalize()}, {dtype}")


def _count_axis(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _draw_growth(axes: Axes, part: Record) -> None:
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
    axes.set(xlabel="GFLOP per step", ylabel="seconds per step", title="Growth")


def _draw_devices(axes: Axes, part: Record) -> None:
    counts, seconds = ([point[key] for point in part["curve"]] for key in ("value", "seconds"))
    axes.plot(counts, seconds, "o-", markersize=4, label="measured")
    # Virtual devices share the cores: linear cost is the time of one device. Real ones divide it.
    axes.plot(
        counts, [seconds[0] / (1 if part["virtual"] else n) for n in counts], "k:", linewidth=1, label="linear cost"
    )
    _count_axis(axes, counts)
    kind = "virtual devices" if part["virtual"] else "devices"
    axes.set(xlabel=kind, ylabel="seconds per step", title=f"Data parallel, {part['batch']} images")
