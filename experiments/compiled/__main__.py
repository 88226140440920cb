"""The programs that XLA compiles for accelerators that are not here: python -m experiments.compiled --workdir DIR

Compiles the train step or the inference of a config for described GPUs or TPU slices, counts what the operations of
each layer read and write, and compares it with the minimum. Every time is an estimate from the chip's stated figures.
DIR/compiled.json keeps the cases of earlier calls; one that is compiled again is replaced.
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax

from alexnet_jax.errors import UserError, errors_on_one_line, one_line
from alexnet_jax.runtime.files import write_json
from alexnet_jax.runtime.signals import exit_at_signals
from experiments.command import make_workdir, write_text
from experiments.compiled.cases import MODES, Case, build, largest_batch, load_config, measure
from experiments.compiled.report import cases_table, is_record, markdown, plot
from experiments.compiled.targets import find
from experiments.sharding import LAYOUTS

DTYPES = ("bfloat16", "float32")


def cases(flags: argparse.Namespace) -> list[Case]:
    """Return the cases of the command line; of several, those that do not fit their devices are left out.

    Raises:
      UserError: a flag with a value that it does not take, or no case that fits.
    """
    choices = {"mode": MODES, "dtype": DTYPES, "layout": tuple(layout.name for layout in LAYOUTS)}
    for name, known in choices.items():
        if unknown := [value for value in getattr(flags, name).split(",") if value not in known]:
            raise UserError(f"--{name}={unknown[0]}: expected one or more of {', '.join(known)}, with commas")
    if not all(re.fullmatch("[1-9][0-9]*", batch) for batch in flags.batch.split(",")):
        raise UserError(f"--batch={flags.batch}: expected positive numbers with commas, as in 128,512")
    load_config(flags.config)
    values = [getattr(flags, name).split(",") for name in ("target", "layout", "mode", "batch", "dtype")]
    targets, fitting, reason = {name: find(name) for name in values[0]}, [], None
    for target, layout, mode, batch, dtype in itertools.product(*values):
        case = Case(targets[target], flags.config, mode, int(batch), dtype, layout)
        try:
            build(case)
        except UserError as error:
            reason = error
            print(f"Skipped: {error}", file=sys.stderr)
        else:
            fitting.append(case)
    if not fitting:
        raise reason
    return fitting


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of an earlier call by the names of their cases; raises UserError if they cannot be read."""
    try:
        records = json.loads(path.read_text()) if path.exists() else []
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); delete it and compile its cases again") from None
    if not isinstance(records, list) or not all(is_record(record) for record in records):
        raise UserError(f"{path}: expected the records of this version; delete it and compile its cases again")
    return {record["name"]: record for record in records}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.compiled", description=__doc__.splitlines()[0])
    layouts = ", ".join(layout.name for layout in LAYOUTS)
    parser.add_argument(
        "--workdir", type=Path, required=True, help="for compiled.json, compiled.md, compiled.png and the programs"
    )
    parser.add_argument("--target", default="h100", help="h100, h100:2, v5e:2x2, …, with commas (default: h100)")
    parser.add_argument("--batch", default="512", help="images over all devices, with commas (default: 512)")
    parser.add_argument("--dtype", default="bfloat16", help=f"of {', '.join(DTYPES)}, with commas (default: bfloat16)")
    parser.add_argument("--mode", default="train", help=f"of {', '.join(MODES)}, with commas (default: train)")
    parser.add_argument("--layout", default="one_device", help=f"of {layouts}, with commas (default: one_device)")
    parser.add_argument("--config", default="imagenet2012", help="name or file of a config (default: imagenet2012)")
    parser.add_argument("--largest-batch", action="store_true", help="find it by bisection: about five compilations")
    flags = parser.parse_args()
    exit_at_signals()
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is one of the figures
    with errors_on_one_line():
        make_workdir(flags.workdir)
        records = read_records(flags.workdir / "compiled.json")
        for case in cases(flags):
            record = records[case.name] = measure(case, flags.workdir)
            write_json(flags.workdir / "compiled.json", list(records.values()))
            print(f"{case.name}: {record['bytes'] / 1e9:.2f} GB, {record['operations']} operations", file=sys.stderr)
            if flags.largest_batch:
                record["largest_batch"] = largest_batch(case)
                write_json(flags.workdir / "compiled.json", list(records.values()))
        write_text(flags.workdir / "compiled.md", markdown(list(records.values())))
        plot(list(records.values()), flags.workdir / "compiled.png")
    print(f"{cases_table(list(records.values()))}\n\nWritten to {flags.workdir}")


if __name__ == "__main__":
    main()
