"""Project the step time of each layout to more devices: python -m experiments.projection --records FILE --workdir DIR

The bytes and FLOPs are those that `experiments.sharding` read from the compiled programs. The batch stays the same
(strong scaling); a step computes, then communicates, without overlap and without latency. A program that moved more
than the minimum of its layout is assumed to move more by the same factor on any number of devices.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from alexnet_jax import AlexNet
from alexnet_jax.errors import UserError, errors_on_one_line, one_line
from alexnet_jax.runtime.files import write_json
from alexnet_jax.tables import table as text_table
from experiments.command import make_workdir, save_figure, write_text
from experiments.sharding import LAYOUTS, expected
from experiments.sharding.layouts import title

DEVICES = (2, 8, 64, 512)
SCALES = "A layout stops scaling where the next number of devices no longer makes a step 10 % shorter."
KEYS = {"layout", "mesh", "batch", "flops", "received_bytes", "minimum_bytes"}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of `experiments.sharding`; raises UserError if the file has something else."""
    try:
        records = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--records={path}: {error.strerror}; expected sharding.json of experiments.sharding") from None
    except ValueError as error:
        raise UserError(f"--records={path} is corrupt ({one_line(error)}); run experiments.sharding again") from None
    if not records or not isinstance(records, list) or not all(isinstance(r, dict) and set(r) >= KEYS for r in records):
        raise UserError(f"--records={path}: expected what experiments.sharding writes, with at least one layout")
    return records


def project(
    records: Sequence[dict[str, Any]],
    link: float,
    compute: float,
    batch: int,
    devices: Sequence[int] = DEVICES,
    model: AlexNet | None = None,
    shape: tuple[int, ...] = (224, 224, 3),
) -> list[dict[str, Any]]:
    """Return the predicted seconds of a step of each recorded layout.

    A device receives the minimum of bytes that the layout needs, times the ratio of received to minimum bytes of the
    compiled program; it computes the measured FLOPs of an image, times its share of the batch.

    Args:
      records: of `experiments.sharding.study`, with the same model and shape.
      link: bytes/s that a device receives.
      compute: FLOP/s that a device sustains.
      batch: images in a step, over all devices; each number of devices divides it.

    Returns:
      Records of layout, devices, compute_s, communicate_s, step_s; step_s is None where the layout has no such mesh.

    Raises:
      UserError: a speed that is not positive, a batch that the devices do not divide, or an unknown layout.
    """
    if not (0 < link < math.inf and 0 < compute < math.inf):
        raise UserError(f"--link={link:g} --compute={compute:g}: expected positive speeds")
    if batch < 1:
        raise UserError(f"--batch={batch}: expected at least 1")
    if bad := [n for n in devices if batch % n]:
        raise UserError(f"--batch={batch}: {bad[0]} devices do not divide it; expected a multiple of it")
    layouts = {layout.name: layout for layout in LAYOUTS}
    if unknown := {r["layout"] for r in records} - set(layouts):
        raise UserError(f"--records: unknown layout {min(unknown)!r}; expected some of {', '.join(layouts)}")
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
    """Return where a layout stops scaling: the last count whose step is at least 10 % shorter than the one before.

    One device, which does not communicate, is the first count.
    """
    points = [r for r in rows if r["layout"] == layout and r["step_s"]]
    best = 1, points[0]["compute_s"] * points[0]["devices"]
    for row in points:
        if row["devices"] > 1 and row["step_s"] > 0.9 * best[1]:
            return f"{best[0]}"
        best = row["devices"], row["step_s"]
    return f"{best[0]}" if len(points) == 1 else f"beyond {best[0]}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the milliseconds of a step and the share of communication as a Markdown table."""
    counts = sorted({r["devices"] for r in rows if r["step_s"]})
    header = ("layout", *(f"{n} device{'s' * (n > 1)}" for n in counts), "stops scaling at")
    lines = []
    for layout in dict.fromkeys(r["layout"] for r in rows):
        cells = {
            r["devices"]: f"{1e3 * r['step_s']:.2f} ({r['communicate_s'] / r['step_s']:.0%})"
            for r in rows if r["layout"] == layout and r["step_s"]
        }  # fmt: skip
        lines.append((title(layout), *(cells.get(n, "—") for n in counts), stops_at(rows, layout)))
    return text_table(lines, header, markdown=True)


def plot(rows: Sequence[dict[str, Any]], path: Path, caption: str = "") -> None:
    """Plot the step time against the devices, on logarithmic scales; dashed lines are communication alone."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for layout in dict.fromkeys(r["layout"] for r in rows):
        points = [r for r in rows if r["layout"] == layout and r["step_s"]]
        counts = [r["devices"] for r in points]
        (line,) = axes.loglog(counts, [1e3 * r["step_s"] for r in points], "o-", label=title(layout))
        if any(r["communicate_s"] for r in points):
            axes.loglog(counts, [1e3 * r["communicate_s"] for r in points], "--", color=line.get_color(), linewidth=0.8)
    counts = sorted({r["devices"] for r in rows if r["step_s"]})
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    one = next(r["compute_s"] * r["devices"] for r in rows if r["step_s"])
    axes.axhline(1e3 * one, color="0.7", linewidth=0.8, zorder=0)
    axes.set_title(caption, fontsize=10)
    axes.set_xlabel("devices")
    axes.set_ylabel("step (ms); dashed: communication")
    axes.legend(frameon=False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.projection", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="sharding.json of experiments.sharding")
    parser.add_argument("--workdir", type=Path, required=True, help="for projection.json, .md and .png")
    parser.add_argument("--link", type=float, default=50e9, help="bytes/s that a device receives (default: 50e9)")
    parser.add_argument("--compute", type=float, default=200e12, help="FLOP/s of a device (default: 200e12)")
    parser.add_argument("--batch", type=int, default=4096, help="images in a step, over all devices (default: 4096)")
    flags = parser.parse_args()
    with errors_on_one_line():
        rows = project(read_records(flags.records), flags.link, flags.compute, flags.batch)
        assumptions = f"{flags.batch} images, {flags.link / 1e9:g} GB/s, {flags.compute / 1e12:g} TFLOP/s"
        text = f"Step time in ms (share of communication): {assumptions}\n\n{table(rows)}\n\n{SCALES}\n"
        make_workdir(flags.workdir)
        write_json(flags.workdir / "projection.json", rows)
        write_text(flags.workdir / "projection.md", text)
        plot(rows, flags.workdir / "projection.png", assumptions)
    print(f"{text}\nWritten to {flags.workdir}")


if __name__ == "__main__":
    main()
