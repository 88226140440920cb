"""Measure the sharding layouts of the paper's network: python -m experiments.sharding --workdir DIR

The whole train step is compiled for each layout and timed; its collectives are read from the compiled program.
"""

import argparse
from pathlib import Path

import jax

from alexnet_jax.errors import errors_on_one_line
from alexnet_jax.runtime.files import write_json
from experiments.command import make_workdir, write_text
from experiments.sharding.harness import study
from experiments.sharding.layouts import LAYOUTS
from experiments.sharding.report import markdown, plot


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.sharding", description=__doc__.splitlines()[0])
    names = ", ".join(layout.name for layout in LAYOUTS)
    parser.add_argument("--workdir", type=Path, required=True, help="for sharding.json, sharding.md, sharding.png")
    parser.add_argument("--devices", type=int, default=8, help="devices to use; virtual ones on a CPU (default: 8)")
    parser.add_argument("--layouts", help=f"with commas: {names} (default: all that fit the devices)")
    parser.add_argument("--batch", type=int, default=32, help="images in a step, over all devices (default: 32)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; their median is recorded (default: 3)")
    flags = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is one of the figures
    with errors_on_one_line():
        make_workdir(flags.workdir)
        layouts = None if flags.layouts is None else flags.layouts.split(",")
        records = study(layouts, flags.devices, flags.batch, flags.steps)
        text = markdown(records)
        write_json(flags.workdir / "sharding.json", records)
        write_text(flags.workdir / "sharding.md", text)
        plot(records, flags.workdir / "sharding.png")
    print(f"{text}\nWritten to {flags.workdir}")


if __name__ == "__main__":
    main()
