"""A data set too large for memory: batches read from ArrayRecord and decoded in worker processes, by Grain."""

import contextlib
import itertools
import math
import os
import re
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import shared_memory

import cv2
import grain
import jax
import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from absl.flags import FLAGS
from jax.sharding import Mesh, NamedSharding
from tensorflow_datasets.proto import tf_example_pb2

from alexnet_jax import data, sharding
from alexnet_jax.data import Batch, DataError
from alexnet_jax.workers import start_worker

AHEAD = 2  # batches on the devices beyond the one that is asked for
MAX_WORKERS = 16


class _Buffers:
    """Shared memory for a few batches of images, filled over and over.

    New memory for each batch would have all of its pages zeroed and mapped, in the worker and here.
    """

    def __init__(self, shape: tuple[int, ...], count: int, name: str | None = None):
        """`shape` is of one batch, `count` how many there are, `name` that of the memory if it exists."""
        turns = count * np.dtype(np.int64).itemsize
        self._memory = shared_memory.SharedMemory(name, name is None, turns + count * math.prod(shape))
        self._turn = np.ndarray(count, np.int64, self._memory.buf)  # the batch that each buffer is free for
        self._images = np.ndarray((count, *shape), np.uint8, self._memory.buf, turns)
        if name is None:
            self._turn[:] = np.arange(count)

    def __reduce__(self):
        return _Buffers, (self._images.shape[1:], len(self._turn), self._memory.name)

    def __getitem__(self, batch: int) -> np.ndarray:
        """The memory of a batch, uint8 [rows, H, W, C]."""
        return self._images[batch % len(self._images)]

    def wait(self, batch: int) -> np.ndarray:
        """The memory of a batch, as soon as the one before in it is used up."""
        while self._turn[batch % len(self._turn)] < batch:
            time.sleep(0.005)
        return self[batch]

    def free(self, batch: int) -> None:
        """Gives the memory of a batch to the next."""
        self._turn[batch % len(self._turn)] = batch + len(self._turn)

    def release(self) -> None:
        """Lets no worker wait any longer."""
        self._turn[:] = np.iinfo(np.int64).max

    def close(self) -> None:
        """Gives the memory back, now or when nothing points to it any more."""
        self._turn = self._images = None
        self._memory.unlink()
        with contextlib.suppress(BufferError):
            self._memory.close()


class Shuffled:
    """The places of a step's batch in the data set: each epoch another permutation, of which the end is left over."""

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, -1

    def __call__(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, self.size // self.batch_size)
        if epoch != self.epoch:  # Grain's own shuffle takes 140 µs an image, half of what decoding takes
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.size)
        return self.order[batch * self.batch_size : (batch + 1) * self.batch_size]


def _in_order(batch_size: int, step: int) -> np.ndarray:
    return np.arange(step * batch_size, (step + 1) * batch_size)


class Decoder:
    """Some rows of a batch, read and decoded: what a worker does, with a copy of this object."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, rows: np.ndarray | slice):
        # TFDS would parse a record in 37 µs of Python; the file and the label alone are read in 3 (one core).
        self.records = data.open_source(builder, split).data_source
        self.name, self.shape, self.rows = f"{builder.data_path}, {split}", data.image_shape(builder), rows

    def __call__(
        self, buffers: _Buffers, places_of: Callable[[int], np.ndarray], batch: int, step: int
    ) -> np.ndarray:
        """Fills the buffer of a batch; labels int32 [rows]. A place beyond the end is black and has label −1."""
        places = places_of(step)[self.rows].tolist()
        images, labels = buffers.wait(batch), np.full(len(places), -1, np.int32)
        for image, i, place in zip(images, range(len(places)), places, strict=True):
            if place < len(self.records):
                try:
                    feature = tf_example_pb2.Example.FromString(self.records[place]).features.feature
                    decode(feature["image"].bytes_list.value[0], image)
                    labels[i] = feature["label"].int64_list.value[0]
                except Exception as error:  # whatever the damage makes the reader or the decoder raise
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    raise DataError(
                        f"{self.name}: example {place} cannot be read ({reason}); restore its file, or delete "
                        "the folder and prepare the data set again"
                    ) from None
            else:
                image[:] = 0
        return labels


def decode(file: bytes, out: np.ndarray) -> None:
    """Decodes a JPEG or a PNG into `out`, uint8 [H, W, C].

    A 256×256 JPEG as `prepare` makes it takes simplejpeg (libjpeg-turbo) 0.25 ms, OpenCV 0.31 and Pillow 0.36 to 0.50
    (200 photographs, one core); a PNG is left to OpenCV.

    Raises:
      ValueError: not a whole image, or one of another shape.
    """
    grey = out.shape[2] == 1
    if file[:2] == b"\xff\xd8":
        height, width, *_ = simplejpeg.decode_jpeg_header(file)
        if (height, width) == out.shape[:2]:
            simplejpeg.decode_jpeg(file, "GRAY" if grey else "RGB", buffer=out)
    else:
        mode = cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB
        image = cv2.imdecode(np.frombuffer(file, np.uint8), mode) if file else None
        if image is None:
            raise ValueError("neither a JPEG nor a PNG")
        height, width = image.shape[:2]
        if (height, width) == out.shape[:2]:
            out[:] = image.reshape(out.shape)
    if (height, width) != out.shape[:2]:
        raise ValueError(f"it is {height}×{width}; expected {out.shape[0]}×{out.shape[1]}")


def _start_worker(index: int, count: int) -> None:
    """Leaves signals to the parent, which may be in one group with it, and does not outlive the parent."""
    start_worker()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(1)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # ImageNet has 1,252 files, all of them open


def decoded(
    steps: range, places_of: Callable[[int], np.ndarray], decoder: Decoder, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the decoder makes of the places of each step, in their order, made ahead in processes.

    Yields:
      Images uint8 [rows, H, W, C], in memory that is written again after the next is asked for, and labels.

    Raises:
      DataError: an example that cannot be read, or a worker that died.
    """
    workers = min(workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS), len(steps))
    if len(steps) == 1:  # one batch is decoded sooner than a process starts
        workers = 0
    if not FLAGS.is_parsed():  # outside of `main`: Grain has flags of its own, and asks for them
        FLAGS.mark_as_parsed()
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"  # it says that it frees what was left
    sys.warnoptions += [] if quiet in sys.warnoptions else [quiet]
    here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    elsewhere = grain.MultiprocessingOptions(num_workers=workers)
    rows = len(places_of(steps[0])[decoder.rows])
    buffers = _Buffers((rows, *decoder.shape), max(1, 2 * workers))
    dataset = grain.MapDataset.range(steps.start, steps.stop).map_with_index(partial(decoder, buffers, places_of))
    dataset = dataset.to_iter_dataset(here)
    iterator = iter(dataset.mp_prefetch(elsewhere, _start_worker))
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # workers start with it
        try:
            first = next(iterator)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for batch, labels in enumerate(itertools.chain([first], iterator)):
            yield buffers[batch], labels
            buffers.free(batch)
    except RuntimeError as error:
        if not (code := re.search(r"exit code (-?\d+)", str(error))):
            raise
        reason = {-7: "/dev/shm is full", -9: "killed, for want of memory perhaps"}.get(int(code[1]), code[0])
        raise DataError(
            f"a process that decodes images died ({reason}); the same command goes on from the last checkpoint, "
            f"config.loader_workers below {workers} needs less memory"
        ) from None
    finally:
        buffers.release()
        iterator.close()
        buffers.close()


def _on_devices(in_memory: Iterator[tuple[np.ndarray, np.ndarray]], batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches split over the mesh, from this process's rows of them; `AHEAD` of them wait on the devices."""
    there, rows = NamedSharding(mesh, sharding.BATCH), _rows(mesh, batch_size)

    def place(array):
        shape, parts = (batch_size, *array.shape[1:]), []
        for device, (index, *_) in there.addressable_devices_indices_map(shape).items():
            wanted = np.arange(batch_size)[index]
            first = np.searchsorted(rows, wanted[0])
            parts.append(jax.device_put(array[first : first + len(wanted)], device, may_alias=False))
        return jax.make_array_from_single_device_arrays(shape, there, parts)

    waiting = deque()
    with contextlib.closing(in_memory):
        for images, labels in in_memory:
            waiting.append(jax.block_until_ready(Batch(place(images), place(labels))))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


def _rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that lie on devices of this process."""
    parts = NamedSharding(mesh, sharding.BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for (index,) in parts]))


class StreamedData:
    """A large training set; as `data.DeviceData`, each epoch in another order.

    A batch is a function of the run's key and the step alone, so the step of a checkpoint is the position in the data,
    and the number of workers or processes has no part in it.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, batch_size: int, mesh: Mesh, workers: int = 0):
        """`workers` are the processes that decode; 0: one a core, and at most `MAX_WORKERS`."""
        self.size, self.batch_size, self.mesh, self.workers = data.split_size(builder, split), batch_size, mesh, workers
        self.steps_per_epoch = self.size // batch_size  # what is left over comes up in another epoch
        self._decoder = Decoder(builder, split, _rows(mesh, batch_size))
        self._next, self._batches = -1, None

    def batch(self, key: jax.Array, step: int) -> Batch:
        """The batch of a step, split over the mesh; steps in a row come ahead of their time.

        Raises:
          DataError: an example that cannot be read, or a worker that died.
        """
        if step != self._next:
            self.close()
            places_of = Shuffled(self.size, self.batch_size, int(jax.random.bits(key)))
            batches = decoded(range(step, sys.maxsize), places_of, self._decoder, self.workers)
            self._batches = _on_devices(batches, self.batch_size, self.mesh)
        self._next = step + 1
        return next(self._batches)

    def close(self) -> None:
        """Ends the workers."""
        if self._batches is not None:
            self._batches.close()
        self._next, self._batches = -1, None


class StreamedBatches:
    """A large set in its order, as `data.DeviceBatches`: the last batch is filled up with examples of label −1."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, batch_size: int, mesh: Mesh, workers: int = 0):
        self.size, self.batch_size, self.mesh, self.workers = data.split_size(builder, split), batch_size, mesh, workers
        self._decoder = Decoder(builder, split, _rows(mesh, batch_size))

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        batches = decoded(range(len(self)), partial(_in_order, self.batch_size), self._decoder, self.workers)
        return _on_devices(batches, self.batch_size, self.mesh)


def images(builder: tfds.core.DatasetBuilder, split: str, workers: int = 0) -> Iterator[np.ndarray]:
    """All images of a split in their order, uint8 [some, H, W, C]."""
    decoder = Decoder(builder, split, slice(None))
    steps = range(-(-data.split_size(builder, split) // 128))
    for some, labels in decoded(steps, partial(_in_order, 128), decoder, workers):
        yield some[labels >= 0]
