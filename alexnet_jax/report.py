"""What a run reports: its device, data and layers before the training; the test and its result after it."""

import itertools
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from alexnet_jax import plots
from alexnet_jax.errors import one_line
from alexnet_jax.inference import Network, batch_size, evaluate, jit_forward
from alexnet_jax.model import OUTPUTS
from alexnet_jax.progress import title
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.files import write_json
from alexnet_jax.runtime.workers import counted_cores
from alexnet_jax.setup import Setup
from alexnet_jax.summary import layer_summary
from alexnet_jax.tables import table
from alexnet_jax.train_step import TrainState
from alexnet_jax.workdir import METRICS, RESULT

log = logging.getLogger(__name__)

# Rows of the table whose name in `result.json` does not read well.
TITLES = {"images_per_s": "images/s in training"}


def final_test(run: Setup, state: TrainState, workdir: Path, started: float, images_per_s: float) -> dict[str, Any]:
    """Evaluate on the test set once and return the result; process 0 writes it to `result.json`, and the figures.

    Args:
      started: the start of the run on `time.monotonic`.
      images_per_s: the speed in training.
    """
    size = batch_size(run.sizes["test"], run.ten_crop, run.mesh)
    batches = iter(run.dataset.batches(run.test_split, size, run.mesh))
    first = next(batches)
    image = first_image(first.images) if jax.process_index() == 0 else None
    batches = itertools.chain([first], batches)
    tested = evaluate([Network(run.model, state.params, run.preprocess)], batches, run.ten_crop, run.mesh)
    convolutions = {layer: x for layer, x in state.params.items() if layer.startswith("conv")}
    convolutions = multihost_utils.process_allgather(convolutions, tiled=True)
    result = {
        "test_top1_error": tested.top1_error,
        "test_top5_error": tested.top5_error,
        "test_crops": run.preprocess.crops if run.ten_crop else 1,
        "lowest_validation_top1_error": float(state.plateau.best_error),
        "steps": run.num_steps,
        "seconds": round(time.monotonic() - started, 1),
        "images_per_s": round(images_per_s, 1),
        "device": device_name(run.mesh),
    }
    if jax.process_index() == 0:
        write_json(workdir / RESULT, result)
        for name, draw in {
            "filters.png": lambda path: plots.plot_filters(convolutions["conv1"]["kernel"], path, run.model.towers),
            "feature_maps.png": lambda path: plot_feature_maps(run, convolutions, image, path),
            "confusion.png": lambda path: plots.plot_confusion(tested.confusion, run.dataset.class_names, path),
            "curves.png": lambda path: plots.plot_curves(workdir / METRICS, path),
        }.items():
            try:
                draw(workdir / name)
            except Exception as error:  # of Matplotlib, its settings and fonts: the result is written
                log.warning("Warning: %s cannot be drawn (%s)", workdir / name, one_line(error))
    distributed.barrier()  # the others exit when the result is written
    log.info("\n%s\n\nWritten to %s", result_table(result), workdir)
    return result


def first_image(images: jax.Array) -> np.ndarray:
    """Return the first image of a batch that is split over the mesh, [H, W, C]; a device of process 0 has it."""
    part = next(x for x in images.addressable_shards if not x.index[0].start)
    return np.array(part.data[0])


def plot_feature_maps(run: Setup, convolutions: Any, image: np.ndarray, path: Path) -> None:
    """Plot the outputs of the convolutions and their pooling on the center crop of an image, the towers side by side.

    Args:
      convolutions: the parameters of conv1 … conv5, on the host.
      image: uint8 [H, W, C].
    """

    def outputs_of(params, preprocess, images):
        inputs, collections = preprocess.center_crop(images), ["activations"]
        return run.model.apply({"params": params}, inputs, convolutions_only=True, mutable=collections)[1]

    arguments = jax.device_put((convolutions, run.preprocess, image[None]), jax.local_devices()[0])
    outputs = jit_forward(outputs_of)(*arguments)["activations"]["outputs"]
    shown = [name for name in OUTPUTS if name in outputs and not name.startswith("norm")]  # LRN changes little to see
    maps, towers = {name: outputs[name] for name in shown}, run.model.towers
    plots.plot_maps(maps, path, count=16 // towers, towers=towers, image=image)


def result_table(result: dict[str, Any]) -> str:
    """Return the contents of `result.json` as a table of text."""
    percent = {k: f"{100 * v:.2f} %" for k, v in result.items() if k.endswith("_error")}
    rows = [(TITLES.get(k, title(k)), str(percent.get(k, v))) for k, v in result.items()]
    return table(rows, ("result", "value"))


def run_summary(run: Setup, step: int) -> str:
    """Return what is printed before training: device, data, steps and layers."""
    sizes = ", ".join(f"{size:,} to {use}" for use, size in run.sizes.items())
    shape = "×".join(map(str, run.preprocess.mean.shape))
    origin = f"init       {run.origin}\n" if run.origin else ""
    frozen = f"frozen     {', '.join(layer for layer in run.rates if layer in run.frozen)}\n" if run.frozen else ""
    rates = {layer: rate for layer, rate in run.rates.items() if rate != 1 and layer not in run.frozen}
    factors = f"rates      {', '.join(f'{layer} × {rate:g}' for layer, rate in rates.items())}\n" if rates else ""
    resuming = f"; resuming from the checkpoint of step {step:,}" if step else ""
    return (
        f"device     {device_name(run.mesh)}\n"
        f"data       {run.dataset.full_name}: {sizes}; {shape}, {run.dataset.num_classes} classes\n"
        f"steps      {run.num_steps:,} of {run.batch_size} images ({run.train_data.steps_per_epoch} per epoch)"
        f"{resuming}\n{origin}{frozen}{factors}\n{layer_summary(run.model, run.preprocess.image_shape)}\n"
    )


def device_name(mesh: Mesh) -> str:
    """Return the accelerators' name and number, or the CPU with the cores that this process may use, and the mesh."""
    device, layout = mesh.devices.flat[0], " × ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    if (count := jax.process_count()) > 1:
        layout += f", {count} processes"
    if device.platform == "cpu":
        return f"CPU, {counted_cores()}, mesh {layout}"
    return f"{mesh.size} × {device.device_kind}, mesh {layout}"
