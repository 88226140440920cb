"""LRN in the four-layer network of footnote 3: python -m experiments.lrn_four_layers --workdir DIR

cuda-convnet's network with and without LRN after both convolutions (section 3.3: 11 and 13 %), at the learning rate of
its parameter files, which is divided by ten after 90 and after 95 % of the epochs. The test error is of ten crops.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from alexnet_jax import sharding
from alexnet_jax.data import DeviceBatches, DeviceData, Examples
from alexnet_jax.inference import Network, batch_size, evaluate
from alexnet_jax.optimizer import learning_rate_at
from alexnet_jax.preprocess import fit
from alexnet_jax.runtime.files import write_json
from alexnet_jax.setup import open_dataset
from alexnet_jax.train_step import create_state, make_train_step
from alexnet_jax.workdir import WorkdirError
from experiments import four_layers, style
from experiments.claims import Claim, Finding
from experiments.command import save_figure
from experiments.comparison import compare_paired, percent, spread
from experiments.seeds import Task
from experiments.study import QUICK, Budget, Study, main

CLAIMS = (
    Claim("lrn_four_layers", "LRN lowers the test error of a four-layer network (3.3)", "13 → 11 % on CIFAR-10", -2.0),
)  # fmt: skip
BUDGETS = {"full": Budget(50_000, 300), "reduced": Budget(15_000, 20), "quick": QUICK._replace(shrink=1)}
SEEDS = 10
CAPTION = (
    "a: error in training by epoch, means over the seeds, with bands from the lowest to the highest run. b: test "
    "error on ten crops; a line joins the runs of a seed, a dash is the mean."
)
FORMS = {"with LRN": True, "without LRN": False}
COLORS = dict(zip(FORMS, (style.BLUE, style.ORANGE), strict=True))


def task(train: Examples, epochs: int, lrn: bool) -> Task:
    """Return the training of the network on 24×24 crops and flips, with or without LRN."""
    steps = len(train.labels) // four_layers.BATCH_SIZE
    # cuda-convnet's method has the drops before its last 20 and its last 10 of several hundred epochs.
    drops = (round(0.9 * epochs * steps), round(0.95 * epochs * steps))
    return Task(
        four_layers.FourLayers(lrn=lrn),
        four_layers.optimizer(),
        fit(train.images, pad=0, crop=four_layers.CROP, resize=0, flip=True, lighting=False),
        partial(learning_rate_at, base=four_layers.LEARNING_RATE, drop_at=drops),
        train,
        four_layers.BATCH_SIZE,
    )


def run(study: Study) -> dict[str, Any]:
    """Train both forms with every seed, one run at a time; each finished run is stored."""
    dataset = open_dataset(study.config())
    train = dataset.load(f"train[:{study.budget.images}]")
    test = dataset.load(f"test[:{study.budget.test}]")
    records = {form: [] for form in FORMS}
    for seed in study.seeds:
        for form, lrn in FORMS.items():
            path = study.workdir / study.label / f"four-layers-{form.replace(' ', '-')}" / f"seed{seed}.json"
            record = stored(path, study)
            if record is None:
                print(f"\nfour layers {form}, seed {seed}: {study.budget}", flush=True)
                record = _train(task(train, round(study.budget.epochs), lrn), round(study.budget.epochs), seed, test)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"budget": str(study.budget), **record})
            study.seconds += record["seconds"]
            records[form].append(record)
    return records


def stored(path: Path, study: Study) -> dict[str, Any] | None:
    """Return the record of a finished run, or None; raises WorkdirError if it is corrupt or of another budget."""
    if not path.exists():
        return None
    try:
        record = dict(json.loads(path.read_text()))
        budget = record.pop("budget")
    except (ValueError, KeyError, TypeError):
        raise WorkdirError(f"{path} is corrupt; delete it") from None
    if budget != str(study.budget):
        raise WorkdirError(f"{path} is a run of {budget}, not of {study.budget}; delete it, or give another --workdir")
    return record


def _train(task: Task, epochs: int, seed: int, test: Examples) -> dict[str, Any]:
    """Train one run, and return its errors, as fractions, and the curve of (epoch, error in training).

    It is a run of `seeds.Runs` without its vmapped scan, which is several times slower on a CPU.
    """
    mesh, start, curve = sharding.make_mesh(), time.monotonic(), []
    batches = DeviceData(task.train, task.batch_size, mesh)
    step = make_train_step(task.model, task.optimizer, task.preprocess, task.learning_rate, mesh)
    state = create_state(task.model, task.optimizer, task.preprocess.image_shape, seed, mesh)
    order_key, step_key = jax.random.split(jax.random.wrap_key_data(state.key))
    for epoch in range(epochs):
        errors = []
        for number in range(epoch * task.steps_per_epoch, (epoch + 1) * task.steps_per_epoch):
            state, metrics = step(state, batches.batch(order_key, number), jax.random.fold_in(step_key, number))
            errors.append(metrics["error"])
        curve.append((epoch + 1, float(np.mean(errors))))
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1} of {epochs}: training error {100 * curve[-1][1]:.1f} %, {seconds:.0f} s", flush=True)
    network = Network(task.model, state.params, task.preprocess)
    result = {"seed": seed, "curve": curve}
    for name, ten_crop in (("test_top1_error", False), ("ten_crop_top1_error", True)):
        size = batch_size(len(test.labels), ten_crop, mesh)
        result[name] = evaluate([network], DeviceBatches(test, size, mesh), ten_crop, mesh).top1_error
    return result | {"seconds": time.monotonic() - start}


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the test errors on ten crops, in percent, paired by seed."""
    ours, others = (percent(records[form], "ten_crop_top1_error") for form in FORMS)
    text = f"{spread(ours)} % with, {spread(others)} % without"
    return {"lrn_four_layers": Finding(text, compare_paired(ours, others))}


@style.styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the errors in training, means with a band from the lowest to the highest, and the test errors by seed."""
    figure = Figure(figsize=(style.WIDTH, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    for form, runs in records.items():
        epochs = [epoch for epoch, _ in runs[0]["curve"]]
        errors = [[100 * error for _, error in record["curve"]] for record in runs]
        style.plot_runs(left, epochs, errors, color=COLORS[form], label=form)
    left.set(xlabel="epoch", ylabel="error in training (%)")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    pairs = np.array([percent(runs, "ten_crop_top1_error") for runs in records.values()])
    right.plot([0, 1], pairs, color=style.GRAY, linewidth=0.8)
    for x, (form, values) in enumerate(zip(records, pairs, strict=True)):
        right.plot([x] * len(values), values, "o", color=COLORS[form], alpha=0.6)
        right.plot(x, values.mean(), "_", color="black", markersize=20)
    right.set_xticks(range(len(records)), records)
    right.set(xlim=(-0.4, 1.4), ylabel="test error, ten crops (%)", title="lines: pairs of one seed")
    right.grid(axis="x", visible=False)
    style.label_panels([left, right])
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
