"""Data sets of TFDS: opened, read into memory, and split into batches.

`data.streaming` and `data.dataset`, which imports it, are imported by their names: they need Grain.
"""

from alexnet_jax.data.batch import Batch
from alexnet_jax.data.in_memory import DeviceBatches, DeviceData, Examples, load
from alexnet_jax.data.source import DataError, image_shape, open_builder, split_size

__all__ = [
    "Batch",
    "DataError",
    "DeviceBatches",
    "DeviceData",
    "Examples",
    "image_shape",
    "load",
    "open_builder",
    "split_size",
]
