"""A prepared data set, in memory or streamed, with one interface for both."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jax.sharding import Mesh

from alexnet_jax.data import streaming
from alexnet_jax.data.in_memory import DeviceBatches, DeviceData, Examples, in_parts, load
from alexnet_jax.data.source import STATISTICS, check_features, check_first_label, check_labels, split_size

TrainData = DeviceData | streaming.StreamedData
Batches = DeviceBatches | streaming.StreamedBatches


@dataclass(frozen=True)
class Dataset:
    """A prepared data set of TFDS and how to read it.

    Attributes:
      builder: of TFDS, as `data.open_builder` returns it.
      streaming: read from files by worker processes; False: each split that is used is copied to every device.
      workers: the processes that decode what is streamed; 0 for one per core, at most 16.
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

    def images(self, split: str) -> Iterator[np.ndarray]:
        """Yield all images of a split in arrays uint8 [N, H, W, C]; raises DataError."""
        if self.streaming:
            yield from streaming.images(self.builder, split, self.workers)
        else:
            yield from in_parts(self.load(split).images)

    def training(self, split: str, batch_size: int, mesh: Mesh) -> TrainData:
        """Return a split in batches, each epoch in another order; raises DataError."""
        if self.streaming:
            return streaming.StreamedData(self.builder, split, batch_size, mesh, self.workers)
        return DeviceData(self._labeled(split), batch_size, mesh)

    def batches(self, split: str, batch_size: int, mesh: Mesh) -> Batches:
        """Return a split in its order, each example once; raises DataError."""
        if self.streaming:
            return streaming.StreamedBatches(self.builder, split, batch_size, mesh, self.workers)
        return DeviceBatches(self._labeled(split), batch_size, mesh)

    def _labeled(self, split: str) -> Examples:
        examples = self.load(split)
        check_labels(examples.labels, self.num_classes, self.builder.name, split)
        return examples
