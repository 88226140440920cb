"""TFDS data sets in ArrayRecord: uint8 images and integer labels. TensorFlow is never imported."""

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from alexnet_jax import fashion_mnist, sharding

log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """A split in memory."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]


class DataError(Exception):
    """A data set, or a split of one, that is not there; one line that says what to do."""


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One preparation at a time; the system releases the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".fashion_mnist.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def how_to_build(name: str, data_dir: Path, manual_dir: str = "") -> tuple[str, str]:
    """The command with which TFDS prepares one of its own data sets, which needs TensorFlow; and what is to be known.

    Args:
      manual_dir: a folder with the files that only the owner of the data set gives out, if there are such files.

    Raises:
      tfds.core.registered.DatasetNotFoundError: the data set is none of TFDS's own.
    """
    instructions = " ".join((tfds.builder_cls(name).MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    command = f'pip install -e ".[tfds]" && tfds build {name} --file_format=array_record --data_dir={data_dir}'
    if not instructions:
        return command, ""
    return f"{command} --manual_dir={manual_dir or 'ARCHIVES'}", f" ({instructions})"


def _how_to_prepare(name: str, folder: Path, manual_dir: str) -> str:
    """The commands that make a data set of TFDS, or what `alexnet_jax.prepare` makes of one; "" if there are none."""
    original = name.removesuffix("_256")
    commands, note, source = [], "", folder
    try:
        build, note = how_to_build(original, folder, manual_dir)
        commands.append(build)
    except tfds.core.registered.DatasetNotFoundError:
        source, note = "IMAGES", " (IMAGES is a folder split/class/image)"
    if any((folder / original).glob("**/dataset_info.json")):
        commands, note, source = [], "", folder
    if original == name:
        return commands[0] + note if commands else ""
    commands.append(f"python -m alexnet_jax.prepare --dataset {original} --data_dir {source} --out {folder}")
    return " && ".join(commands) + note


def open_builder(
    name: str, data_dir: str = "", source_dir: str = "", manual_dir: str = ""
) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a prepared data set; Fashion-MNIST is prepared here if it is not yet.

    Args:
      name: a TFDS name.
      data_dir: where TFDS keeps prepared data sets; "" is TFDS's default, ~/tensorflow_datasets.
      source_dir: where the original files of Fashion-MNIST are, if the user has them.
      manual_dir: where the archives of ImageNet are; for the commands that the error names.

    Raises:
      DataError: an unknown name, or a data set that is neither prepared nor can be prepared here.
    """
    folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser().absolute()
    try:
        builder = tfds.builder(name, data_dir=folder)
        if not builder.info.splits and name == "fashion_mnist":
            with _lock(folder):
                if not tfds.builder(name, data_dir=folder).info.splits:
                    start = time.monotonic()
                    fashion_mnist.prepare(folder, source_dir)
                    log.info("Prepared %s in %.0f s", builder.data_path, time.monotonic() - start)
            builder = tfds.builder(name, data_dir=folder)
        if builder.info.splits:
            return builder
    except tfds.core.registered.DatasetNotFoundError:
        pass
    except fashion_mnist.NoSourceError as error:
        raise DataError(f"config.dataset={name!r}: {error}") from None
    except (OSError, RuntimeError) as error:  # ArrayRecord's, of a full disk
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"config.data_dir={str(folder)!r} cannot be read or written: {reason}") from None
    if commands := _how_to_prepare(name, folder, manual_dir):
        raise DataError(
            f"config.data_dir={str(folder)!r}: no prepared data set {name!r} there; name the folder that has it, or "
            f"prepare it once: {commands}"
        )
    raise DataError(f"config.dataset={name!r}: TFDS knows no such data set, and {folder} holds none")


def split_size(builder: tfds.core.DatasetBuilder, split: str) -> int:
    """The number of examples of a split, in TFDS's notation.

    Raises:
      DataError: no such split, or an empty one.
    """
    try:
        size = builder.info.splits[split].num_examples
    except (ValueError, KeyError, AssertionError):
        known = ", ".join(f"{k} ({v.num_examples:,})" for k, v in builder.info.splits.items())
        raise DataError(f"split {split!r} of {builder.name}: it has {known}; take train[:1000] for a part") from None
    if not size:
        raise DataError(f"split {split!r} of {builder.name} is empty")
    return size


def image_shape(builder: tfds.core.DatasetBuilder) -> tuple[int, int, int]:
    """[H, W, C] of every image; raises DataError where the data set does not give all images one shape."""
    shape = builder.info.features["image"].shape
    if None in shape:
        raise DataError(
            f"{builder.name}: images of several sizes; python -m alexnet_jax.prepare --dataset {builder.name} makes a "
            "data set of one size from it"
        )
    return shape


def open_source(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """TFDS's random access to a split's examples, the images as files; raises DataError if it is not ArrayRecord."""
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise DataError(
            f"config.data_dir: {builder.data_path} is stored as {builder.info.file_format}; training reads "
            "ArrayRecord: prepare it with file_format=array_record"
        ) from None


def load(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Reads a split, in TFDS's notation ("train[:1000]"), into memory.

    Decoding is what takes the time (thousands of images/s a core), so each process decodes a share, and hands it on.

    Raises:
      DataError: no such split, an empty one, a file format other than ArrayRecord, or images of several sizes.
    """
    size = split_size(builder, split)
    source = open_source(builder, split)
    image_feature = builder.info.features["image"]
    share = -(-size // jax.process_count())  # the last share is filled up with the last example
    places = np.minimum(jax.process_index() * share + np.arange(share), size - 1)
    images, labels = None, np.empty(share, np.int32)
    for start in range(0, share, 1000):
        for i, example in enumerate(source.__getitems__(places[start : start + 1000].tolist()), start):
            image = image_feature.decode_example_np(example["image"])
            if images is None:
                images = np.empty((share, *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise DataError(f"{builder.name}: images of several sizes, {images.shape[1:]} and {image.shape}")
            images[i], labels[i] = image, example["label"]
    if jax.process_count() == 1:
        return Examples(images, labels)
    shapes = multihost_utils.process_allgather(np.array(images.shape))
    if (shapes != shapes[0]).any():
        raise DataError(f"{builder.name}: images of several sizes, {sorted({tuple(s[1:].tolist()) for s in shapes})}")
    gathered = multihost_utils.process_allgather(Examples(images, labels), tiled=True)
    return jax.tree.map(lambda x: x[:size], gathered)


class Batch(NamedTuple):
    images: jax.Array  # uint8 [B, H, W, C]
    labels: jax.Array  # int32 [B]; −1 for what only fills up the last batch of a set


class DeviceData:
    """A small data set as arrays on each device; an epoch is a permutation of it, and costs no host copy."""

    def __init__(self, examples: Examples, batch_size: int, mesh: Mesh | None = None):
        mesh = mesh or sharding.one_device()
        self.images, self.labels = sharding.place(tuple(examples), mesh)
        self._take = jax.jit(_take, static_argnums=4, out_shardings=NamedSharding(mesh, sharding.BATCH))
        everywhere = NamedSharding(mesh, sharding.REPLICATED)
        self._permutation = jax.jit(_permutation, static_argnums=2, out_shardings=everywhere)
        self.batch_size = batch_size
        self.steps_per_epoch = len(examples.labels) // batch_size  # what is left over comes up in another epoch
        self._epoch, self._order = -1, None

    def batch(self, key: jax.Array, step: int) -> Batch:
        """The batch of a step, split over the mesh: a function of the run's key and the step alone."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(key, epoch, len(self.labels))
        return self._take(self.images, self.labels, self._order, place * self.batch_size, self.batch_size)

    def close(self) -> None:
        """Nothing to end, as `stream.StreamedData` has."""


class DeviceBatches:
    """A small set as arrays on each device, in its order: the last batch is filled up with examples of label −1."""

    def __init__(self, examples: Examples, batch_size: int, mesh: Mesh | None = None):
        mesh = mesh or sharding.one_device()
        self.images, self.labels = sharding.place(tuple(examples), mesh)
        self._next = jax.jit(_next, static_argnums=3, out_shardings=NamedSharding(mesh, sharding.BATCH))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            yield self._next(self.images, self.labels, i * self.batch_size, self.batch_size)


def _permutation(key, epoch, size):
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def _take(images, labels, order, start, size):
    chosen = jax.lax.dynamic_slice(order, (start,), (size,))
    return Batch(images[chosen], labels[chosen])


def _next(images, labels, start, size):
    place = start + jnp.arange(size)
    here = jnp.minimum(place, len(labels) - 1)
    return Batch(images[here], jnp.where(place < len(labels), labels[here], -1))
