"""Streaming input pipeline for data sets larger than memory: ArrayRecord files, decoded by Grain's worker processes."""

import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing import resource_tracker, shared_memory
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl.flags import FLAGS
from jax.sharding import Mesh, NamedSharding
from tensorflow_datasets.proto import tf_example_pb2

from alexnet_jax import sharding
from alexnet_jax.data.batch import Batch, steps_per_epoch
from alexnet_jax.data.images import decode
from alexnet_jax.data.source import (
    DataError,
    check_first_label,
    check_labels,
    image_shape,
    open_source,
    split_size,
    unreadable,
)
from alexnet_jax.preprocess import Statistics, measure
from alexnet_jax.runtime.files import raise_open_files_limit
from alexnet_jax.runtime.imports import import_quietly
from alexnet_jax.runtime.workers import MAIN_GUARD, available_cores, kill, start_worker, started_workers

grain = import_quietly("grain")

AHEAD = 2  # batches on the devices beyond the one that is requested
MAX_WORKERS = 16
PART_BYTES = 128 * 256 * 256 * 3  # a worker decodes up to so much at a time: 128 images of 256×256
SHARED_MEMORY = Path("/dev/shm")
READ = 128  # images that a worker reads at a time for a split that is kept in memory
EXIT_S = 1  # a worker that reads or decodes for longer is killed at the end

log = logging.getLogger(__name__)


class _Buffer:
    """Ordinary memory for one part of a batch, which this process decodes itself."""

    def __init__(self, shape: tuple[int, ...]):
        """Take the shape of a part."""
        self._images = np.empty(shape, np.uint8)

    def __getitem__(self, part: int) -> np.ndarray:
        """Return the memory, uint8 [rows, H, W, C], the same for every part."""
        return self._images

    wait = __getitem__

    def free(self, part: int) -> None:
        """Do nothing; nobody waits."""

    def release(self) -> None:
        """Do nothing; nobody waits."""

    def close(self) -> None:
        """Do nothing; the memory is freed with its last array."""


class _Buffers:
    """A ring of shared memory for a few parts of batches.

    With new memory for each part the system would zero and map all of its pages, in the worker and in this process.
    """

    def __init__(self, shape: tuple[int, ...], count: int, name: str | None = None):
        """Create `count` buffers of one part each; `name` is that of the memory if it exists.

        Raises:
          OSError: /dev/shm is full.
        """
        header = count * np.dtype(np.int64).itemsize
        self._memory = shared_memory.SharedMemory(name, name is None, header + count * math.prod(shape))
        self._free_for = np.ndarray(count, np.int64, self._memory.buf)  # the part that each buffer is free for
        self._images = np.ndarray((count, *shape), np.uint8, self._memory.buf, header)
        if name is None:
            if SHARED_MEMORY.exists():  # writing to a page that cannot be allocated ends the process
                try:
                    with open(SHARED_MEMORY / self._memory.name, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, self._memory.size)
                except OSError:
                    self.close()
                    raise
            self._free_for[:] = np.arange(count)

    def __reduce__(self):
        return _Buffers, (self._images.shape[1:], len(self._free_for), self._memory.name)

    def __getitem__(self, part: int) -> np.ndarray:
        """Return the memory of a part, uint8 [rows, H, W, C]."""
        return self._images[part % len(self._images)]

    def wait(self, part: int) -> np.ndarray:
        """Return the memory of a part as soon as the previous part in it has been used."""
        while self._free_for[part % len(self._free_for)] < part:
            time.sleep(0.005)
        return self[part]

    def free(self, part: int) -> None:
        """Release the memory of a part for the next one."""
        self._free_for[part % len(self._free_for)] = part + len(self._free_for)

    def release(self) -> None:
        """Let all waiting workers continue."""
        self._free_for[:] = np.iinfo(np.int64).max

    def close(self) -> None:
        """Unlink the memory; the system frees it when the last reference is gone."""
        self._free_for = self._images = None
        self._memory.unlink()
        with contextlib.suppress(BufferError):
            self._memory.close()


def _allocate(shape: tuple[int, ...], workers: int) -> tuple[_Buffers | _Buffer, int]:
    """Return memory for the parts of batches, and how many workers it is for: fewer if /dev/shm is full."""
    for count in range(workers, 0, -1):
        with contextlib.suppress(OSError):
            return _Buffers(shape, 2 * count), count
    return _Buffer(shape), 0


class Shuffled:
    """The positions of a step's batch in a split: a permutation each epoch, whose remainder is dropped."""

    def __init__(self, size: int, batch_size: int, seed: int):
        """Store the sizes of the split and of a batch, and the seed of the permutations."""
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, -1

    def __call__(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, steps_per_epoch(self.size, self.batch_size))
        if epoch != self.epoch:  # Grain's own shuffle is slow
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.size)
        return self.order[batch * self.batch_size : (batch + 1) * self.batch_size]


def _in_order(batch_size: int, step: int) -> np.ndarray:
    return np.arange(step * batch_size, (step + 1) * batch_size)


class Decoder:
    """Reads and decodes parts of batches; each worker has a copy of this object."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, rows: np.ndarray | slice, labeled: bool = True):
        """Open a split; `rows` are those of each batch, and `labeled` whether an image without a label is an error."""
        if labeled:
            check_first_label(builder, split)
        self.records = open_source(builder, split).data_source  # without TFDS's parser, which is slow
        self.classes = builder.info.features["label"].num_classes if labeled else None
        self.name, self.folder, self.split = builder.name, str(builder.data_path), split
        self.shape, self.rows = image_shape(builder), rows
        self.part_size = max(1, PART_BYTES // math.prod(self.shape))  # rows

    def __call__(
        self, buffers: _Buffers | _Buffer, positions_of: Callable[[int], np.ndarray], parts: int, index: int, part: int
    ) -> np.ndarray:
        """Fill a buffer and return labels int32 [rows]; the padding is black and has label −1.

        Args:
          positions_of: gives the positions in the split of a step's batch.
          parts: the number of parts of a batch.
          index: the number of the part since the first step, which selects the buffer.
          part: the number of the part since step 0.
        """
        step, place = divmod(part, parts)
        positions = positions_of(step)[self.rows][place * self.part_size : (place + 1) * self.part_size].tolist()
        images, labels = buffers.wait(index)[: len(positions)], np.full(len(positions), -1, np.int32)
        for image, i, position in zip(images, range(len(positions)), positions, strict=True):
            if position < len(self.records):
                try:
                    feature = tf_example_pb2.Example.FromString(self.records[position]).features.feature
                    decode(feature["image"].bytes_list.value[0], image)
                    labels[i] = feature["label"].int64_list.value[0]
                except Exception as error:  # any exception of a corrupt file
                    raise unreadable(self.folder, self.split, position, error) from None
            else:
                image[:] = 0
        if self.classes and (examples := labels[np.less(positions, len(self.records))]).size:
            check_labels(examples, self.classes, self.name, self.split)
        return labels


def _start_worker(index: int, count: int) -> None:
    """Exit when the parent does; a worker calls this first."""
    start_worker()
    cv2.setNumThreads(1)
    raise_open_files_limit()  # ImageNet has 1,252 files, all of them open


def _start_resource_tracker() -> None:
    """Start Python's tracker of shared memory so that it frees, without a warning, the memory of a killed process."""
    options = sys.warnoptions.copy()
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")  # the tracker's process inherits it
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions[:] = options


def decoded_batches(
    steps: range, positions_of: Callable[[int], np.ndarray], decoder: Decoder, workers: int
) -> Generator[tuple[np.ndarray, np.ndarray]]:
    """Decode the batches of some steps, in their order, ahead of time in worker processes.

    Args:
      positions_of: gives the positions in the split of a step's batch.
      workers: processes; 0 for one per core, at most `MAX_WORKERS`.

    Yields:
      Images uint8 [rows, H, W, C], in memory that is overwritten after the next batch is requested, and labels.

    Raises:
      DataError: an example that cannot be read, or a worker that died.
    """
    rows = len(positions_of(steps[0])[decoder.rows])
    parts = -(-rows // decoder.part_size)
    wanted = min(workers or min(available_cores(), MAX_WORKERS), len(steps) * parts)
    if len(steps) == 1:  # to start a process takes longer than to decode one batch
        wanted = 0
    for name in FLAGS:
        if name.startswith("grain_"):  # Grain reads its own flags, which nobody may have parsed
            FLAGS[name].present = True
    _start_resource_tracker()
    buffers, workers = _allocate((min(rows, decoder.part_size), *decoder.shape), wanted)
    if workers < wanted:
        decoding = f"{workers} processes decode" if workers else "this process decodes"
        log.warning(
            "%s is full: %s images instead of %d workers; give it %d MB (docker run --shm-size)",
            SHARED_MEMORY, decoding, wanted, 4 * wanted * PART_BYTES // 10**6,
        )  # fmt: skip
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    worker_options = grain.MultiprocessingOptions(num_workers=workers)
    dataset = grain.MapDataset.range(steps.start * parts, min(steps.stop * parts, sys.maxsize))
    dataset = dataset.map_with_index(partial(decoder, buffers, positions_of, parts))
    iterator = iter(dataset.to_iter_dataset(read_options).mp_prefetch(worker_options, _start_worker))
    processes, started = [], False
    try:
        with started_workers() as processes:
            first = _first(iterator, workers)
        decoded = enumerate(itertools.chain([first.result()], iterator))
        started = True
        if parts == 1:
            for index, labels in decoded:
                yield buffers[index], labels
                buffers.free(index)
        else:
            images, all_labels = np.empty((rows, *decoder.shape), np.uint8), np.empty(rows, np.int32)
            for index, labels in decoded:
                start = index % parts * decoder.part_size
                images[start : start + len(labels)] = buffers[index][: len(labels)]
                all_labels[start : start + len(labels)] = labels
                buffers.free(index)
                if index % parts == parts - 1:
                    yield images, all_labels
    except RuntimeError as error:
        if not (code := re.search(r"exit code (-?\d+)", str(error))):
            raise
        if not started and int(code[1]) == 1:
            raise DataError(MAIN_GUARD) from None
        reason = {-7: "/dev/shm is full", -9: "killed (out of memory?)"}.get(int(code[1]), code[0])
        raise DataError(
            f"a process that decodes images died: {reason}; run the same command again to resume from the last "
            f"checkpoint (config.loader_workers below {workers} needs less memory)"
        ) from None
    finally:
        buffers.release()
        _close(iterator, processes)
        buffers.close()


def _first(iterator: Iterator[np.ndarray], workers: int) -> Future[np.ndarray]:
    """Return the first labels of an iterator, in the future, as soon as all of its workers have started.

    Grain starts them when the first element is requested, which then takes as long as they import the package. In
    another thread, that can be interrupted.
    """
    first: Future[np.ndarray] = Future()

    def fetch():
        try:
            first.set_result(next(iterator))
        except Exception as error:
            first.set_exception(error)

    processes = len(multiprocessing.active_children()) + workers
    threading.Thread(target=fetch, daemon=True).start()
    while not first.done() and len(multiprocessing.active_children()) < processes:
        time.sleep(0.01)
    return first


def _close(iterator: Any, workers: Sequence[BaseProcess]) -> None:
    """End the workers of an iterator; Grain would wait half a minute for each that does not answer."""
    closing = threading.Thread(target=iterator.close, daemon=True)
    closing.start()
    closing.join(EXIT_S)
    kill(workers)
    closing.join(EXIT_S)  # longer if a worker was killed while it had one of Grain's locks


def _on_devices(
    host_batches: Generator[tuple[np.ndarray, np.ndarray]], batch_size: int, mesh: Mesh
) -> Generator[Batch]:
    """Yield batches split over the mesh, from this process's rows of them; `AHEAD` of them wait on the devices."""
    batch_sharding, rows = NamedSharding(mesh, sharding.BATCH), _rows(mesh, batch_size)

    def place(array):
        shape, parts = (batch_size, *array.shape[1:]), []
        for device, (index, *_) in batch_sharding.addressable_devices_indices_map(shape).items():
            part = np.arange(batch_size)[index]
            first = np.searchsorted(rows, part[0])
            own = array[first : first + len(part)]
            if mesh.devices.flat[0].platform == "cpu":  # JAX uses aligned memory as it is, also with may_alias=False
                own = own.copy()
            parts.append(jax.device_put(own, device))
        return jax.make_array_from_single_device_arrays(shape, batch_sharding, parts)

    waiting: deque[Batch] = deque()
    with contextlib.closing(host_batches):
        for images, labels in host_batches:
            waiting.append(jax.block_until_ready(Batch(place(images), place(labels))))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


def _rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return the rows of a batch that are on devices of this process."""
    parts = NamedSharding(mesh, sharding.BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for (index,) in parts]))


class StreamedData:
    """A large training set with the interface of `data.DeviceData`: each epoch in another order.

    A batch is a function of the run's key and the step alone: the step of a checkpoint is the position in the data, and
    the number of workers or processes changes nothing.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, batch_size: int, mesh: Mesh, workers: int = 0):
        """Open a split; `workers` are the processes that decode, 0 for one per core and at most `MAX_WORKERS`."""
        self.builder, self.split, self.workers = builder, split, workers
        self.size, self.batch_size, self.mesh = split_size(builder, split), batch_size, mesh
        self.steps_per_epoch = steps_per_epoch(self.size, batch_size)
        self.image_shape = image_shape(builder)
        self._decoder = Decoder(builder, split, _rows(mesh, batch_size))
        self._next = -1
        self._batches: Generator[Batch] | None = None

    def batch(self, key: jax.Array, step: int) -> Batch:
        """Return the batch of a step, split over the mesh; consecutive steps are decoded ahead of time.

        Raises:
          DataError: an example that cannot be read, or a worker that died.
        """
        if step != self._next:
            self.close()
            positions_of = Shuffled(self.size, self.batch_size, int(jax.random.bits(key)))
            batches = decoded_batches(range(step, sys.maxsize), positions_of, self._decoder, self.workers)
            self._batches = _on_devices(batches, self.batch_size, self.mesh)
        self._next = step + 1
        return next(self._batches)

    def measure(self, colors: bool) -> Statistics:
        """Return the statistics of the images, which are all read; `colors` as in `preprocess.measure`."""
        return measure(images(self.builder, self.split, self.workers), colors)

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()
        self._next, self._batches = -1, None


class StreamedBatches:
    """A large split in its order with the interface of `data.DeviceBatches`; the last batch is padded, label −1."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, batch_size: int, mesh: Mesh, workers: int = 0):
        """Open a split; `workers` as in `StreamedData`."""
        self.size, self.batch_size, self.mesh, self.workers = split_size(builder, split), batch_size, mesh, workers
        self._decoder = Decoder(builder, split, _rows(mesh, batch_size))

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        batches = decoded_batches(range(len(self)), partial(_in_order, self.batch_size), self._decoder, self.workers)
        return _on_devices(batches, self.batch_size, self.mesh)


def read(
    builder: tfds.core.DatasetBuilder, split: str, positions: np.ndarray, workers: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the examples at some positions of a split, decoded by worker processes, as `in_memory.Source.read`."""
    steps = -(-len(positions) // READ)
    padded = np.append(positions, np.full(steps * READ - len(positions), np.iinfo(np.int64).max))
    batches = decoded_batches(range(steps), partial(_part_of, padded), Decoder(builder, split, slice(None)), workers)
    for start, (part, labels) in zip(range(0, len(positions), READ), batches, strict=True):
        yield part[: len(positions) - start], labels[: len(positions) - start]


def _part_of(positions: np.ndarray, step: int) -> np.ndarray:
    return positions[step * READ : (step + 1) * READ]


def images(builder: tfds.core.DatasetBuilder, split: str, workers: int = 0) -> Iterator[np.ndarray]:
    """Yield all images of a split in their order, in arrays uint8 [N, H, W, C]."""
    decoder, size = Decoder(builder, split, slice(None), labeled=False), split_size(builder, split)
    batches = decoded_batches(range(-(-size // 128)), partial(_in_order, 128), decoder, workers)
    for start, (part, _) in zip(range(0, size, 128), batches, strict=True):
        yield part[: size - start].copy()
