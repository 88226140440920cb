"""Project the step time of each layout to more devices: python -m experiments.projection --workdir DIR

The programs are those that `experiments.compiled` compiled for GPUs and TPU slices. The batch stays the same (strong
scaling); a step computes, then communicates, without overlap. Every time is an estimate: a roofline from the chip's
stated figures, and rings over its network. Devices without a program of their own are scaled from another program.
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from alexnet_jax import AlexNet
from alexnet_jax.errors import UserError, errors_on_one_line, one_line
from alexnet_jax.runtime.files import write_json
from alexnet_jax.tables import table as text_table
from experiments.command import make_workdir, save_figure, write_text
from experiments.compiled.floor import Floor, floor
from experiments.compiled.report import is_record
from experiments.compiled.targets import CHIPS
from experiments.compiled.traffic import UPDATE
from experiments.sharding import LAYOUTS, Layout, expected
from experiments.sharding.layouts import title
from experiments.style import CYCLE, styled

RECORDS = Path(__file__).parent / "results/compiled/compiled.json"
MODEL = AlexNet(dtype="bfloat16")
DEVICES = (1, 2, 8, 64, 256, 512)
FARTHEST = 64  # a program is scaled to at most so many times as many or as few devices
IMAGENET, EPOCHS = 1_281_167, 90  # images of the training set, and epochs of the paper
STORED, SIDE = (256, 256, 3), 224  # of its images, and of the network's inputs
RULES = (
    "ms of a step, and the share of communication in it. All figures are **estimates**. A figure in parentheses is "
    "scaled from a program for other devices; the others are of a program compiled for just these. A layout stops "
    "scaling where the next number of devices no longer makes a step 10 % shorter."
)


class Network(NamedTuple):
    """How chips are connected, by their stated figures; bytes/s are those that one chip receives."""

    link: float  # along one axis of the mesh, in a node of GPUs or in a TPU slice
    dimensions: int = 1  # of the torus of a TPU slice; GPUs of a node form one ring
    most: int = 512  # chips of the largest slice; GPUs: as many as are asked for
    node: int = 0  # GPUs of a node; 0: a slice has no nodes
    between: float = math.inf  # from another node, through an adapter of each GPU

    def seconds(self, kind: str, received: int, parts: int, split: int, latency: float) -> float:
        """Return the time of a collective.

        Between nodes each GPU passes on only its part of what the node has reduced. An all-reduce goes around twice.

        Args:
          received: bytes that a device receives from a ring over all devices of the group.
          parts: the devices of the group.
          split: devices that the other mesh axis takes of each node.
          latency: seconds from a device to the next.
        """
        inside = min(parts, self.node // split) if self.node else parts
        nodes = -(-parts // inside)
        hops = self.dimensions * (inside ** (1 / self.dimensions) - 1) + nodes - 1
        outside = received / inside / self.between if nodes > 1 else 0.0
        link = self.link / 2 if self.dimensions > 1 and parts == 2 else self.link  # one of the links leads to the other
        return received / link + outside + hops * latency * (2 if kind == "all-reduce" else 1)


# By the vendors: NVLink 450 GB/s each way and one 400 Gbit/s adapter a GPU; of a TPU's links, two for each mesh axis.
NETWORKS = {
    "h100": Network(450e9, node=8, between=50e9),
    "v5e": Network(100e9, dimensions=2, most=256),
    "v6e": Network(200e9, dimensions=2, most=256),
    "v5p": Network(200e9, dimensions=3, most=6144),
}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the train steps in compiled.json of `experiments.compiled`; raises UserError if it has none."""
    try:
        records = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--records={path}: {error.strerror}; expected compiled.json of experiments.compiled") from None
    except ValueError as error:
        raise UserError(f"--records={path} is corrupt ({one_line(error)}); run experiments.compiled again") from None
    if not isinstance(records, list) or not all(is_record(r) for r in records):
        raise UserError(f"--records={path}: expected what experiments.compiled writes")
    steps = [r for r in records if (r["config"], r["mode"], r["dtype"]) == ("imagenet2012", "train", "bfloat16")]
    if not steps:
        raise UserError(f"--records={path}: no train step of imagenet2012 in bfloat16; run experiments.compiled")
    return steps


def project(
    records: Sequence[dict[str, Any]], batch: int, devices: Sequence[int] = DEVICES, latency: float = 1e-6
) -> list[dict[str, Any]]:
    """Return the estimated step of each chip, layout and number of devices.

    A program of as many devices and of this batch is taken as it is. Otherwise the program with the nearest number of
    devices is scaled: each layer moves as many times its floor (`experiments.compiled.floor`) as in that program, and
    the devices communicate as many times what the layout needs (`experiments.sharding.theory`). Without a program for
    at least a 64th and at most 64 times of the devices there is no estimate.

    Args:
      records: of `experiments.compiled`, the train step of the paper's network in bfloat16.
      batch: images in a step, over all devices.
      latency: seconds from a device to the next.

    Returns:
      Records of chip, layout, devices, program (the target that was compiled), compiled (whether for just these devices
      and this batch), compute_s, communicate_s, step_s, memory (bytes of a device, None if scaled) and epochs_s (the
      steps of 90 epochs of ImageNet).

    Raises:
      UserError: a batch that the devices do not divide, a latency that is negative, or an unknown chip or layout.
    """
    if batch < 1:
        raise UserError(f"--batch={batch}: expected at least 1")
    if bad := [n for n in devices if batch % n]:
        raise UserError(f"--batch={batch}: {bad[0]} devices do not divide it; expected a multiple of it")
    if not 0 <= latency < math.inf:
        raise UserError(f"--latency={latency:g}: expected seconds of at least 0")
    layouts = {layout.name: layout for layout in LAYOUTS}
    for field, known in {"layout": layouts, "target": NETWORKS}.items():
        if unknown := {r[field].partition(":")[0] for r in records} - set(known):
            raise UserError(f"--records: unknown {field} {min(unknown)!r}; expected some of {', '.join(known)}")
    rows = []
    for chip in NETWORKS:
        for layout in LAYOUTS:
            programs = [r for r in records if (r["target"].partition(":")[0], r["layout"]) == (chip, layout.name)]
            for count in devices:
                near = [r for r in programs if max(_devices(r), count) <= FARTHEST * min(_devices(r), count)]
                if near and _fits(layout, count) and count <= NETWORKS[chip].most:
                    rows.append(_row(chip, layout, near, count, batch, latency))
    return rows


def _fits(layout: Layout, devices: int) -> bool:
    if layout.data == -1:
        return devices > layout.tower and devices % layout.tower == 0
    return devices == layout.data * layout.tower


def _scaled(record: dict[str, Any], layout: Layout, batch: int, data: int, tower: int) -> float:
    """Return the seconds that the layers of a program would take on other devices, with another batch."""
    chip, seconds = CHIPS[record["target"].partition(":")[0]], 0.0
    floors = floor(MODEL, STORED, SIDE, batch, data, tower, train=True)
    images = batch / data / (record["batch"] / record["mesh"]["data"])
    parameters = _devices(record) / (data * tower) if layout.rules else 1.0
    for x in record["layers"]:
        part = floors.get((x["layer"], x["pass"] == "backward"), Floor(0, 0))
        factor = part.bytes / x["floor"] if x["floor"] else images
        factor *= parameters if x["layer"] == UPDATE else 1.0
        seconds += max((x["read"] + x["written"]) * factor / chip.bandwidth, part.flops / chip.flops)
    return seconds


def _devices(record: dict[str, Any]) -> int:
    return record["mesh"]["data"] * record["mesh"]["tower"]


def _row(chip: str, layout: Layout, programs: list, devices: int, batch: int, latency: float) -> dict[str, Any]:
    nearest = min(programs, key=lambda r: (abs(math.log(_devices(r) / devices)), abs(math.log(r["batch"] / batch))))
    compiled = (_devices(nearest), nearest["batch"]) == (devices, batch)
    compute = sum(x["estimated_ms"] for x in nearest["layers"]) / 1e3
    data, tower = devices // layout.tower, layout.tower
    needed, excess = [(c["kind"], c["axis"], c["received"]) for c in nearest["collectives"]], 1.0
    if not compiled:
        compute = _scaled(nearest, layout, batch, data, tower)
        theory = expected(layout, MODEL, (SIDE, SIDE, 3), batch, data, tower)
        received, minimum = (sum(c["received"] for c in nearest[key]) for key in ("collectives", "expected"))
        needed, excess = [(c.kind, c.axis, c.received) for c in theory], received / minimum if minimum else 1.0
    sizes, seconds = {"data": data, "tower": tower}, partial(NETWORKS[chip].seconds, latency=latency)
    communicate = 0.0
    for kind, axis, size in needed:
        parts = math.prod(sizes[name] for name in axis.split("+"))
        communicate += seconds(kind, size * excess, parts, devices // parts if axis == "data" else 1)
    step = compute + communicate
    return {
        "chip": chip, "layout": layout.name, "devices": devices, "program": nearest["target"], "compiled": compiled,
        "batch": batch, "compute_s": compute, "communicate_s": communicate, "step_s": step,
        "memory": nearest["memory"]["total"] if compiled else None, "epochs_s": EPOCHS * IMAGENET / batch * step,
    }  # fmt: skip


def stops_at(rows: Sequence[dict[str, Any]], chip: str, layout: str) -> str:
    """Return where a layout stops scaling: the last count whose step is at least 10 % shorter than the one before.

    One device, which does not communicate, is the first count.
    """
    points = [r for r in rows if (r["chip"], r["layout"]) == (chip, layout)]
    best = 1, points[0]["compute_s"] * points[0]["devices"]
    for row in points:
        if row["devices"] > 1 and row["step_s"] > 0.9 * best[1]:
            return f"{best[0]}"
        best = row["devices"], row["step_s"]
    return f"{best[0]}" if len(points) == 1 else f"beyond {best[0]}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the step of each chip and layout by the number of devices, as a Markdown table."""
    counts = sorted({r["devices"] for r in rows})
    header = ("chip", "layout", *(f"{n} device{'s' * (n > 1)}" for n in counts), "stops scaling at")
    lines = []
    for chip, layout in dict.fromkeys((r["chip"], r["layout"]) for r in rows):
        cells = {}
        for r in rows:
            if (r["chip"], r["layout"]) == (chip, layout):
                cell = f"{1e3 * r['step_s']:.2f}, {r['communicate_s'] / r['step_s']:.0%}"
                cells[r["devices"]] = cell if r["compiled"] else f"({cell})"
        lines.append((chip, title(layout), *(cells.get(n, "—") for n in counts), stops_at(rows, chip, layout)))
    return text_table(lines, header, markdown=True)


def details(rows: Sequence[dict[str, Any]]) -> str:
    """Return every estimate with the program that it is made from, as a Markdown table."""
    header = (
        "chip", "layout", "devices", "program", "compute (ms)", "communication (ms)", "memory (GB)",
        f"{EPOCHS} epochs (min)",
    )  # fmt: skip
    lines = [
        (
            r["chip"], title(r["layout"]), str(r["devices"]),
            f"compiled for {r['program']}" if r["compiled"] else f"scaled from {r['program']}",
            f"{1e3 * r['compute_s']:.2f}", f"{1e3 * r['communicate_s']:.2f}",
            f"{r['memory'] / 1e9:.2f}" if r["compiled"] else "—", f"{r['epochs_s'] / 60:.1f}",
        )
        for r in rows
    ]  # fmt: skip
    return text_table(lines, header, markdown=True)


@styled
def plot(rows: Sequence[dict[str, Any]], path: Path, caption: str = "") -> None:
    """Plot the step time against the devices, a panel for each chip; filled: compiled, dashed: communication alone."""
    chips = list(dict.fromkeys(r["chip"] for r in rows))
    figure = Figure(figsize=(1.5 + 2.4 * len(chips), 3), layout="constrained")
    all_axes = figure.subplots(1, len(chips), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(r["layout"] for r in rows))
    for axes, chip in zip(all_axes, chips, strict=True):
        for layout in names:
            points = [r for r in rows if (r["chip"], r["layout"]) == (chip, layout)]
            counts, style = [r["devices"] for r in points], {"color": CYCLE[names.index(layout)]}
            axes.loglog(counts, [1e3 * r["step_s"] for r in points], "o-", mfc="white", label=title(layout), **style)
            compiled = [(r["devices"], 1e3 * r["step_s"]) for r in points if r["compiled"]]
            axes.loglog(*zip(*compiled, strict=True) if compiled else ([], []), "o", **style)
            if any(r["communicate_s"] for r in points):
                axes.loglog(counts, [1e3 * r["communicate_s"] for r in points], "--", linewidth=0.8, **style)
        counts = sorted({r["devices"] for r in rows})
        axes.set_xticks(counts[::2], [str(n) for n in counts[::2]])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_title(chip)
        axes.set_xlabel("devices")
    all_axes[0].set_ylabel("estimated step (ms)")
    handles = {label: line for axes in all_axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    figure.suptitle(f"{caption}\nfilled: compiled for these devices; dashed: communication", fontsize=9)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.projection", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for projection.json, .md and .png")
    parser.add_argument("--records", type=Path, default=RECORDS, help="compiled.json (default: the project's own)")
    parser.add_argument("--batch", type=int, default=4096, help="images in a step, over all devices (default: 4096)")
    parser.add_argument("--latency", type=float, default=1e-6, help="seconds to the next device (default: 1e-6)")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # only shapes are computed
    with errors_on_one_line():
        rows = project(read_records(flags.records), flags.batch, latency=flags.latency)
        assumptions = f"{flags.batch:,} images in a step, {1e6 * flags.latency:g} µs to the next device"
        text = f"{assumptions}. {RULES}\n\n{table(rows)}\n\n{details(rows)}\n"
        make_workdir(flags.workdir)
        write_json(flags.workdir / "projection.json", rows)
        write_text(flags.workdir / "projection.md", text)
        plot(rows, flags.workdir / "projection.png", assumptions)
    print(f"{text}\nWritten to {flags.workdir}")


if __name__ == "__main__":
    main()
