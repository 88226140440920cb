"""The time that the training loop of `alexnet_jax.main` adds to the train step alone."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags as absl_flags
from ml_collections import config_flags
from PIL import Image

from alexnet_jax.errors import UserError
from alexnet_jax.flags import FLAG_ERRORS, config_file, flag_error, with_config_file
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.setup import setup
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.train_step import create_state, make_train_step
from experiments import measure
from experiments.benchmark.setting import ROOT, Setting

# A part of the default config's data: each round reads it again.
DATA = ("train_split=train[:12800]", "validation_split=train[55000:56000]", "test_split=test[:1000]")


def config_of(flags: Sequence[str]) -> ml_collections.ConfigDict:
    """Return the config of the flags --config=NAME and --config.FIELD=VALUE; without NAME the default on `DATA`.

    Raises:
      UserError: flags that `alexnet_jax.main` does not accept.
    """
    values, argv = absl_flags.FlagValues(), ["benchmark", *with_config_file(flags)]
    if not any(flag.startswith("--config=") for flag in flags):
        argv[1:1] = [f"--config.{field}" for field in DATA]
    try:
        config_flags.DEFINE_config_file("config", config_file("fashion_mnist"), flag_values=values, sys_argv=argv)
        values(argv)
        values.config.to_dict()  # raises here if the file cannot be read
    except FLAG_ERRORS as error:
        raise UserError(flag_error(error, [*flags])) from None
    return values.config


def run(setting: Setting) -> dict[str, Any]:
    """Measure the training loop with the default config, or with the one that is given."""
    window, rounds = (10, 1) if setting.quick else (50, 6)
    return _measure(config_of(setting.config), window, rounds)


def run_streaming(setting: Setting) -> dict[str, Any]:
    """Measure the training loop with ImageNet's config, from prepared records of images with random colors."""
    cpu = jax.default_backend() == "cpu"
    batch = 8 if setting.quick else 64 if cpu else 512
    window, rounds = (2, 1) if setting.quick else (5, 3) if cpu else (50, 3)
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder), batch)
        fields = {
            "dataset": "random_256", "data_dir": f"{folder}/data", "batch_size": batch, "ten_crop": False,
            "eval_every": 6 * window,  # once, at the end: with so few images it would be every few steps
        }  # fmt: skip
        if setting.quick:
            fields["widths"] = "8,16,16,16,16,32,32"
        flags = ["--config=imagenet2012", *(f"--config.{k}={v}" for k, v in fields.items())]
        return _measure(config_of(flags), window, rounds)


def _prepare(folder: Path, batch: int) -> None:
    """Draw the images of 8 batches and prepare them as the data set `random_256` in FOLDER/data."""
    random = np.random.default_rng(0)
    for name, count in (("train/a", 4 * batch), ("train/b", 4 * batch), ("validation/a", 1)):
        path = folder / "images" / name
        path.mkdir(parents=True)
        for i in range(count):
            colors = Image.fromarray(random.integers(0, 256, (32, 40, 3), np.uint8))
            colors.resize((320, 256)).save(path / f"{i}.jpeg")
    command = [sys.executable, "-m", "alexnet_jax.prepare", "--dataset=random", f"--data_dir={folder}/images"]
    done = subprocess.run([*command, f"--out={folder}/data"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        raise UserError(f"alexnet_jax.prepare failed: {lines[-1]}")


def _measure(config: ml_collections.ConfigDict, window: int, rounds: int) -> dict[str, Any]:
    """Measure images/s of `train_and_evaluate`, from its metrics.jsonl, and of the train step alone, in alternation.

    The train step alone takes the same state, donated, and one batch that stays on the device. The loop's first window,
    which compiles, is not counted; validation and checkpoints stop the loop's clock.
    """
    config.num_train_steps, config.log_every = 6 * window, window
    step_alone, looped = [], []
    with tempfile.TemporaryDirectory() as folder:
        use_compilation_cache(f"{folder}/programs")
        task = setup(config)
        train_step = make_train_step(task.model, task.optimizer, task.preprocess, task.learning_rate, task.mesh)
        state = create_state(task.model, task.optimizer, task.preprocess.image_shape, config.seed, task.mesh)
        key, batch = jax.random.key(0), task.train_data.batch(jax.random.key(0), 0)
        task.train_data.close()

        def step():
            nonlocal state
            state, metrics = train_step(state, batch, key)
            return state, metrics

        measure.seconds(step, window)
        for i in range(rounds):
            step_alone += [config.batch_size / measure.seconds(step, window) for _ in range(5)]
            workdir = Path(folder) / str(i)
            train_and_evaluate(config, workdir)
            lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
            looped += [line["images_per_s"] for line in lines if "images_per_s" in line][1:]
    medians = statistics.median(step_alone), statistics.median(looped)
    return {
        "dataset": config.dataset, "batch": config.batch_size, "mesh": dict(task.mesh.shape), "window": window,
        "step_alone_images_per_s": medians[0], "loop_images_per_s": medians[1],
        "overhead": medians[0] / medians[1] - 1, "step_alone": step_alone, "loop": looped,
    }  # fmt: skip
