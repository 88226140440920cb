"""Run the checks and measurements that need a GPU, the most important first: python -m experiments.on_gpu --workdir DIR

Each step is a process with a budget of seconds, after which it is stopped. It writes its results to DIR while it runs;
DIR/on_gpu.json has the command, the seconds and the outcome of each step. `--data_dir` holds TFDS's Fashion-MNIST and
CIFAR-10.
"""

import argparse
import atexit
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from alexnet_jax.runtime.files import write_json

ROOT = Path(__file__).parents[2]
GRACE_S = 8  # between SIGTERM, at which a training saves a checkpoint, and SIGKILL


class Step(NamedTuple):
    """A command, its budget in seconds, and its arguments for --quick."""

    name: str
    budget: int
    command: tuple[str, ...]
    quick: tuple[str, ...] = ()


def training(config: str, *flags: str) -> tuple[str, ...]:
    return ("alexnet_jax.main", f"--config={config}", "--config.data_dir={data_dir}", *flags)


TINY = (
    "--config.train_split=train[:500]", "--config.validation_split=train[500:600]", "--config.test_split=test[:100]",
    "--config.num_train_steps=4", "--config.log_every=2", "--config.widths=8,16,16,16,16,32,32",
    "--config.batch_size=20",
)  # fmt: skip
CLAIMS = ("experiments.on_gpu.claims", "--budget={budget}", "--data_dir={data_dir}")
QUICK_CLAIMS = ("--quick", "--seeds=2", "--only=overfitting")
# Groups run one after the other. The steps of a group run at the same time, so their times are not measurements.
GROUPS = (
    (
        Step("correctness", 80, ("experiments.on_gpu.correctness", "--budget={budget}"), ("--quick",)),
        Step("figure_1", 80, (*CLAIMS, "--only=relu", "--seeds=3"), QUICK_CLAIMS),
    ),
    (Step("speed", 180, ("experiments.on_gpu.speed", "--budget={budget}"), ("--quick", "--batches=2,4,8")),),
    (Step("fashion_mnist_224", 100, training("fashion_mnist_224"), TINY),),
    (
        Step("fashion_mnist", 70, training("fashion_mnist"), TINY),
        Step("cifar10", 70, training("cifar10"), TINY),
    ),
    (
        Step(
            "loop",
            60,
            ("experiments.benchmark", "--parts=loop", "--config.data_dir={data_dir}"),
            ("--quick", *TINY[:3], "--config.batch_size=20", "--config.widths=8,16,16,16,16,32,32"),
        ),
    ),
    (Step("claims", 90, (*CLAIMS, "--only=lrn,overfitting,filters"), QUICK_CLAIMS),),
)


def start(step: Step, budget: float, workdir: Path, data_dir: str, quick: bool) -> tuple[subprocess.Popen, list[str]]:
    """Start a step, with its output in DIR/STEP/log.txt; return its process and command."""
    folder = workdir / step.name
    folder.mkdir(parents=True, exist_ok=True)
    values = {"budget": str(round(budget - 4)), "data_dir": data_dir}
    arguments = [argument.format(**values) for argument in (*step.command, *(step.quick if quick else ()))]
    command = [sys.executable, "-m", *arguments, f"--workdir={folder}"]
    print(f"\n{step.name}, {budget:.0f} s: {' '.join(command[2:])}", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return process, command[2:]


def stop(processes: list[subprocess.Popen]) -> None:
    """Kill the steps that are still running, with their own processes."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen, seconds: float) -> str:
    """Wait for a step, stop it at the end of its budget, and return the outcome."""
    outcome = "ended"
    for number, then in ((signal.SIGTERM, "stopped at the end of its budget"), (signal.SIGKILL, "killed after it")):
        try:
            process.wait(max(0.1, seconds) if number == signal.SIGTERM else GRACE_S)
        except subprocess.TimeoutExpired:
            outcome = then
            os.killpg(process.pid, number)
    process.wait()
    return outcome


def main() -> None:
    steps = [step for group in GROUPS for step in group]
    names = [step.name for step in steps]
    parser = argparse.ArgumentParser(prog="python -m experiments.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for on_gpu.json and a folder for each step")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all steps together (default: 540)")
    parser.add_argument("--only", default=",".join(names), help=f"steps with commas (default: {','.join(names)})")
    parser.add_argument(
        "--data_dir", default="", help="the folder of the TFDS data sets (default: ~/tensorflow_datasets)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    flags = parser.parse_args()
    only = flags.only.split(",")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if unknown := set(only) - set(names):
        sys.exit(f"Error: --only: unknown step {min(unknown)!r}; expected some of {', '.join(names)}")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # each step allocates its own memory
    if not flags.quick and jax.default_backend() != "gpu":
        sys.exit("Error: JAX finds no GPU; --quick runs the steps on a CPU, to see that they work")
    end = time.monotonic() + flags.budget
    record: dict = {"date": f"{datetime.date.today()}", "budget_s": flags.budget, "quick": flags.quick, "steps": {}}
    groups = [chosen for group in GROUPS if (chosen := [step for step in group if step.name in only])]
    for group in groups:
        left, begin = end - time.monotonic() - GRACE_S, time.monotonic()
        budget = left if group is groups[-1] else min(group[0].budget, left)  # the last group has the remaining time
        if budget < 15:
            record["steps"] |= {step.name: {"outcome": f"skipped: {left:.0f} s were left"} for step in group}
            continue
        running = [(step, *start(step, budget, flags.workdir, flags.data_dir, flags.quick)) for step in group]
        atexit.register(stop, [process for _, process, _ in running])
        for step, process, command in running:
            outcome = finish(process, begin + budget - time.monotonic())
            record["steps"][step.name] = {
                "command": command, "budget_s": round(budget), "seconds": round(time.monotonic() - begin, 1),
                "exit_code": process.returncode, "outcome": outcome,
            }  # fmt: skip
            text = (flags.workdir / step.name / "log.txt").read_text(errors="replace")
            lines = [line for line in text.splitlines() if line.strip() and "cuda_timer" not in line]
            print("\n".join(line[:300] for line in lines[-14:]), flush=True)
        write_json(flags.workdir / "on_gpu.json", record)
    print("\n" + json.dumps({name: step["outcome"] for name, step in record["steps"].items()}), flush=True)
    failed = [name for name, step in record["steps"].items() if step.get("exit_code", 1) not in (0, -15, 143)]
    if failed:
        sys.exit(f"Error: failed or skipped: {', '.join(failed)}; see {flags.workdir / 'on_gpu.json'}")


if __name__ == "__main__":
    main()
