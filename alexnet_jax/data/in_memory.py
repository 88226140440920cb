"""Splits in the devices' memory: each holds a part of the images, and an epoch exchanges them between the devices.

The images of a split are divided over the axis `data` of the mesh and stay where they are. An epoch is fetched in
shares of some consecutive steps: each device sends to every other the images that it needs in these steps (all-to-all),
and a step's batch is a slice of what was received.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from jax import lax
from jax.sharding import Mesh, NamedSharding

from alexnet_jax import sharding
from alexnet_jax.data.batch import Batch, steps_per_epoch
from alexnet_jax.data.images import decode
from alexnet_jax.data.source import check_labels, open_source, split_size, stored_shape, unreadable
from alexnet_jax.preprocess import Statistics, measure
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.imports import unchanged_logging

SHARE = 1 / 8  # of a device's images, that the share of an epoch takes at most
SMALL_SHARE = 1 << 30  # bytes that a share may take in any case: a small set is exchanged once an epoch
ROUNDS = 4  # in which a share is usually exchanged, so that what is on its way takes a half of the share
BLOCK = 64 << 20  # bytes that are read before they are copied to the devices
FIRST_PROGRESS_S, PROGRESS_S = 5, 10  # from the start to the first line of progress, and between two lines

log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """A split in memory, or a part of one."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]


class Source(NamedTuple):
    """A split that can be read in any order.

    Attributes:
      name: for messages.
      size: the number of its examples.
      shape: [H, W, C] of every image.
      read: yields the examples at some positions [P], in their order, in arrays of any number of them that are
        valid until the next; a position beyond the end is a black image of label −1.
      dtype: of the images; others than uint8 are features in place of images.
    """

    name: str
    size: int
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], Iterable[Examples]]
    dtype: np.dtype = np.dtype(np.uint8)


def load(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Return a split, in TFDS's notation ("train[:1000]"), read into memory.

    Raises:
      DataError: no such split, an empty one, a file format other than ArrayRecord, or images of several sizes.
    """
    positions = np.arange(split_size(builder, split))
    images = np.empty((len(positions), *stored_shape(builder, split)), np.uint8)
    labels = np.empty(len(positions), np.int32)
    start = 0
    for part in read(builder, split, positions):
        end = start + len(part.labels)
        images[start:end], labels[start:end] = part
        start = end
    return Examples(images, labels)


def read(
    builder: tfds.core.DatasetBuilder, split: str, positions: np.ndarray, labeled: bool = False
) -> Iterator[Examples]:
    """Yield the examples at some positions of a split, decoded in this process, as `Source.read`.

    Args:
      labeled: whether an image without a label is an error.

    Raises:
      DataError: an example that cannot be read, one without a label, or an image of another size than the first.
    """
    shape, size = stored_shape(builder, split), split_size(builder, split)
    with unchanged_logging():
        source = open_source(builder, split)
    for start in range(0, len(positions), 1000):
        part = positions[start : start + 1000]
        images, labels = np.zeros((len(part), *shape), np.uint8), np.full(len(part), -1, np.int32)
        inside = np.flatnonzero(part < size)
        wanted = part[inside].tolist()
        try:
            examples = source.__getitems__(wanted) if wanted else []
        except Exception as error:  # any exception of a corrupt file
            raise unreadable(builder.data_path, split, f"{wanted[0]} to {wanted[-1]}", error) from None
        for i, position, example in zip(inside, wanted, examples, strict=True):
            try:
                decode(example["image"], images[i])
            except Exception as error:
                raise unreadable(builder.data_path, split, position, error) from None
            labels[i] = example["label"]
        if labeled and wanted:
            check_labels(labels[inside], builder.info.features["label"].num_classes, builder.name, split)
        yield Examples(images, labels)


def train_bytes(size: int, image_bytes: int, batch_size: int, parts: int) -> int:
    """Return the bytes that `DeviceData` takes on each device at most, for a mesh that splits a batch into parts."""
    rows, (steps, capacity) = -(-size // parts), _share(size, image_bytes, batch_size, parts)
    return image_bytes * (rows + steps * batch_size // parts + 2 * parts * capacity)


def ordered_bytes(size: int, image_bytes: int, batch_size: int, parts: int) -> int:
    """Return the bytes that `DeviceBatches` takes on each device."""
    return image_bytes * -(-size // batch_size) * batch_size // parts


class DeviceData:
    """A training set in the memory of the devices; an epoch is a permutation of it, without copies from the host."""

    def __init__(self, examples: Examples | Source, batch_size: int, mesh: Mesh | None = None):
        """Read the examples of this process's devices and place them; `mesh` None is one device.

        Raises:
          DataError: an example that cannot be read.
        """
        source, self.mesh = _source(examples), mesh or sharding.one_device()
        self.batch_size, self.size, self.image_shape, self._dtype = batch_size, source.size, source.shape, source.dtype
        self.steps_per_epoch = steps_per_epoch(self.size, batch_size)
        parts, image_bytes = self.mesh.shape[sharding.DATA], math.prod(source.shape) * source.dtype.itemsize
        rows = -(-self.size // parts)
        self._rows: Batch | None = _place(source, np.arange(parts * rows).reshape(parts, rows), self.mesh)
        self._permutation = jax.jit(
            _permutation, static_argnums=2, out_shardings=NamedSharding(self.mesh, sharding.REPLICATED)
        )
        self._take = _on_mesh(partial(_take, batch_size), self.mesh, sharding.BATCH, sharding.REPLICATED)
        self._slice = _slicer(self.mesh, batch_size)
        self._share_steps, capacity = _share(self.size, image_bytes, batch_size, parts)
        in_epoch = self.steps_per_epoch * batch_size
        fetch = partial(_fetch, batch_size, in_epoch, capacity)
        self._fetch = _on_mesh(fetch, self.mesh, sharding.BATCH, sharding.REPLICATED, sharding.BATCH, donated=2)
        self._epoch, self._order = -1, None
        self._index, self._share = -1, None

    def batch(self, key: jax.Array, step: int) -> Batch:
        """Return the batch of a step, split over the mesh: a function of the run's key and the step alone."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order, self._index = epoch, self._permutation(key, epoch, self.size), -1
        if self.mesh.shape[sharding.DATA] == 1:  # there is nothing to exchange
            return self._take(self._rows, self._order, position)
        index, position = divmod(position, self._share_steps)
        if index != self._index:
            self._index, self._share = index, self._fetch(self._rows, self._order, self._share or self._empty(), index)
        return self._slice(self._share, position)

    def _empty(self) -> Batch:
        """Return the memory of a share; the next share overwrites it."""
        size = self._share_steps * self.batch_size

        def empty():
            return Batch(jnp.zeros((size, *self.image_shape), self._dtype), jnp.zeros(size, jnp.int32))

        return jax.jit(empty, out_shardings=NamedSharding(self.mesh, sharding.BATCH))()

    def measure(self, colors: bool) -> Statistics:
        """Return the statistics of the images, which every process must call; `colors` as in `preprocess.measure`."""
        return measure(self._own_images(), colors, distributed.total)

    def _own_images(self) -> Iterator[np.ndarray]:
        """Yield the images in arrays uint8 [N, H, W, C], each in one of the processes."""
        yield np.empty((0, *self.image_shape), np.uint8)  # of a process whose images another has as well
        for shard in self._rows.images.addressable_shards:
            if shard.replica_id == 0:
                first = shard.index[0].start or 0
                images = np.asarray(shard.data)[: max(0, self.size - first)]
                yield from in_parts(images)

    def close(self) -> None:
        """Free the memory of the devices."""
        self._rows = self._share = None


class DeviceBatches:
    """A split in the memory of the devices, in its order; the last batch is padded with examples of label −1."""

    def __init__(self, examples: Examples | Source, batch_size: int, mesh: Mesh | None = None):
        """Read the examples of this process's devices and place them; `mesh` None is one device.

        Raises:
          DataError: an example that cannot be read.
        """
        source, mesh = _source(examples), mesh or sharding.one_device()
        self.batch_size, self._steps = batch_size, -(-source.size // batch_size)
        # Each device holds its part of every batch.
        positions = np.arange(self._steps * batch_size).reshape(self._steps, mesh.shape[sharding.DATA], -1)
        self._rows = _place(source, positions.swapaxes(0, 1).reshape(positions.shape[1], -1), mesh)
        self._slice = _slicer(mesh, batch_size)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            yield self._slice(self._rows, i)


def in_parts(images: np.ndarray, size: int = 10_000) -> Iterator[np.ndarray]:
    """Yield images [N, H, W, C] in arrays of about `size`, so that sums over them need little memory."""
    yield from np.array_split(images, -(-len(images) // size) or 1)


def _source(examples: Examples | Source) -> Source:
    if isinstance(examples, Source):
        return examples
    images, labels = examples

    def read(positions):
        inside = positions < len(labels)
        rows = np.where(inside, positions, 0)
        yield Examples(images[rows], np.where(inside, labels[rows], -1).astype(np.int32))

    return Source("", len(labels), images.shape[1:], read, images.dtype)


def _place(source: Source, positions: np.ndarray, mesh: Mesh) -> Batch:
    """Return the examples at `positions` [D, N] of a split: N in the memory of each of the D parts of the mesh.

    Each process reads those of its own devices, once, and logs its progress.
    """
    own = [i for i, row in enumerate(mesh.devices) if any(d.process_index == jax.process_index() for d in row)]
    count, length, start = len(own) * positions.shape[1], positions.shape[1], time.monotonic()
    examples = ((i, label) for part in source.read(positions[own].ravel()) for i, label in zip(*part, strict=True))
    image_bytes = max(1, math.prod(source.shape) * source.dtype.itemsize)
    at_a_time = min(length, max(1, BLOCK // image_bytes))  # the host never has a copy of all
    placed: list[list[jax.Array]] = [[], []]
    done, next_line = 0, start + FIRST_PROGRESS_S
    for part in own:
        devices = [device for device in mesh.devices[part] if device.process_index == jax.process_index()]
        shapes = ((length, *source.shape), source.dtype), ((length,), np.int32)
        shards = [[jnp.zeros(*shape, device=device) for shape in shapes] for device in devices]
        for first in range(0, length, at_a_time):
            size = min(at_a_time, length - first)
            block = np.empty((size, *source.shape), source.dtype), np.empty(size, np.int32)
            for i in range(size):
                block[0][i], block[1][i] = next(examples)
                done += 1
                if (now := time.monotonic()) > next_line:
                    next_line = now + PROGRESS_S
                    left = (now - start) * (count / done - 1)
                    log.info("%s: %s of %s images read, %.0f s left", source.name, f"{done:,}", f"{count:,}", left)
            shards = [[_write(*arrays, first) for arrays in zip(shard, block, strict=True)] for shard in shards]
            jax.block_until_ready(shards)
        for shard in shards:
            for array, all_of_kind in zip(shard, placed, strict=True):
                all_of_kind.append(array)

    def whole(shards):
        shape = (positions.size, *shards[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, sharding.BATCH), shards)

    return Batch(*map(whole, placed))


@partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, part: np.ndarray, first: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, part, first, axis=0)


def _share(size: int, image_bytes: int, batch_size: int, parts: int) -> tuple[int, int]:
    """Return the steps of a share, and how many images a device sends to another at a time; 0, 0 for one part."""
    steps = steps_per_epoch(size, batch_size)
    if parts == 1 or not steps:
        return 0, 0
    step_bytes = batch_size // parts * image_bytes
    most = min(steps, max(1, int(max(SHARE * size / parts * image_bytes, SMALL_SHARE) / step_bytes)))
    share_steps = -(-steps // -(-steps // most))  # shares of about the same size
    mean = share_steps * batch_size / parts**2
    return share_steps, math.ceil((mean + 3 * math.sqrt(mean)) / ROUNDS)


def _on_mesh(function: Callable, mesh: Mesh, *specs, donated: int | None = None) -> Callable:
    """Return a jitted function as each device computes it, of arrays with these partitions and of an integer."""
    sharded = jax.shard_map(function, mesh=mesh, in_specs=(*specs, sharding.REPLICATED), out_specs=sharding.BATCH)
    return jax.jit(sharded, donate_argnums=() if donated is None else donated)


def _permutation(key, epoch, size):
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def _take(batch_size, rows, order, step):
    chosen = lax.dynamic_slice(order, (step * batch_size,), (batch_size,))
    return jax.tree.map(lambda x: x[chosen], rows)


def _slicer(mesh, batch_size):
    """Return a function of examples, each device's part of some batches, and of the number of a batch."""
    size = batch_size // mesh.shape[sharding.DATA]
    return _on_mesh(
        lambda rows, i: jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size), rows), mesh, sharding.BATCH
    )


def _fetch(batch_size, in_epoch, capacity, rows, order, share, index):
    """Return a share of an epoch: on each device, its parts of the batches of some consecutive steps.

    Every device knows the order, so each computes what it sends and where it puts what it receives. In a round every
    device sends at most `capacity` images to every other; there are as many rounds as the pair with the most needs.

    Args:
      in_epoch: images of an epoch.
      rows: the images that this device holds.
      order: of all images in the epoch.
      share: the memory of the result.
      index: the number of the share in the epoch.
    """
    parts, device = lax.axis_size(sharding.DATA), lax.axis_index(sharding.DATA)
    held, size = len(rows.labels), len(share.labels)
    slots = jnp.arange(size * parts)  # places in the batches of the share, in their order
    positions = index * len(slots) + slots
    images = order[jnp.minimum(positions, len(order) - 1)]
    step, row = slots // batch_size, slots % batch_size
    part = batch_size // parts
    place = step * part + row % part  # on the device that needs it
    pair = jnp.where(positions < in_epoch, images // held * parts + row // part, parts**2)  # from and to
    by_pair = jnp.argsort(pair, stable=True)
    starts = jnp.searchsorted(pair[by_pair], jnp.arange(parts**2 + 1))
    counts = jnp.diff(starts)

    def slots_of(pairs, turn):
        """Return the slots [D, capacity] of a round, and which of them exist."""
        numbers = turn * capacity + jnp.arange(capacity)
        chosen = by_pair[jnp.minimum(starts[pairs][:, None] + numbers, len(slots) - 1)]
        return chosen, numbers < counts[pairs][:, None]

    def exchange(turn, share):
        sent, _ = slots_of(device * parts + jnp.arange(parts), turn)
        local = jnp.clip(images[sent] - device * held, 0, held - 1)
        received, exist = slots_of(jnp.arange(parts) * parts + device, turn)
        nowhere = size + jnp.arange(received.size).reshape(received.shape)  # beyond the end, where nothing is written
        target = jnp.where(exist, place[received], nowhere)

        def move(share, rows):
            arrived = lax.all_to_all(rows[local], sharding.DATA, 0, 0)
            return share.at[target].set(arrived, mode="drop", unique_indices=True)

        return jax.tree.map(move, share, rows)

    return lax.fori_loop(0, -(-jnp.max(counts) // capacity), exchange, share)
