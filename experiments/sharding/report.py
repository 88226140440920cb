"""The records of `study` as Markdown tables and as a picture."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.model import LAYERS
from alexnet_jax.sharding import DATA, TOWER
from alexnet_jax.tables import table as text_table
from experiments.command import save_figure
from experiments.sharding.layouts import title
from experiments.style import GRAY, GREEN, ORANGE, SKY, styled


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the records as a Markdown table; memory and traffic are those of one device."""
    header = (
        "layout", "data × tower", "received (MB)", "minimum (MB)", "axes", "parameters (MB)", "optimizer (MB)",
        "temporary (MB)", "GFLOP", "compile (s)", "step (s)",
    )  # fmt: skip
    rows = []
    for r in records:
        axes = sorted({c["axis"] for c in r["collectives"]})
        rows.append((
            title(r["layout"]), f"{r['mesh'][DATA]} × {r['mesh'][TOWER]}", f"{r['received_bytes'] / 1e6:.1f}",
            f"{r['minimum_bytes'] / 1e6:.1f}", ", ".join(axes) or "—", f"{r['parameter_bytes'] / 1e6:.0f}",
            f"{r['optimizer_bytes'] / 1e6:.0f}", f"{r['temporary_bytes'] / 1e6:.0f}",
            f"{r['flops'] / 1e9:.1f}" if r["flops"] else "unknown", f"{r['compile_s']:.1f}", f"{r['step_s']:.2f}",
        ))  # fmt: skip
    return text_table(rows, header, markdown=True)


def layer_table(record: dict[str, Any]) -> str:
    """Return the collectives of one record as a Markdown table, each with the minimum that the layout needs."""

    def by_place(collectives):
        return {
            (c["layer"], "backward" if c["backward"] else "forward", c["axis"], c["kind"]): f"{c['received'] / 1e3:.1f}"
            for c in collectives
        }

    actual, minimum = by_place(record["collectives"]), by_place(record["expected"])
    rows = [(*place, actual.get(place, "—"), minimum.get(place, "—")) for place in actual | minimum]
    header = ("layer", "pass", "axis", "collective", "received (kB)", "minimum (kB)")
    return text_table(rows, header, markdown=True)


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Return the table of all layouts, and for each layout that communicates the table of its layers."""
    layers = [f"{title(r['layout'])}\n\n{layer_table(r)}" for r in records if r["collectives"]]
    return "\n\n".join([table(records), *layers]) + "\n"


@styled
def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot a row for each layout and a column for each layer: the MB received, forward above backward, by mesh axis."""
    columns = [*LAYERS, "metrics"]
    colors = {DATA: SKY, TOWER: ORANGE, f"{DATA}+{TOWER}": GREEN}
    largest = max([c["received"] for r in records for c in r["collectives"]], default=1)
    figure = Figure(figsize=(1.15 * len(columns) + 2, 1.1 * len(records) + 1.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    for row, record in enumerate(records):
        for column, layer in enumerate(columns):
            for top, backward in ((-0.42, False), (0.02, True)):
                received = Counter()
                for c in record["collectives"]:
                    if c["layer"] == layer and c["backward"] == backward:
                        received[c["axis"]] += c["received"]
                height = 0.4 / max(len(received), 1)
                for i, (axis, size) in enumerate(sorted(received.items())):
                    width = 0.5 + 0.4 * max(0.0, 1 + np.log10(size / largest) / 6)
                    middle = row + top + (i + 0.5) * height
                    axes.barh(middle, width, height, column - width / 2, color=colors.get(axis, GRAY))
                    small = f"{size / 1e3:.0f} kB" if size >= 1e3 else f"{size} B"
                    text = f"{size / 1e6:.1f}" if size >= 1e5 else small
                    mark = "◀" if backward else "▶"
                    axes.text(column, middle, f"{mark} {text}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.xaxis.tick_top()
    names = [f"{title(r['layout'])}\n{r['mesh'][DATA]} × {r['mesh'][TOWER]}" for r in records]
    axes.set_yticks(range(len(records)), names)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(records) - 0.45, -0.55)
    axes.hlines(np.arange(len(records) - 1) + 0.5, -0.6, len(columns), color="0.85", linewidth=0.8)
    handles = [axes.barh(0, 0, color=color, label=f"over {axis}") for axis, color in colors.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3)
    axes.set_title(
        f"MB that a device receives in a step of {records[0]['batch']} images (bar width: logarithmic): ▶ forward, "
        "◀ backward"
    )
    save_figure(figure, path)
