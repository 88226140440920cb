"""Protocol buffers' wire format, read in place: Caffe's and ONNX's files are too large to be in memory twice.

The library protobuf holds the file, its parsed message and a copy of each array; here an array stays in the file until
it is converted.
"""

import struct
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.weights.description import WeightsError
from alexnet_jax.weights.stored import Region, Stored, stored

MAX_FIELDS = 100_000  # of a message and those inside it; AlexNet's files have a thousand
MAX_NUMBERS = 100  # of a packed field
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Message(NamedTuple):
    """The fields of a message by number: integers, bytes of a fixed size, or regions."""

    fields: dict[int, list[Any]]
    left: list[int]  # the fields that may still be read, shared by all messages of a file

    def number(self, field: int, default: int = 0) -> int:
        """Return the last integer of a field."""
        return next((x for x in reversed(self.fields.get(field, [])) if isinstance(x, int)), default)

    def numbers(self, field: int) -> list[int]:
        """Return the integers of a repeated field, packed or not."""
        numbers: list[int] = []
        for x in self.fields.get(field, []):
            numbers += [x] if isinstance(x, int) else _varints(x) if isinstance(x, Region) else []
        return numbers

    def float(self, field: int, default: float) -> float:
        """Return the last float of a field."""
        values = [x for x in self.fields.get(field, []) if isinstance(x, bytes) and len(x) == 4]
        return struct.unpack("<f", values[-1])[0] if values else default

    def text(self, field: int) -> str:
        """Return the last string of a field, of at most 200 bytes, or ""."""
        regions = self.regions(field)
        return regions[-1].bytes(0, min(200, regions[-1].size)).decode("utf-8", "replace") if regions else ""

    def regions(self, field: int) -> list[Region]:
        """Return the length-delimited values of a field."""
        return [x for x in self.fields.get(field, []) if isinstance(x, Region)]

    def messages(self, field: int) -> "list[Message]":
        """Return the messages of a field."""
        return [read_message(x, self.left) for x in self.regions(field)]

    def array(self, field: int, dtype: np.dtype, shape: tuple[int, ...]) -> Stored:
        """Return a packed field as an array; raises WeightsError for another size, or several parts."""
        regions = self.regions(field)
        if len(regions) != 1 or len(self.fields[field]) != 1:
            raise WeightsError("an array is not stored in one piece: it is corrupt, or its floats are not packed")
        return stored(regions[0], dtype, shape)


def read_message(region: Region, left: list[int] | None = None) -> Message:
    """Return the fields of a message, without those inside it.

    Args:
      left: of the message around it.

    Raises:
      WeightsError: not a message, a truncated one, or one of too many fields.
    """
    fields: dict[int, list[Any]] = {}
    left = [MAX_FIELDS] if left is None else left
    position = 0
    while left[0] > 0:
        if position == region.size:
            return Message(fields, left)
        left[0] -= 1
        key, position = _varint(region, position)
        kind = key & 7
        value: Any
        if kind == VARINT:
            value, position = _varint(region, position)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
            value, position = region.bytes(position, size), position + size
        elif kind == BYTES:
            size, position = _varint(region, position)
            value, position = region.part(position, size), position + size
        else:
            raise WeightsError("not a protocol buffer, or a corrupt one")
        fields.setdefault(key >> 3, []).append(value)
    raise WeightsError(f"it has more than {MAX_FIELDS:,} fields; no AlexNet has as many")


def _varint(region: Region, position: int) -> tuple[int, int]:
    """Return the integer at a position, and the position after it."""
    value = 0
    for i, byte in enumerate(region.bytes(position, min(10, region.size - position))):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, position + i + 1
    raise WeightsError("it is truncated or corrupt: an integer does not end")


def _varints(region: Region) -> list[int]:
    numbers: list[int] = []
    position = 0
    while position < region.size and len(numbers) < MAX_NUMBERS:
        value, position = _varint(region, position)
        numbers.append(value)
    return numbers
