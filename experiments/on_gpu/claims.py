"""The experiments that need a GPU; all seeds of an experiment are one program.

python -m experiments.on_gpu.claims --workdir DIR --budget SECONDS
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import ml_collections
import numpy as np

from alexnet_jax import data
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.errors import errors_on_one_line
from alexnet_jax.optimizer import learning_rate_at, paper_sgd
from alexnet_jax.preprocess import measure as statistics_of
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.runtime.files import write_json
from alexnet_jax.setup import build_model, build_preprocess
from experiments import filters, lrn_four_layers, measure, overfitting, relu_vs_tanh
from experiments.seeds import Runs, Task
from experiments.study import CLASSES, Budget, Study, kernel_std

FASTEST = {
    ("paper", "relu"): 0.001, ("paper", "tanh"): 0.01, ("unit", "relu"): 0.003, ("unit", "tanh"): 0.01,
}  # fmt: skip


class OutOfTime(Exception):
    """The budget is spent; the results so far are written."""


class Clock:
    """A budget of seconds."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Results:
    """The records of DIR/claims.json: by experiment, then by network; written after each network."""

    def __init__(self, workdir: Path, clock: Clock):
        self.path, self.clock = workdir / "claims.json", clock
        self.records = {"device": measure.device(), "jax": jax.__version__, "experiments": {}}

    def train(
        self, experiment: str, name: str, task: Task, epochs: int, seeds: Sequence[int], test: data.Examples,
        rates: Sequence[float] | None = None, test_every: int = 0, ten_crop: bool = False, parts: int = 4,
    ) -> Runs:  # fmt: skip
        """Train every seed to the end or to the end of the budget, and record its curve and its errors.

        Args:
          rates: factors of the task's learning rate; there is a run for each pair of a rate and a seed.
          test_every: epochs between two evaluations on the test set; 0: only at the end.
          ten_crop: whether the last evaluation is also on ten crops.
          parts: points of the training-error curve per epoch.
        """
        pairs = [(rate, seed) for rate in rates or [1.0] for seed in seeds]
        runs = Runs(task, [seed for _, seed in pairs], [rate for rate, _ in pairs])
        per_epoch, started, compile_s = task.steps_per_epoch, time.monotonic(), None
        sizes = [len(part) for part in np.array_split(np.arange(per_epoch), parts)]
        record = {
            "runs": [{"seed": seed, "rate": rate, "curve": [], "test_curve": []} for rate, seed in pairs],
            "epochs": epochs, "trained_epochs": 0, "batch_size": task.batch_size, "images": len(task.train.labels),
        }  # fmt: skip
        self.records["experiments"].setdefault(experiment, {})[name] = record
        for epoch in range(epochs):
            errors = runs.advance(per_epoch)["error"]
            if compile_s is None:
                compile_s, started = time.monotonic() - started, time.monotonic()
            ends = np.cumsum(sizes)
            for run, values in zip(record["runs"], errors, strict=True):
                for begin, end in zip(ends - sizes, ends, strict=True):
                    run["curve"].append((round(epoch + end / per_epoch, 4), round(float(values[begin:end].mean()), 5)))
            if test_every and (epoch + 1) % test_every == 0 and epoch + 1 < epochs:
                for run, error in zip(record["runs"], runs.errors(test), strict=True):
                    run["test_curve"].append((epoch + 1, float(error)))
            seconds = time.monotonic() - started
            record |= {"trained_epochs": epoch + 1, "compile_s": round(compile_s, 1), "seconds": round(seconds, 1)}
            if self.clock.left() < 3:
                break
        record["step_s"] = seconds / max(1, (record["trained_epochs"] - 1) * per_epoch)
        for run, error in zip(record["runs"], runs.errors(test), strict=True):
            run["test_top1_error"] = float(error)
        if ten_crop:
            for run, error in zip(record["runs"], runs.errors(test, ten_crop=True, batch_size=200), strict=True):
                run["ten_crop_top1_error"] = float(error)
        finals = ", ".join(f"{100 * run['test_top1_error']:.2f}" for run in record["runs"])
        print(
            f"{experiment} / {name}: {len(pairs)} runs, {record['trained_epochs']} of {epochs} epochs, compiled in "
            f"{record['compile_s']} s, {1e3 * record['step_s']:.3f} ms per step, test error {finals} %", flush=True,
        )  # fmt: skip
        self.write()
        if record["trained_epochs"] < epochs:
            raise OutOfTime(f"{experiment} / {name} stopped after {record['trained_epochs']} of {epochs} epochs")
        return runs

    def write(self) -> None:
        write_json(self.path, self.records)


def task_of(config: ml_collections.ConfigDict, dataset: Dataset, train: data.Examples) -> Task:
    """Return the task of a config of `Study`."""
    config.kernel_std = config.kernel_std or kernel_std(config)
    steps = len(train.labels) // config.batch_size
    schedule = partial(
        learning_rate_at, base=config.learning_rate, warmup_steps=config.warmup_steps,
        drop_at=tuple(round(epoch * steps) for epoch in config.drop_at_epochs),
    )  # fmt: skip
    return Task(
        build_model(config, CLASSES), paper_sgd(momentum=config.momentum, weight_decay=config.weight_decay),
        build_preprocess(config, dataset, partial(statistics_of, [train.images])), schedule, train, config.batch_size,
    )  # fmt: skip


def relu(results: Results, of: Study, dataset: Dataset, test: data.Examples, seeds: Sequence[int]) -> None:
    """Train figure 1, at the learning rates that were fastest in the experiment's reduced budget."""
    train = dataset.load(f"train[:{of.budget.images}]")
    for (start, activation), rate in FASTEST.items():
        config = relu_vs_tanh.config(of, start, activation, rate)
        epochs = round(of.budget.epochs)
        results.train("relu_vs_tanh", f"{start}, {activation}", task_of(config, dataset, train), epochs, seeds, test)


def lrn(results: Results, of: Study, dataset: Dataset, test: data.Examples, seeds: Sequence[int]) -> None:
    """Train the four-layer network of footnote 3 with and without LRN, on all images; test it on ten crops."""
    train = dataset.load(f"train[:{min(50_000, of.budget.images + of.budget.validation)}]")
    epochs = round(of.budget.epochs)
    for form, with_lrn in lrn_four_layers.FORMS.items():
        results.train(
            "lrn_four_layers", form, lrn_four_layers.task(train, epochs, with_lrn), epochs, seeds, test,
            test_every=max(1, epochs // 20), ten_crop=True, parts=1,
        )  # fmt: skip


def crossed(results: Results, of: Study, dataset: Dataset, test: data.Examples, seeds: Sequence[int]) -> None:
    """Train on 5,000 images with and without dropout, augmentation and overlapping pooling (3.4, 4.1, 4.2)."""
    train = dataset.load(f"train[:{min(5000, of.budget.images)}]")
    epochs = 100 if of.budget.images > 5000 else 2
    for form in overfitting.FORMS:
        config = overfitting.config_of(of, form, drop_at_epochs=(0.64 * epochs, 0.86 * epochs))
        task, name = task_of(config, dataset, train), str(form)
        runs = results.train("overfitting", name, task, epochs, seeds, test, test_every=5, parts=1)
        record = results.records["experiments"]["overfitting"][name]
        for run, error in zip(record["runs"], runs.errors(train), strict=True):
            run["train_top1_error"] = float(error)
    results.write()


def first_filters(results: Results, of: Study, dataset: Dataset, test: data.Examples, seeds: Sequence[int]) -> None:
    """Train with 11×11 first filters on 32×32 images (figure 3), and record the colorfulness of the filters."""
    train = dataset.load(f"train[:{of.budget.images}]")
    epochs = round(1.5 * of.budget.epochs)
    config = of.config(stem=(11, 1, 5), drop_at_epochs=(0.64 * epochs, 0.86 * epochs))
    runs = results.train("filters", "11×11", task_of(config, dataset, train), epochs, seeds, test, parts=1)
    kernels = np.asarray(runs.state.params["conv1"]["kernel"])
    for run, kernel in zip(results.records["experiments"]["filters"]["11×11"]["runs"], kernels, strict=True):
        values = filters.colorfulness(kernel)
        difference, chance = filters.specialization(values)
        run |= {"colorfulness": values.tolist(), "difference": difference, "chance": chance}
    np.savez_compressed(results.path.with_name("filters.npz"), kernels=kernels.astype(np.float16))
    results.write()


EXPERIMENTS = {"relu": relu, "lrn": lrn, "overfitting": crossed, "filters": first_filters}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.on_gpu.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for claims.json and filters.npz")
    parser.add_argument("--budget", type=float, default=200, help="seconds (default: 200)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each network (default: 5)")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help=f"with commas (default: {','.join(EXPERIMENTS)})")
    parser.add_argument("--epochs", type=float, default=40, help="of figure 1; the others in proportion (default: 40)")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps CIFAR-10 (default: ~/tensorflow_datasets)")
    parser.add_argument("--quick", action="store_true", help="few images, to see that it works")
    flags = parser.parse_args()
    clock = Clock(flags.budget)
    use_compilation_cache()
    budget = Budget(256, 1, validation=64, test=64, shrink=4) if flags.quick else Budget(45_000, flags.epochs, 5000)
    of = Study(flags.workdir, budget, "on_gpu", flags.seeds, flags.data_dir)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    results = Results(flags.workdir, clock)
    try:
        with errors_on_one_line():
            dataset = Dataset(data.open_builder("cifar10", flags.data_dir))
            test = dataset.load(f"test[:{budget.test}]")
            for name in flags.only.split(","):
                EXPERIMENTS[name](results, of, dataset, test, range(flags.seeds))
    except OutOfTime as stop:
        done = list(results.records["experiments"])
        results.records["stopped"] = f"{stop}; not started: {[n for n in EXPERIMENTS if n not in done]}"
        print(results.records["stopped"], flush=True)
    results.write()


if __name__ == "__main__":
    main()
