"""A data set too large for memory: batches read from ArrayRecord and decoded in worker processes, by Grain."""

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import sys
from collections import deque
from collections.abc import Iterator

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
MAX_WORKERS = 16  # each holds up to four batches in shared memory


class _Decoder:
    """Some rows of a batch, read and decoded: what a worker does, with a copy of this object."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, rows: np.ndarray | slice):
        # TFDS would parse a record in 37 µs of Python; the file and the label alone are read in 3 (one core).
        self.records = data.open_source(builder, split).data_source
        self.name, self.shape, self.rows = f"{builder.data_path}, {split}", data.image_shape(builder), rows

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [rows, H, W, C] and labels int32 [rows]; a place beyond the end is black and has label −1."""
        places = places[self.rows].tolist()
        shape, labels = (len(places), *self.shape), np.full(len(places), -1, np.int32)
        worker = multiprocessing.parent_process() is not None
        result = grain.multiprocessing.SharedMemoryArray(shape, np.uint8) if worker else np.zeros(shape, np.uint8)
        images = result.view(np.ndarray)
        for image, i, place in zip(images, range(len(places)), places, strict=True):
            if place < len(self.records):
                try:
                    feature = tf_example_pb2.Example.FromString(self.records[place]).features.feature
                    decode(feature["image"].bytes_list.value[0], image)
                    labels[i] = feature["label"].int64_list.value[0]
                except Exception as error:  # whatever the damage makes the reader or the decoder raise
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    raise DataError(
                        f"{self.name}: example {place} cannot be read ({reason}); restore its file, or prepare the "
                        "data set again"
                    ) from None
        return result, labels


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


def _decoded(places: grain.MapDataset, decoder: _Decoder, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the decoder makes of each array of places, in their order, made ahead in processes.

    Raises:
      DataError: an example that cannot be read, or a worker that died.
    """
    workers = min(workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS), len(places))
    if len(places) == 1:  # one batch is decoded sooner than a process starts
        workers = 0
    if not FLAGS.is_parsed():  # outside of `main`: Grain has flags of its own, and asks for them
        FLAGS.mark_as_parsed()
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"  # it says that it frees what was left
    sys.warnoptions += [] if quiet in sys.warnoptions else [quiet]
    here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    elsewhere = grain.MultiprocessingOptions(num_workers=workers)
    iterator = iter(places.map(decoder).to_iter_dataset(here).mp_prefetch(elsewhere, _start_worker))
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # workers start with it
        try:
            first = next(iterator)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield first
        yield from iterator
    except RuntimeError as error:
        if not (code := re.search(r"exit code (-?\d+)", str(error))):
            raise
        reason = {-7: "/dev/shm is full", -9: "killed, for want of memory perhaps"}.get(int(code[1]), code[0])
        raise DataError(
            f"a process that decodes images died ({reason}); the same command goes on from the last checkpoint, "
            f"config.loader_workers below {workers} needs less memory"
        ) from None
    finally:
        iterator.close()


def _in_order(size: int, batch_size: int) -> grain.MapDataset:
    return grain.MapDataset.range(-(-size // batch_size) * batch_size).batch(batch_size)


def _on_devices(decoded: Iterator[tuple[np.ndarray, np.ndarray]], batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches split over the mesh, from this process's rows of them; `AHEAD` of them wait on the devices."""
    there, rows = NamedSharding(mesh, sharding.BATCH), _rows(mesh, batch_size)

    def place(array):
        def part(index):
            wanted = np.arange(batch_size)[index[0]]
            first = np.searchsorted(rows, wanted[0])
            return array[first : first + len(wanted)]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), there, part)

    waiting = deque()
    with contextlib.closing(decoded):
        for images, labels in decoded:
            waiting.append(Batch(place(images), place(labels)))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


def _rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that lie on devices of this process."""
    parts = NamedSharding(mesh, sharding.BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for (index,) in parts]))


class StreamedData:
    """A large training set; as `data.DeviceData`, each epoch in another order, of Grain's shuffle.

    A batch is a function of the run's key and the step alone, so the step of a checkpoint is the position in the data,
    and the number of workers or processes has no part in it.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, batch_size: int, mesh: Mesh, workers: int = 0):
        """`workers` are the processes that decode; 0: one a core, and at most `MAX_WORKERS`."""
        self.size, self.batch_size, self.mesh, self.workers = data.split_size(builder, split), batch_size, mesh, workers
        self.steps_per_epoch = self.size // batch_size  # what is left over comes up in another epoch
        self._decoder = _Decoder(builder, split, _rows(mesh, batch_size))
        self._next, self._batches = -1, None

    def batch(self, key: jax.Array, step: int) -> Batch:
        """The batch of a step, split over the mesh; steps in a row come ahead of their time.

        Raises:
          DataError: an example that cannot be read, or a worker that died.
        """
        if step != self._next:
            self.close()
            seed = int(jax.random.bits(key))
            places = grain.MapDataset.range(self.size).shuffle(seed)[: self.steps_per_epoch * self.batch_size]
            places = places.repeat().batch(self.batch_size)[step:]
            decoded = _decoded(places, self._decoder, self.workers)
            self._batches = _on_devices(decoded, self.batch_size, self.mesh)
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
        self._decoder = _Decoder(builder, split, _rows(mesh, batch_size))

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        decoded = _decoded(_in_order(self.size, self.batch_size), self._decoder, self.workers)
        return _on_devices(decoded, self.batch_size, self.mesh)


def images(builder: tfds.core.DatasetBuilder, split: str, workers: int = 0) -> Iterator[np.ndarray]:
    """All images of a split in their order, uint8 [some, H, W, C]."""
    decoder = _Decoder(builder, split, slice(None))
    for some, labels in _decoded(_in_order(data.split_size(builder, split), 128), decoder, workers):
        yield some[labels >= 0]
