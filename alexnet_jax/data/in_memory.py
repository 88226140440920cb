"""Splits in memory: read once, copied to each device, split into batches."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from alexnet_jax import sharding
from alexnet_jax.data.batch import Batch, steps_per_epoch
from alexnet_jax.data.images import decode
from alexnet_jax.data.source import DataError, open_source, split_size, unreadable
from alexnet_jax.runtime.imports import unchanged_logging


class Examples(NamedTuple):
    """A split in memory."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]


@unchanged_logging()
def load(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Return a split, in TFDS's notation ("train[:1000]"), read into memory.

    Decoding takes most of the time, so each process decodes a share and sends it to the others.

    Raises:
      DataError: no such split, an empty one, a file format other than ArrayRecord, or images of several sizes.
    """
    size = split_size(builder, split)
    source = open_source(builder, split)
    shape, decode_first = builder.info.features["image"].shape, builder.info.features["image"].decode_example_np
    share = -(-size // jax.process_count())  # the last share is padded with the last example
    positions = np.minimum(jax.process_index() * share + np.arange(share), size - 1)
    images, labels = None, np.empty(share, np.int32)
    for start in range(0, share, 1000):
        part = positions[start : start + 1000].tolist()
        try:
            examples = source.__getitems__(part)
        except Exception as error:  # any exception of a corrupt file
            raise unreadable(builder.data_path, split, f"{part[0]} to {part[-1]}", error) from None
        for i, position, example in zip(range(start, share), part, examples, strict=False):
            try:
                if images is None:
                    height, width = shape[:2] if None not in shape else decode_first(example["image"]).shape[:2]
                    images = np.empty((share, height, width, shape[2]), np.uint8)
                decode(example["image"], images[i])
            except Exception as error:
                raise unreadable(builder.data_path, split, position, error) from None
            labels[i] = example["label"]
    if jax.process_count() == 1:
        return Examples(images, labels)
    shapes = multihost_utils.process_allgather(np.array(images.shape))
    if (shapes != shapes[0]).any():
        raise DataError(f"{builder.name}: images of several sizes, {sorted({tuple(s[1:].tolist()) for s in shapes})}")
    gathered = multihost_utils.process_allgather(Examples(images, labels), tiled=True)
    return jax.tree.map(lambda x: x[:size], gathered)


def in_parts(images: np.ndarray, size: int = 10_000) -> Iterator[np.ndarray]:
    """Yield images [N, H, W, C] in arrays of about `size`, so that sums over them need little memory."""
    yield from np.array_split(images, -(-len(images) // size))


class DeviceData:
    """A small training set as arrays on each device; an epoch is a permutation of it, without copies from the host."""

    def __init__(self, examples: Examples, batch_size: int, mesh: Mesh | None = None):
        """Copy the examples to each device of a mesh; None for one device."""
        mesh = mesh or sharding.one_device()
        self.images, self.labels = sharding.place(tuple(examples), mesh)
        self._take = jax.jit(_take, static_argnums=4, out_shardings=NamedSharding(mesh, sharding.BATCH))
        replicated = NamedSharding(mesh, sharding.REPLICATED)
        self._permutation = jax.jit(_permutation, static_argnums=2, out_shardings=replicated)
        self.batch_size, self.size, self.image_shape = batch_size, len(examples.labels), examples.images.shape[1:]
        self.steps_per_epoch = steps_per_epoch(self.size, batch_size)
        self._epoch, self._order = -1, None

    def batch(self, key: jax.Array, step: int) -> Batch:
        """Return the batch of a step, split over the mesh: a function of the run's key and the step alone."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(key, epoch, self.size)
        return self._take(self.images, self.labels, self._order, position * self.batch_size, self.batch_size)

    def host_images(self) -> Iterator[np.ndarray]:
        """Yield all images in arrays uint8 [N, H, W, C] on the host."""
        yield from in_parts(np.asarray(self.images))

    def close(self) -> None:
        """Do nothing; `streaming.StreamedData` has workers to end."""


class DeviceBatches:
    """A small split as arrays on each device, in its order; the last batch is padded with examples of label −1."""

    def __init__(self, examples: Examples, batch_size: int, mesh: Mesh | None = None):
        """Copy the examples to each device of a mesh; None for one device."""
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
    positions = start + jnp.arange(size)
    rows = jnp.minimum(positions, len(labels) - 1)
    return Batch(images[rows], jnp.where(positions < len(labels), labels[rows], -1))
