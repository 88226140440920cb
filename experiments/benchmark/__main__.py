"""Measure the speed of the network, compared with the highest rates of the device and with PyTorch.

python -m experiments.benchmark --workdir DIR

Each part runs in a process of its own and is one entry of DIR/benchmark.json, which it replaces when it runs again.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from alexnet_jax import AlexNet, sharding
from alexnet_jax.errors import UserError, errors_on_one_line
from alexnet_jax.runtime.files import write_json
from alexnet_jax.runtime.huge_pages import use_huge_pages
from alexnet_jax.train import Interrupted
from experiments import measure
from experiments.benchmark import growth, layers, loop, operations, report, start, step
from experiments.benchmark.plot import plot
from experiments.benchmark.setting import Setting
from experiments.command import child_process, make_workdir, write_text

PARTS = {
    "step": step.run,  # training and inference, compared with PyTorch
    "layers": layers.run,  # each layer, compared with the device's roofline
    "operations": operations.run,  # what the project's own operations gain over XLA's
    "growth": growth.run,  # with image, batch and width
    "devices": growth.run_devices,
    "loop": loop.run,  # what the training loop adds to the train step alone, with the data on the device
    "stream": loop.run_streaming,  # the same with the streaming input pipeline
    "start": start.run,  # the first and the second start
}
TRAINING = ("loop", "stream")  # the parts that call `train_and_evaluate`


def _measure(part: str, setting: Setting, workdir: Path) -> None:
    """Measure a part in this process and write it to DIR/benchmark.json."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same GPU
    jax.config.update("jax_enable_compilation_cache", part in TRAINING)  # elsewhere the time to compile is a figure
    if part == "devices":
        sharding.make_mesh(cpu_devices=2 if setting.quick else 4)
    if part not in (*TRAINING, "start"):  # which start the devices themselves
        cpu = jax.default_backend() == "cpu"
        setting = setting._replace(
            batches=setting.batches or ((1, 8, 32, 64) if cpu else (128, 512, 2048)),
            dtypes=setting.dtypes or (("float32",) if cpu else ("float32", "bfloat16")),
        )
    record = PARTS[part](setting)
    about = {
        "device": measure.device(), "date": f"{datetime.date.today()}",
        "jax": jax.__version__, "malloc": os.environ.get("GLIBC_TUNABLES", ""), "quick": setting.quick,
    }  # fmt: skip
    write_json(workdir / "benchmark.json", _read(workdir) | {part: about | record})


def _read(workdir: Path) -> dict[str, Any]:
    """Read DIR/benchmark.json; raises UserError if it is not what this command writes."""
    path = workdir / "benchmark.json"
    try:
        records = json.loads(path.read_text()) if path.exists() else {}
        if all(part in PARTS and {"device", "date", "quick"} <= set(record) for part, record in records.items()):
            return records
    except (ValueError, AttributeError, TypeError):
        pass
    raise UserError(f"{path} is corrupt; delete it, or give another --workdir")


def _setting(flags: argparse.Namespace, config: list[str]) -> Setting:
    """Return the setting of the flags; raises UserError."""
    if not shutil.which(flags.torch_python):
        raise UserError(f"--torch-python={flags.torch_python}: no such program; expected a Python interpreter")
    if unknown := set(flags.parts.split(",")) - set(PARTS):
        raise UserError(f"--parts: unknown part {min(unknown)!r}; the parts are {', '.join(PARTS)}")
    if bad := [flag for flag in config if not flag.startswith("--config")]:
        raise UserError(f"unexpected argument {bad[0]!r}")
    loop.config_of(config)
    batches = flags.batches.split(",") if flags.batches else ["2", "4"] if flags.quick else []
    if not all(b.isdecimal() and int(b) for b in batches):
        raise UserError(f"--batches={flags.batches}: expected positive numbers with commas, as in 1,8,32")
    dtypes = flags.dtypes.split(",") if flags.dtypes else ["float32"] if flags.quick else []
    if bad := set(dtypes) - {"float32", "bfloat16"}:
        raise UserError(f"--dtypes: {min(bad)!r}; expected float32, bfloat16 or both with a comma")
    model, side = AlexNet(), 224
    if flags.quick:
        model, side = AlexNet(num_classes=10, widths=(8, 16, 16, 16, 16, 32, 32)), 64
    return Setting(
        model, (side, side, 3), tuple(sorted(set(map(int, batches)))), tuple(dtypes), 3 if flags.quick else 9,
        flags.torch_python, flags.quick, tuple(config),
    )  # fmt: skip


def _measure_in_processes(parts: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Measure each part in a process of its own; return those that failed. Exits at Ctrl-C, which ends the part too."""
    failed, stops = [], []
    for i, part in enumerate(parts):
        print(f"Part {i + 1} of {len(parts)}: {part}", flush=True)
        command = [sys.executable, "-m", "experiments.benchmark", *arguments, f"--parts={part}"]
        handler = signal.signal(signal.SIGINT, lambda number, frame: stops.append(number))
        with child_process(command) as process:
            process.wait()
        if process.returncode:
            failed.append(part)
        signal.signal(signal.SIGINT, handler)
        if stops:
            sys.exit(130)
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for benchmark.json, benchmark.md, benchmark.png")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"with commas (default: {','.join(PARTS)})")
    parser.add_argument("--batches", help="with commas (default: 1,8,32,64 on a CPU, 128,512,2048 elsewhere)")
    parser.add_argument("--dtypes", help="float32, bfloat16 or both (default: float32 on a CPU, both elsewhere)")
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, to see that it works")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has PyTorch (default: this one)")
    parser.epilog = "--config=NAME and --config.FIELD=VALUE, as for alexnet_jax.main, set the training loop's config."
    flags, config = parser.parse_known_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the part's process too
    failed = []
    try:
        with errors_on_one_line():
            setting, parts = _setting(flags, config), list(dict.fromkeys(flags.parts.split(",")))
            make_workdir(flags.workdir)
            write_json(flags.workdir / "benchmark.json", _read(flags.workdir))  # it can be written
            if len(parts) == 1:
                _measure(parts[0], setting, flags.workdir)
            else:
                failed = _measure_in_processes(parts, arguments)
            records = _read(flags.workdir)
            write_text(flags.workdir / "benchmark.md", report.markdown(records))
            plot(records, flags.workdir / "benchmark.png")
    except (KeyboardInterrupt, Interrupted) as stop:
        print("Interrupted; the parts that were measured are kept", file=sys.stderr, flush=True)
        os._exit(128 + getattr(stop, "signal", signal.SIGINT))  # XLA would crash at exit while it computes
    if failed:
        sys.exit(f"Error: --parts={','.join(failed)} failed; the other parts are in {flags.workdir}")
    if len(parts) == 1:  # otherwise each part has printed its own
        print(f"{report.section(parts[0], records[parts[0]])}\n")
    else:
        print(f"Written to {flags.workdir}")


if __name__ == "__main__":
    use_huge_pages()  # for PyTorch too, which is started from here
    main()
