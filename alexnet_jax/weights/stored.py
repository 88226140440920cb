"""Arrays in a file that are not read yet: their sizes are checked against the file first."""

import io
import math
from typing import NamedTuple

import numpy as np

from alexnet_jax.weights.description import WeightsError

MAX_AXES = 8
File = io.BufferedReader | io.BytesIO


class Region(NamedTuple):
    """A part of a binary file: `size` bytes from `start`."""

    file: File
    start: int
    size: int

    def part(self, offset: int, size: int) -> "Region":
        """Return a part of this part; raises WeightsError if it does not lie in it."""
        if not 0 <= offset <= offset + size <= self.size:
            raise WeightsError("it is truncated or corrupt: a part lies beyond the end")
        return Region(self.file, self.start + offset, size)

    def bytes(self, offset: int, size: int) -> bytes:
        """Return some of the bytes; raises WeightsError if they do not lie in this part."""
        start = self.part(offset, size).start
        self.file.seek(start)
        content = self.file.read(size)
        if len(content) != size:
            raise WeightsError("it is truncated")
        return content


def whole(file: File) -> Region:
    """Return an open file, or a `BytesIO`, as one region."""
    return Region(file, 0, file.seek(0, 2))


class Stored(NamedTuple):
    """An array in a file; made by `stored`, which checks its size.

    Attributes:
      region: the elements, contiguous in the order of `shape`: C order.
      fortran: whether the array is in Fortran order: its axes are those of `shape` in reverse.
    """

    region: Region
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool = False

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the rows `start` to `stop` of the first axis of `shape`: all of them, unless given."""
        count = self.shape[0] if self.shape else 1
        rows = range(count)[start:stop]
        x = np.empty((len(rows), *self.shape[1:]) if self.shape else (), self.dtype)
        part = self.region.part(rows.start * (self.region.size // max(1, count)), x.nbytes)
        self.region.file.seek(part.start)
        if self.region.file.readinto(x.reshape(-1).view(np.uint8).data) != x.nbytes:
            raise WeightsError("it is truncated")
        return x

    def reshaped(self, *shape: int) -> "Stored":
        """Return it with another shape; raises WeightsError if that has another number of elements."""
        return stored(self.region, self.dtype, shape, self.fortran)


def stored(region: Region, dtype: np.dtype, shape: tuple[int, ...], fortran: bool = False) -> Stored:
    """Return a region as an array; raises WeightsError if the shape does not match the region's size."""
    sizes = len(shape) <= MAX_AXES and all(isinstance(n, int) and 0 <= n <= region.size for n in shape)
    if not sizes or math.prod(shape) * dtype.itemsize != region.size:
        text = "×".join(map(str, shape[:MAX_AXES]))[:80]
        raise WeightsError(f"an array of {text} {dtype} cannot take {region.size} bytes: it is corrupt")
    return Stored(region, dtype, tuple(shape), fortran)
