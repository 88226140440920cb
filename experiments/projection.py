"""How the cost of each layout grows: python -m experiments.projection --records DIR/sharding.json --workdir DIR

From the bytes and FLOPs that `experiments.sharding` read out of the compiled programs, the step time on more devices
than are at hand. The batch stays the same (strong scaling); a step computes, then communicates, without overlap or
latency. What a program moved beyond the least that its layout needs, it is taken to move anywhere, in proportion.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_jax import AlexNet
from experiments.sharding import LAYOUTS, expected

DEVICES = (2, 8, 64, 512)
SCALES = "A layout stops scaling where the next number of devices no longer makes a step 10 % shorter."


def project(
    records: Sequence[dict[str, Any]],
    link: float,
    compute: float,
    batch: int,
    devices: Sequence[int] = DEVICES,
    model: AlexNet | None = None,
    shape: tuple[int, ...] = (224, 224, 3),
) -> list[dict[str, Any]]:
    """Predicted seconds of a step of each recorded layout.

    A device receives the bytes that the layout needs there, times what its compiled program moved over that minimum
    where it was measured; it computes the measured FLOPs of an image, times its share of the batch.

    Args:
      records: of `experiments.sharding.study`, with the same model and shape.
      link: bytes/s that a device receives.
      compute: FLOP/s that a device sustains.
      batch: images in a step, over all devices; each number of devices divides it.

    Returns:
      Records of layout, devices, compute_s, communicate_s, step_s; step_s is None where the layout has no such mesh.

    Raises:
      ValueError: a speed that is not positive, or a batch that the devices do not divide.
    """
    if not (0 < link < math.inf and 0 < compute < math.inf):
        raise ValueError(f"--link={link:g} --compute={compute:g}: expected positive speeds")
    if batch < 1:
        raise ValueError(f"--batch={batch}: expected at least 1")
    if bad := [n for n in devices if batch % n]:
        raise ValueError(f"--batch={batch}: {bad[0]} devices do not divide it")
    if not records or not isinstance(records, list) or not all("collectives" in r for r in records):
        raise ValueError("expected what experiments.sharding writes, with at least one layout")
    if unknown := {r["layout"] for r in records} - {layout.name for layout in LAYOUTS}:
        raise ValueError(f"unknown layout {min(unknown)!r}")
    layouts = {layout.name: layout for layout in LAYOUTS}
    rows = []
    for record in records:
        layout = layouts[record["layout"]]
        excess = record["received_bytes"] / record["minimum_bytes"] if record["minimum_bytes"] else 1.0
        measured_on = record["mesh"]["data"] * record["mesh"]["tower"]
        per_image = record["flops"] * measured_on / record["batch"]
        for count in devices:
            data = count // layout.tower if layout.data == -1 else layout.data
            row = {"layout": layout.name, "devices": count, "compute_s": None, "communicate_s": None, "step_s": None}
            if data * layout.tower == count or count == devices[0] and layout.name == "one_device":
                used = data * layout.tower
                needed = expected(layout, model or AlexNet(), shape, batch, data, layout.tower)
                row["compute_s"] = per_image * batch / used / compute
                row["communicate_s"] = sum(c.received for c in needed) * excess / link
                row["step_s"] = row["compute_s"] + row["communicate_s"]
                row["devices"] = used
            rows.append(row)
    return rows


def stops_at(rows: Sequence[dict[str, Any]], layout: str) -> str:
    """Where more devices no longer help: the last count whose step is at least 10 % shorter than the one before.

    One device, which has nobody to wait for, is the first of them.
    """
    known = [r for r in rows if r["layout"] == layout and r["step_s"]]
    best = 1, known[0]["compute_s"] * known[0]["devices"]
    for row in known:
        if row["devices"] > 1 and row["step_s"] > 0.9 * best[1]:
            return f"{best[0]}"
        best = row["devices"], row["step_s"]
    return f"{best[0]}" if len(known) == 1 else f"beyond {best[0]}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of a step, with the part of it that is communication, as a Markdown table."""
    counts = sorted({r["devices"] for r in rows if r["step_s"]})
    lines = [
        ("layout", *(f"{n} device{'s' * (n > 1)}" for n in counts), "stops scaling at"),
        ("---",) * (len(counts) + 2),
    ]
    for layout in dict.fromkeys(r["layout"] for r in rows):
        cells = {r["devices"]: r for r in rows if r["layout"] == layout and r["step_s"]}
        shown = ["—"] * len(counts)
        for i, n in enumerate(counts):
            if n in cells:
                step_s, communicate_s = cells[n]["step_s"], cells[n]["communicate_s"]
                shown[i] = f"{1e3 * step_s:.2f} ({communicate_s / step_s:.0%})"
        lines.append((layout.replace("_", " "), *shown, stops_at(rows, layout)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Step time against devices, both on logarithmic scales; dashed is what communication alone takes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for layout in dict.fromkeys(r["layout"] for r in rows):
        known = [r for r in rows if r["layout"] == layout and r["step_s"]]
        counts = [r["devices"] for r in known]
        (line,) = axes.loglog(counts, [1e3 * r["step_s"] for r in known], "o-", label=layout.replace("_", " "))
        if any(r["communicate_s"] for r in known):
            axes.loglog(counts, [1e3 * r["communicate_s"] for r in known], "--", color=line.get_color(), linewidth=0.8)
    counts = sorted({r["devices"] for r in rows if r["step_s"]})
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    one = next(r["compute_s"] * r["devices"] for r in rows if r["step_s"])
    axes.axhline(1e3 * one, color="0.7", linewidth=0.8, zorder=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("devices")
    axes.set_ylabel("step (ms); dashed: communication")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.projection", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="sharding.json of experiments.sharding")
    parser.add_argument("--workdir", type=Path, required=True, help="for projection.json, .md and .png")
    parser.add_argument("--link", type=float, default=50e9, help="bytes/s that a device receives (default: 50e9)")
    parser.add_argument("--compute", type=float, default=200e12, help="FLOP/s of a device (default: 200e12)")
    parser.add_argument("--batch", type=int, default=4096, help="images in a step, over all devices (default: 4096)")
    flags = parser.parse_args()
    try:
        records = json.loads(flags.records.read_text())
        rows = project(records, flags.link, flags.compute, flags.batch)
    except (ValueError, KeyError, TypeError, OSError) as error:
        sys.exit(f"Error: {error}" if str(error).startswith("--") else f"Error: --records={flags.records}: {error}")
    assumptions = f"{flags.batch} images, {flags.link / 1e9:g} GB/s, {flags.compute / 1e12:g} TFLOP/s"
    text = f"Step time in ms (share of communication): {assumptions}\n\n{table(rows)}\n\n{SCALES}\n"
    try:
        flags.workdir.mkdir(parents=True, exist_ok=True)
        (flags.workdir / "projection.json").write_text(json.dumps(rows, indent=2) + "\n")
        (flags.workdir / "projection.md").write_text(text)
        plot(rows, flags.workdir / "projection.png", assumptions)
    except OSError as error:
        sys.exit(f"Error: --workdir={flags.workdir}: {error}")
    print(f"{text}\nWritten to {flags.workdir}")


if __name__ == "__main__":
    main()
