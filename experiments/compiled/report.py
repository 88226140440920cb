"""The records of the compiled programs as Markdown tables and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alexnet_jax.tables import table
from experiments.command import save_figure
from experiments.sharding import layer_table
from experiments.style import BLUE, ORANGE, styled

RULE = (
    "GB and MB are those of one device, of its main memory: what a TPU keeps in its vector memory does not count, so a "
    "ratio may be below 1. The floor is the minimum of bytes by the shapes (`experiments/compiled/floor.py` has the "
    "rule). ms are an **estimate**, not a measurement: the sum over the parts of the longer of the bytes at the chip's "
    "stated bandwidth and the FLOP at its stated rate."
)

FIELDS = {
    "name": str, "target": str, "config": str, "mode": str, "batch": int, "dtype": str, "layout": str, "mesh": dict,
    "operations": int, "bytes": int, "floor": int, "while": int, "image gathers": int, "float32 activations": int,
    "memory": dict, "estimated_ms": float, "compile_s": float, "compile_peak_bytes": int, "layers": list,
    "collectives": list, "expected": list, "asynchronous": list,
}  # fmt: skip


def is_record(value: Any) -> bool:
    """Return whether a value is a record of a compiled case, as this version writes it."""
    if not isinstance(value, dict) or not all(isinstance(value.get(name), kind) for name, kind in FIELDS.items()):
        return False
    layer_fields = {"layer", "pass", "operations", "read", "written", "floor", "flops", "estimated_ms"}
    return (
        set(value["mesh"]) == {"data", "tower"}
        and "total" in value["memory"]
        and all(isinstance(x, dict) and set(x) >= layer_fields for x in value["layers"])
        and all(
            isinstance(x, dict) and set(x) >= {"kind", "layer", "axis", "backward", "received"}
            for x in value["collectives"] + value["expected"]
        )
    )


def title(record: dict[str, Any]) -> str:
    """Return what a record is of."""
    layout = record["layout"].replace("_", " ")
    return (
        f"{record['target']}, {layout}, {record['config']}, {record['mode']}, batch {record['batch']:,}, "
        f"{record['dtype']}"
    )


def cases_table(records: Sequence[dict[str, Any]]) -> str:
    """Return a table of the cases, a row each."""
    header = (
        "target", "layout", "mode", "batch", "dtype", "GB moved", "floor (GB)", "ratio", "operations", "while",
        "image gathers", "float32 activations", "memory (GB)", "largest batch", "collectives", "estimate (ms)",
        "compiled in (s)",
    )  # fmt: skip
    return table([_case_row(r) for r in records], header, markdown=True)


def _case_row(r: dict[str, Any]) -> tuple[str, ...]:
    collectives = "—"
    if r["expected"]:
        different = differing(r)
        collectives = "those of the theory" if not different else f"{len(different)} differ from the theory"
    return (
        r["target"], r["layout"].replace("_", " "), r["mode"], f"{r['batch']:,}", r["dtype"],
        f"{r['bytes'] / 1e9:.2f}", f"{r['floor'] / 1e9:.2f}", f"{r['bytes'] / r['floor']:.2f}", str(r["operations"]),
        str(r["while"]), str(r["image gathers"]), str(r["float32 activations"]), f"{r['memory']['total'] / 1e9:.2f}",
        f"{r['largest_batch']:,}" if "largest_batch" in r else "—", collectives, f"{r['estimated_ms']:.2f}",
        f"{r['compile_s']:.0f}",
    )  # fmt: skip


def differing(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the collectives (kind, layer, axis, pass) that the theory has not or the program has not.

    Other bytes than in theory count too. Only the gradients' all-reduce may have fewer: those of biases in bfloat16.
    """

    def received(collectives):
        return {
            (c["kind"], c["layer"], c["axis"], "backward" if c["backward"] else "forward"): c["received"]
            for c in collectives
        }

    actual, minimum = received(record["collectives"]), received(record["expected"])
    fewer_allowed = {key for key in minimum if (key[0], key[3]) == ("all-reduce", "backward")}
    return [
        key for key in actual | minimum
        if actual.get(key) != minimum.get(key)
        and not (key in fewer_allowed and 0.95 * minimum[key] < actual.get(key, 0) < minimum[key])
    ]  # fmt: skip


def slices_table(records: Sequence[dict[str, Any]]) -> str:
    """Return a table of the train steps on several devices: their communication, memory and compilation."""
    header = (
        "target", "layout", "data × tower", "batch", "received (MB)", "minimum (MB)", "not of the theory",
        "memory (GB)", "compiled in (s)", "compiler's memory (GB)",
    )  # fmt: skip
    rows = []
    for r in records:
        if not r["expected"]:
            continue
        received, minimum = (sum(c["received"] for c in r[key]) / 1e6 for key in ("collectives", "expected"))
        rows.append((
            r["target"], r["layout"].replace("_", " "), f"{r['mesh']['data']} × {r['mesh']['tower']}",
            f"{r['batch']:,}", f"{received:,.1f}", f"{minimum:,.1f}", str(len(differing(r))),
            f"{r['memory']['total'] / 1e9:.2f}", f"{r['compile_s']:.0f}", f"{r['compile_peak_bytes'] / 1e9:.1f}",
        ))  # fmt: skip
    return table(rows, header, markdown=True) if rows else ""


def layers_table(record: dict[str, Any]) -> str:
    """Return a table of the layers of a case, forward and backward."""
    header = (
        "part", "pass", "operations", "read (MB)", "written (MB)", "floor (MB)", "ratio", "GFLOP", "estimate (ms)",
    )  # fmt: skip
    rows = []
    for x in record["layers"]:
        total = x["read"] + x["written"]
        rows.append((
            x["layer"], x["pass"], str(x["operations"]), f"{x['read'] / 1e6:,.0f}", f"{x['written'] / 1e6:,.0f}",
            f"{x['floor'] / 1e6:,.0f}", f"{total / x['floor']:.2f}" if x["floor"] else "—",
            f"{x['flops'] / 1e9:,.0f}" if x["flops"] else "—", f"{x['estimated_ms']:.2f}",
        ))  # fmt: skip
    return table(rows, header, markdown=True)


def overlap(record: dict[str, Any]) -> str:
    """Return which collectives are asynchronous, and what lies between their start and their end."""
    if not record["collectives"]:
        return ""
    if not record["asynchronous"]:
        return "No collective is asynchronous."
    parts = [f"{x['kind']} of {x['layer']} ({x['operations']})" for x in record["asynchronous"]]
    return f"Asynchronous, with the operations between start and end: {', '.join(parts)}."


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Return the table of the cases, and for each case those of its layers and of its collectives."""
    parts = [RULE, cases_table(records), slices_table(records)]
    for record in records:
        parts += [f"### {title(record)}", layers_table(record)]
        if record["collectives"] or record["expected"]:
            parts += [layer_table(record), overlap(record)]
    return "\n\n".join(filter(None, parts)) + "\n"


@styled
def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the bytes of each part of each case, forward and backward, as bars, with the floor as a mark on each."""
    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.2 * rows), layout="constrained")
    for axes, record in zip(figure.subplots(rows, columns, squeeze=False).flat, records, strict=False):
        names = list(dict.fromkeys(x["layer"] for x in record["layers"]))
        for x in record["layers"]:
            backward = x["pass"] == "backward"
            at = names.index(x["layer"]) + (0.2 if backward else -0.2)
            axes.barh(at, (x["read"] + x["written"]) / 1e9, 0.38, color=ORANGE if backward else BLUE)
            axes.plot([x["floor"] / 1e9] * 2, [at - 0.19, at + 0.19], color="black", linewidth=2)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("GB; blue forward, orange backward, black the floor")
        ratio = record["bytes"] / record["floor"]
        axes.set_title(f"{title(record)}\n{record['bytes'] / 1e9:.2f} GB, {ratio:.2f} × the floor")
    for axes in figure.axes[len(records) :]:
        axes.set_visible(False)
    save_figure(figure, path)
