"""A prepared data set, in memory or streamed, with one interface for both."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tensorflow_datasets as tfds
from jax.sharding import Mesh

from alexnet_jax import sharding
from alexnet_jax.data import in_memory, streaming
from alexnet_jax.data.in_memory import DeviceBatches, DeviceData, Examples, Source, load
from alexnet_jax.data.source import (
    STATISTICS,
    DataError,
    check_features,
    check_first_label,
    split_size,
    stored_shape,
)
from alexnet_jax.preprocess import Statistics, measure
from alexnet_jax.runtime.memory import free_bytes

TrainData = DeviceData | streaming.StreamedData
Batches = DeviceBatches | streaming.StreamedBatches

WORKERS_FROM = 2e9  # bytes of images that worker processes read faster than this process, which need not start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A prepared data set of TFDS and how to read it.

    Attributes:
      builder: of TFDS, as `data.open_builder` returns it.
      streaming: read from files by worker processes; False: each split that is used is divided over the
        devices' memory.
      workers: the processes that decode what is streamed, or large; 0 for one per core, at most 16.
    """

    builder: tfds.core.DatasetBuilder
    streaming: bool = False
    workers: int = 0

    def __post_init__(self):
        check_features(self.builder)

    @property
    def full_name(self) -> str:
        """The name with its version."""
        return self.builder.info.full_name

    @property
    def class_names(self) -> list[str]:
        """The names of the classes."""
        return self.builder.info.features["label"].names

    @property
    def num_classes(self) -> int:
        """The number of the classes."""
        return self.builder.info.features["label"].num_classes

    @property
    def statistics(self) -> Path:
        """The file of the training set's statistics, which only `alexnet_jax.prepare` writes."""
        return Path(self.builder.data_path) / STATISTICS

    def size(self, split: str) -> int:
        """Return the number of examples of a split, in TFDS's notation; raises DataError."""
        return split_size(self.builder, split)

    def check_labels(self, split: str) -> None:
        """Raise DataError if the first example of a split has no label."""
        check_first_label(self.builder, split)

    def load(self, split: str) -> Examples:
        """Return a split in memory; raises DataError."""
        return load(self.builder, split)

    def image_shape(self, split: str) -> tuple[int, ...]:
        """Return [H, W, C] of the images of a split; raises DataError."""
        return (streaming.image_shape if self.streaming else partial(stored_shape, split=split))(self.builder)

    def images(self, split: str) -> Iterator[np.ndarray]:
        """Yield all images of a split in arrays uint8 [N, H, W, C]; raises DataError."""
        if self.streaming:
            yield from streaming.images(self.builder, split, self.workers)
        else:
            yield from in_memory.in_parts(self.load(split).images)

    def measure(self, split: str, colors: bool) -> Statistics:
        """Return the statistics of a split; `colors` as in `preprocess.measure`; raises DataError."""
        return measure(self.images(split), colors)

    def check_memory(
        self, train_split: str, batch_size: int, validation_split: str, validation_batch: int, mesh: Mesh
    ) -> None:
        """Log the memory that both splits take on each device, unless they are streamed.

        Raises:
          DataError: it is more than what is free.
        """
        if self.streaming:
            return
        parts, image_bytes = mesh.shape[sharding.DATA], math.prod(self.image_shape(train_split))
        train = in_memory.train_bytes(self.size(train_split), image_bytes, batch_size, parts)
        needed = train + in_memory.ordered_bytes(self.size(validation_split), image_bytes, validation_batch, parts)
        free = free_bytes([device for device in mesh.devices.flat if device.process_index == jax.process_index()])
        what = f"{self.full_name}: {_size(needed)} of images on each of {mesh.size} devices"
        if free is not None and needed > free:
            raise DataError(
                f"{what}, which has {_size(free)} free; expected more devices (config.mesh.data), or "
                "--config.streaming=True"
            )
        log.info("%s%s", what, "" if free is None else f", of {_size(free)} that are free")

    def training(self, split: str, batch_size: int, mesh: Mesh) -> TrainData:
        """Return a split in batches, each epoch in another order; raises DataError."""
        if self.streaming:
            return streaming.StreamedData(self.builder, split, batch_size, mesh, self.workers)
        return DeviceData(self._source(split), batch_size, mesh)

    def batches(self, split: str, batch_size: int, mesh: Mesh) -> Batches:
        """Return a split in its order, each example once; raises DataError."""
        if self.streaming:
            return streaming.StreamedBatches(self.builder, split, batch_size, mesh, self.workers)
        return DeviceBatches(self._source(split), batch_size, mesh)

    def _source(self, split: str) -> Source:
        shape = self.image_shape(split)

        def read(positions):
            if len(positions) * math.prod(shape) < WORKERS_FROM or None in self.builder.info.features["image"].shape:
                return in_memory.read(self.builder, split, positions, labeled=True)
            return map(Examples._make, streaming.read(self.builder, split, positions, self.workers))

        return Source(f"{self.builder.name}, {split}", self.size(split), shape, read)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
