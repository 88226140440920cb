"""The time from the command to the first step: with an empty compilation cache, and with that of the first start."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alexnet_jax.errors import UserError
from experiments.benchmark.setting import ROOT, Setting
from experiments.command import child_process

DATA = ("train_split=train[:1000]", "validation_split=train[55000:55500]", "test_split=test[:500]")


def run(setting: Setting) -> dict[str, Any]:
    """Measure the seconds from the command to the end of its first step, at the first and the second start."""
    records = {}
    for config in ("fashion_mnist",) if setting.quick else ("fashion_mnist", "fashion_mnist_224"):
        with tempfile.TemporaryDirectory() as folder:
            times = [_time_to_first_step(config, Path(folder), name) for name in ("first", "second")]
            programs = list((Path(folder) / "programs").iterdir())
            records[config] = {
                "first_s": times[0], "second_s": times[1], "programs": len(programs),
                "cache_bytes": sum(p.stat().st_size for p in programs),
            }  # fmt: skip
    return {"configs": records}


def _time_to_first_step(config: str, folder: Path, name: str) -> float:
    command = [
        sys.executable, "-m", "alexnet_jax.main", f"--workdir={folder / name}",
        f"--config={config}", f"--compile_cache={folder / 'programs'}",
        *(f"--config.{field}" for field in DATA), "--config.num_train_steps=3", "--config.log_every=1",
        "--config.batch_size=32", "--config.ten_crop=False",
    ]  # fmt: skip
    begin, seconds = time.perf_counter(), None
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with child_process(command, **options) as process:
        output = []
        for line in process.stdout:
            output.append(line)
            if seconds is None and line.startswith("step 1/"):
                seconds = time.perf_counter() - begin
    if process.returncode or seconds is None:
        raise UserError(f"alexnet_jax.main failed: {(output or ['no message'])[-1].strip()}")
    return seconds
