"""A trained network, opened from a run's workdir or a file of weights: predictions, activations, nearest neighbors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from alexnet_jax import data, inference, sharding
from alexnet_jax.data import Examples
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.model import OUTPUTS, AlexNet, activations
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.runtime.files import user_path
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.setup import open_dataset
from alexnet_jax.weights import RunError, Weights, load_weights
from alexnet_jax.weights.workdir import read_run

__all__ = [
    "Run",
    "RunError",
    "nearest",
    "open_named_dataset",
    "open_run",
    "output_path",
    "precision",
    "tower_influence",
]

AT_A_TIME = 500  # crops that pass through the network together
STREAMED_PIXELS = 128**2  # of an image: a data set of larger ones is read from disk, for a network from a file


@dataclass(frozen=True, eq=False)
class Run:
    """A trained network and the data set that it was trained on, which is opened when it is first needed.

    Attributes:
      path: the run's working directory, or the file of weights.
      weights: the network, its parameters and the preparation of its images.
      config: the run's config; None for a file.
      step: the step of the checkpoint that was read; None for a file.
      data_dir: where TFDS keeps the data set; "" is where it was in training.
    """

    path: Path
    weights: Weights
    config: ml_collections.ConfigDict | None = None
    step: int | None = None
    data_dir: str = ""

    @property
    def model(self) -> AlexNet:
        """The network."""
        return self.weights.model

    @cached_property
    def params(self) -> Any:
        """The parameters, on a device."""
        with jax.ensure_compile_time_eval():  # arrays, also where `jax.jit` traces the first use
            return jax.device_put(self.weights.params)

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing."""
        return self.weights.preprocess

    @property
    def names(self) -> list[str]:
        """The names of the classes; their numbers if the file has no names."""
        return list(self.weights.class_names or (f"class {i}" for i in range(self.model.num_classes)))

    @cached_property
    def dataset(self) -> Dataset:
        """The data set; raises data.DataError, or RunError for a file that names none."""
        if self.config is not None:
            return open_dataset(self.config, self.data_dir)
        if not self.weights.dataset:
            raise RunError(f"{self.path} names no data set; give one as TFDS names it (--dataset)")
        return open_named_dataset(self.weights.dataset, self.data_dir)

    def load(self, split: str) -> Examples:
        """Return a split of the data set, in TFDS's notation ("test[:100]")."""
        return self.dataset.load(split)

    @run_settings()
    def predict(self, images: np.ndarray, ten_crop: bool = False) -> np.ndarray:
        """Return class probabilities [N, K] of uint8 images [N, H, W, C], as the data set has them.

        Raises:
          ValueError: other images.
        """
        self._check(images)
        predict = partial(_predict_program(), self.params, self.preprocess, model=self.model, ten_crop=ten_crop)
        return _in_batches(predict, images, AT_A_TIME // 10 if ten_crop else AT_A_TIME)

    @run_settings()
    def activations(self, images: np.ndarray, layer: str = "fc7") -> np.ndarray:
        """Return one layer's output [N, …] on the center crops of uint8 images [N, H, W, C], as `model.activations`.

        Raises:
          ValueError: other images, or no such layer.
        """
        self._check(images)
        if layer not in OUTPUTS:
            raise ValueError(f"layer={layer!r}: expected one of {', '.join(OUTPUTS)}")
        layer_of = partial(_layer_program(), self.params, self.preprocess, model=self.model, layer=layer)
        return _in_batches(layer_of, images, AT_A_TIME)

    def _check(self, images: np.ndarray) -> None:
        shape = self.preprocess.mean.shape
        if images.ndim != 4 or images.shape[1:] != shape or images.dtype != np.uint8:
            expected = ", ".join(map(str, shape))
            raise ValueError(
                f"images {images.dtype}{[*images.shape]}: expected uint8 [N, {expected}], as the data set has"
            )

    def error(self, examples: Examples, ten_crop: bool = False) -> float:
        """Return the top-1 error on some examples, as a fraction."""
        return float(np.mean(self.predict(examples.images, ten_crop).argmax(axis=1) != examples.labels))


@cache
def _predict_program() -> Callable:
    def predict(params, preprocess, images, *, model, ten_crop):
        return inference.predict(model, params, images, preprocess, ten_crop)

    return inference.jit_forward(predict, static_argnames=("model", "ten_crop"))


@cache
def _layer_program() -> Callable:
    def layer_of(params, preprocess, images, *, model, layer):
        return activations(model, params, preprocess.center_crop(images))[layer]

    return inference.jit_forward(layer_of, static_argnames=("model", "layer"))


def _in_batches(call: Callable[[np.ndarray], jax.Array], images: np.ndarray, size: int) -> np.ndarray:
    if not len(images):
        return _in_batches(call, np.zeros((1, *images.shape[1:]), images.dtype), 1)[:0]
    size = min(size, len(images))
    outputs = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])  # one shape, one compilation
        outputs.append(np.asarray(call(padded), np.float32)[: len(part)])
    return np.concatenate(outputs)


def open_named_dataset(name: str, data_dir: str = "") -> Dataset:
    """Return a prepared data set by its TFDS name, streamed if its images are large; raises data.DataError."""
    builder = data.open_builder(name, data_dir)
    shape = builder.info.features["image"].shape if "image" in builder.info.features else (1,)
    return Dataset(builder, streaming=math.prod(shape[:2]) > STREAMED_PIXELS if None not in shape[:2] else True)


def output_path(path: Path, name: str) -> Path:
    """Return where a command writes a file about a network: in the run's workdir, or in the current folder.

    Args:
      path: the workdir, or a file of weights, whose name comes before that of what is written.
    """
    return Path(f"{path.stem}.{name}") if path.is_file() else path / name


@run_settings()
def open_run(workdir: str | Path, data_dir: str = "") -> Run:
    """Read the newest checkpoint of a run, or a file of weights; changes nothing in the folder.

    Args:
      workdir: the run's working directory, which may still be training, or a file of weights.
      data_dir: where TFDS keeps the data set now; "" is where it was in training.

    Raises:
      RunError: the folder holds no run, or no checkpoint.
      weights.WeightsError: a file that cannot be read as weights.
      checkpoint.CheckpointError: the newest checkpoint is corrupt.
      sharding.DeviceError: there are no devices.
      data.DataError: a run of before `preprocess.npz` was written, whose data set is missing.
    """
    path = user_path(workdir, "--workdir")
    if not path.is_file():
        return Run(path, *read_run(path, data_dir), data_dir)
    sharding.all_devices()
    return Run(path, load_weights(path), data_dir=data_dir)


@run_settings()
def tower_influence(model: AlexNet, params: Any, images: jax.Array) -> dict[str, float]:
    """Return how much each layer of tower 1 changes when tower 0's kernels and biases of conv1 are set to 0.

    It is 0 in every layer before the towers communicate.

    Args:
      images: the network's inputs [B, H, W, C].

    Returns:
      For each layer ‖change‖ / ‖output‖ of tower 1's half of the channels; for fc8, of all logits.
    """
    ablated = {name: x.at[..., : x.shape[-1] // 2].set(0) for name, x in params["conv1"].items()}
    before, after = (activations(model, p, images) for p in (params, {**params, "conv1": ablated}))

    def change(name):
        x, y = (np.asarray(outputs[name], np.float64) for outputs in (before, after))
        half = 0 if name == "fc8" else x.shape[-1] // 2
        return float(np.linalg.norm(y[..., half:] - x[..., half:]) / np.linalg.norm(x[..., half:]))

    return {name: change(name) for name in before}


@run_settings()
def nearest(queries: np.ndarray, keys: np.ndarray, count: int = 6) -> np.ndarray:
    """Return for each query the `count` nearest keys by Euclidean distance, as figure 4 finds similar images.

    Args:
      queries, keys: [Q, …] and [N, …]; the axes after the first are flattened to one vector.

    Returns:
      Positions in `keys`, int [Q, count], the nearest first.

    Raises:
      ValueError: fewer than `count` keys.
    """
    if len(keys) < count:
        raise ValueError(f"nearest: {len(keys)} keys: expected at least {count}")
    q, k = (jnp.asarray(x, jnp.float32).reshape(len(x), -1) for x in (queries, keys))
    parts = [_nearest(q[start : start + AT_A_TIME], k, count) for start in range(0, len(q), AT_A_TIME)]
    return np.concatenate([np.asarray(x) for x in parts])


@partial(jax.jit, static_argnums=2)
def _nearest(queries, keys, count):
    squared = jnp.sum(keys**2, axis=1) - 2 * queries @ keys.T  # |k − q|² without |q|², which does not change the order
    return jax.lax.top_k(-squared, count)[1]


def precision(labels: Sequence[int], neighbor_labels: np.ndarray) -> float:
    """Return the share of neighbors, labels [Q, count], that have the label of their query, of labels [Q]."""
    return float(np.mean(neighbor_labels == np.asarray(labels)[:, None]))
