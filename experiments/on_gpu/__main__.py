"""What has to be seen on a real GPU, in the order of its worth: python -m experiments.on_gpu --workdir DIR

Each step is a process with a budget of its own, is stopped at its end, and leaves its results in DIR as they come;
DIR/on_gpu.json says what each step did. Set up the data first: TFDS's Fashion-MNIST and CIFAR-10 in `--data_dir`.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from alexnet_jax.runtime.files import write_json

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "alexnet_jax" / "configs"
GRACE_S = 8  # between SIGTERM, at which a training saves a checkpoint, and SIGKILL


class Step(NamedTuple):
    """A command, its budget in seconds, and its arguments for --quick."""

    name: str
    budget: int
    command: tuple[str, ...]
    quick: tuple[str, ...] = ()


def training(config: str, *flags: str) -> tuple[str, ...]:
    return ("alexnet_jax.main", f"--config={CONFIGS / config}.py", "--config.data_dir={data_dir}", *flags)


TINY = (
    "--config.train_split=train[:500]", "--config.validation_split=train[500:600]", "--config.test_split=test[:100]",
    "--config.num_train_steps=4", "--config.log_every=2", "--config.widths=8,16,16,16,16,32,32",
    "--config.batch_size=20",
)  # fmt: skip
STEPS = (
    Step("correctness", 90, ("experiments.on_gpu.correctness", "--budget={budget}"), ("--quick",)),
    Step("speed", 180, ("experiments.on_gpu.speed", "--budget={budget}"), ("--quick", "--batches=2,4,8")),
    Step("fashion_mnist_224", 110, training("fashion_mnist_224"), TINY),
    Step("fashion_mnist", 35, training("fashion_mnist"), TINY),
    Step("cifar10", 35, training("cifar10"), TINY),
    Step("claims", 90, ("experiments.on_gpu.claims", "--budget={budget}", "--data_dir={data_dir}"),
         ("--quick", "--seeds=2", "--only=overfitting")),
)  # fmt: skip


def run(step: Step, budget: float, workdir: Path, data_dir: str, quick: bool) -> dict:
    """Run one step; its exit code, seconds and what became of it."""
    folder = workdir / step.name
    folder.mkdir(parents=True, exist_ok=True)
    values = {"budget": str(round(budget - 5)), "data_dir": data_dir}
    arguments = [argument.format(**values) for argument in (*step.command, *(step.quick if quick else ()))]
    command = [sys.executable, "-m", *arguments, f"--workdir={folder}"]
    print(f"\n{step.name}, {budget:.0f} s: {' '.join(command[2:])}", flush=True)
    start, outcome, environment = time.monotonic(), "ended", os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        for stop, then in ((signal.SIGTERM, "stopped at the end of its budget"), (signal.SIGKILL, "killed after it")):
            try:
                process.wait(budget if stop == signal.SIGTERM else GRACE_S)
            except subprocess.TimeoutExpired:
                outcome = then
                os.killpg(process.pid, stop)
        process.wait()
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(line[:300] for line in lines[-15:]), flush=True)
    return {
        "command": command[2:], "budget_s": budget, "seconds": round(time.monotonic() - start, 1),
        "exit_code": process.returncode, "outcome": outcome,
    }  # fmt: skip


def main() -> None:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="python -m experiments.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for on_gpu.json and a folder for each step")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all steps together (default: 540)")
    parser.add_argument("--only", default=",".join(names), help=f"steps with commas (default: {','.join(names)})")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps both data sets (default: ~/tensorflow_datasets)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    flags = parser.parse_args()
    if unknown := set(flags.only.split(",")) - set(names):
        sys.exit(f"Error: --only: unknown step {min(unknown)!r}; expected some of {', '.join(names)}")
    end = time.monotonic() + flags.budget
    record = {"date": f"{datetime.date.today()}", "budget_s": flags.budget, "quick": flags.quick, "steps": {}}
    for step in STEPS:
        if step.name not in flags.only.split(","):
            continue
        left = end - time.monotonic()
        last = step.name == flags.only.split(",")[-1]
        budget = left - GRACE_S if last else min(step.budget, left - GRACE_S)  # the last takes what is left
        if budget < 15:
            record["steps"][step.name] = {"outcome": f"skipped: {left:.0f} s were left"}
        else:
            record["steps"][step.name] = run(step, budget, flags.workdir, flags.data_dir, flags.quick)
        write_json(flags.workdir / "on_gpu.json", record)
    print("\n" + json.dumps({k: v.get("seconds", 0) or v["outcome"] for k, v in record["steps"].items()}), flush=True)
    failed = [name for name, step in record["steps"].items() if step.get("exit_code", 1) not in (0, -15, 143)]
    if failed:
        sys.exit(f"Error: failed or skipped: {', '.join(failed)}; {flags.workdir / 'on_gpu.json'} says why")


if __name__ == "__main__":
    main()
