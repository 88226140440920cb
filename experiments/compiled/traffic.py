"""The bytes that each operation of a compiled program reads and writes, an upper bound: all of every operand counts.

An operation of the entry computation is a fusion, a library call or a kernel; what it keeps on the chip is not counted.
The operations of a loop's body count once per trip.
"""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from alexnet_jax.model import LAYERS

BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "partition-id", "iota"}
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](?:{{([^}}]*)}})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INPUT, UPDATE, OTHER = "input", "update", "other"


class Operation(NamedTuple):
    """One operation: its bytes and its layer."""

    name: str
    kind: str  # the opcode, or the library call
    layer: str  # conv1 … fc8, "input", "update" or "other"
    backward: bool
    read: int
    written: int
    trips: int
    op_name: str

    @property
    def bytes(self) -> int:
        return (self.read + self.written) * self.trips


def shape_bytes(shape: str) -> int:
    """Return the bytes of an array's or a tuple's shape, as HLO writes it; a TPU's tiles are counted whole."""
    return sum(_array_bytes(*array) for array in _ARRAY.findall(shape))


def _array_bytes(dtype: str, sizes: str, layout: str) -> int:
    dims = [int(size) for size in sizes.split(",") if size]
    order = [int(axis) for axis in layout.partition(":")[0].split(",") if axis.strip().isdigit()]
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if tile and len(order) == len(dims) > 0:  # the minor axes are padded to the first tile's multiples
        for axis, side in zip(order, reversed([int(side) for side in tile.group(1).split(",")]), strict=False):
            dims[axis] = -(-dims[axis] // side) * side
    return prod(dims) * BYTES[dtype]


def operations(text: str) -> list[Operation]:
    """Return the operations of an optimized HLO module, in the order of the program."""
    computations = dict(_computations(text))
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    return list(_of_computation(computations, entry, 1))


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    name, is_entry, lines = "", False, []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            is_entry, name, lines = bool(start.group(1)), start.group(2), []
        elif line.startswith("}"):
            yield name, (is_entry, lines)
        elif name:
            lines.append(line)


def _of_computation(computations, name: str, trips: int) -> Iterator[Operation]:
    shapes = {}
    for line in computations[name][1]:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        operation, shape, opcode, rest = match.groups()
        shapes[operation] = shape
        if opcode in _FREE or opcode.endswith("-done"):  # an asynchronous operation is counted at its start
            continue
        if body := re.search(r"body=%?([\w.\-]+)", rest):
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            yield from _of_computation(computations, body.group(1), trips * int(count.group(1) if count else 1))
            continue
        operands = [name for name in re.findall(r"%?([\w.\-]+)", rest.partition("), ")[0]) if name in shapes]
        target, op_name = (re.search(rf'{key}="([^"]*)"', rest) for key in ("custom_call_target", "op_name"))
        scope = op_name.group(1) if op_name else ""
        yield Operation(
            operation, target.group(1) if target else opcode, *_place(scope),
            sum(shape_bytes(shapes[name]) for name in operands), shape_bytes(shape), trips, scope,
        )  # fmt: skip


def _place(op_name: str) -> tuple[str, bool]:
    """Return the layer of an operation, and whether it belongs to the backward pass."""
    words, backward = re.findall(r"\w+", op_name), "transpose(" in op_name
    layer = next((word for word in words if word in LAYERS), None)
    if layer:
        return layer, backward
    if "AlexNet" in words:
        return OTHER, backward
    return (UPDATE if words and words[-1] in ("add", "sub", "mul", "convert_element_type") else INPUT), False
