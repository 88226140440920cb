"""What each operation of a compiled program reads and writes in the device's memory.

The unit is an operation of the entry computation: a fusion, a library call, a kernel. What happens inside of it stays
on the chip, and so does an array in a TPU's vector memory (a memory space other than 0). Every operand counts whole,
except one that a fusion only slices, which counts as the slices, and one that is updated in place, which counts as the
update. An asynchronous operation is counted at its start. The operations of a loop's body count once a trip.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from math import prod
from typing import NamedTuple

from alexnet_jax.model import LAYERS

BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_FREE = {
    "parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "opt-barrier", "add-dependency", "ConcatBitcast", "AllocateBuffer",
}  # fmt: skip
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](?:{{([^}}]*)}})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INPUT, DROPOUT, METRICS, UPDATE, OTHER = "input", "dropout", "metrics", "update", "other"
PLACES = (INPUT, *LAYERS, DROPOUT, METRICS, UPDATE, OTHER)


class Operation(NamedTuple):
    """One operation: its bytes, and what it belongs to."""

    name: str
    kind: str  # the opcode, or the library call
    layer: str  # one of PLACES
    backward: bool
    read: int
    written: int
    trips: int
    op_name: str
    shape: str  # of its result, as HLO writes it
    while_concurrent: int = 0  # of an asynchronous operation: the operations between its start and its end

    @property
    def bytes(self) -> int:
        return (self.read + self.written) * self.trips


class _Instruction(NamedTuple):
    root: bool
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def op_name(self) -> str:
        return _quoted("op_name", self.rest)

    @property
    def kind(self) -> str:
        return _quoted("custom_call_target", self.rest) or self.opcode

    def called(self, key: str) -> str:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else ""


def shape_bytes(shape: str, on_chip: bool = False) -> int:
    """Return the bytes of an array's or a tuple's shape, as HLO writes it; a TPU's tiles are counted whole.

    Args:
      on_chip: whether arrays in the chip's own memory count too.
    """
    return sum(_array_bytes(*array) for array in _ARRAY.findall(shape) if on_chip or not _space(array[2]))


def _space(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found.group(1)) if found else 0


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
    program = _Program(text)
    return program.count(program.entry, 1)


def loops_and_gathers(text: str) -> dict[str, int]:
    """Return how many `while` loops, gathers of images and float32 images or activations a program has.

    An image or activation is an array of four axes or more with at least 2^20 elements; one in a TPU's vector memory
    counts too. Only arrays that leave an operation count, not what a fusion computes on the way.
    """
    program = _Program(text)
    counts = {"while": 0, "image gathers": 0, "float32 activations": 0}
    for name in program.reachable(program.entry):
        for x in program.computations[name]:
            counts["while"] += x.opcode == "while"
            arrays = [(dtype, [int(n) for n in sizes.split(",") if n]) for dtype, sizes, _ in _ARRAY.findall(x.shape)]
            large = [dtype for dtype, sizes in arrays if len(sizes) >= 4 and prod(sizes) >= 2**20]
            if x.opcode not in ("get-tuple-element", "tuple", "bitcast", "parameter", "while", "opt-barrier"):
                counts["float32 activations"] += large.count("f32") * (not x.opcode.endswith("-done"))
            inside = program.computations.get(x.called("calls"), ())
            gathers = {x.opcode, *(i.opcode for i in inside)} & {"gather"}
            counts["image gathers"] += bool(gathers) and bool(large)
    return counts


class _Program:
    """The computations of a module, each a list of instructions."""

    def __init__(self, text: str):
        self.entry, self.computations, self.parents = "", {}, {}
        current: list[_Instruction] = []
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                current = self.computations[start.group(2)] = []
                self.entry = start.group(2) if start.group(1) else self.entry
            elif found := _INSTRUCTION.match(line):
                root, name, shape, opcode, rest = found.groups()
                operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
                current.append(_Instruction(bool(root), name, shape, opcode, tuple(operands), rest))

    @cached_property
    def instructions(self) -> dict[str, _Instruction]:
        return {x.name: x for instructions in self.computations.values() for x in instructions}

    @cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        users: dict[str, list[_Instruction]] = {}
        for x in self.instructions.values():
            for operand in x.operands:
                users.setdefault(operand, []).append(x)
        return users

    def reachable(self, name: str) -> list[str]:
        """Return a computation and the loops' bodies and branches that it runs, in that order."""
        bodies = [x.called(key) for x in self.computations[name] for key in ("body", "to_apply")
                  if x.opcode in ("while", "call")]  # fmt: skip
        return [name, *(inner for body in bodies if body for inner in self.reachable(body))]

    def count(self, name: str, trips: int) -> list[Operation]:
        counted, started, ended = [], {}, {}
        for x in self.computations[name]:
            if x.opcode == "while":
                counted += self.count(x.called("body"), trips * self._trips(x))
            elif x.opcode == "call":
                counted += self.count(x.called("to_apply"), trips)
            elif x.opcode.endswith("-done"):
                ended[x.operands[0]] = len(counted)
            elif x.kind not in _FREE:
                if x.opcode.endswith("-start"):
                    started[x.name] = len(counted)
                op_name = self._op_name(x)
                counted.append(
                    Operation(x.name, x.kind, *place(op_name), *self._bytes(x), trips, op_name, self._result(x))
                )
        for start, index in started.items():
            counted[index] = counted[index]._replace(while_concurrent=max(ended.get(start, index) - index - 1, 0))
        return counted

    def _trips(self, loop: _Instruction) -> int:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known.group(1))
        condition = self.computations[loop.called("condition")]
        constants = [re.match(r"(\d+)\)", x.rest) for x in condition if x.opcode == "constant"]
        return max([int(found.group(1)) for found in constants if found], default=1)  # i < constant, from 0 by 1

    def _op_name(self, x: _Instruction) -> str:
        """Return an instruction's own op_name, or that of what it computes, of its producer or of its first user."""
        if x.op_name:
            return x.op_name
        inside = [i.op_name for i in self.computations.get(x.called("calls"), ()) if i.op_name]
        producers = [self.instructions[name].op_name for name in x.operands if name in self.instructions]
        near, users = [], [x]
        for _ in range(3):  # through a copy's end and a tuple's element
            users = [user for instruction in users for user in self.users.get(instruction.name, ())]
            near += [user.op_name for user in users]
        return next(filter(None, (*reversed(inside), *near, *producers)), "")

    def _result(self, x: _Instruction) -> str:
        """Return the shape that an operation writes; of an asynchronous one, that of its end."""
        done = next((user for user in self.users.get(x.name, ()) if user.opcode.endswith("-done")), None)
        return done.shape if x.opcode.endswith("-start") and done else x.shape

    def _bytes(self, x: _Instruction) -> tuple[int, int]:
        """Return the bytes read and written."""
        shapes = [self.instructions[name].shape if name in self.instructions else "" for name in x.operands]
        read, result = [shape_bytes(shape) for shape in shapes], self._result(x)
        written = shape_bytes(result)
        inside = self.computations.get(x.called("calls"), [])
        opcode = x.opcode.removesuffix("-start")
        if opcode in ("slice", "dynamic-slice", "gather") and not inside:
            read[0] = min(read[0], shape_bytes(result, on_chip=True))
        elif opcode == "dynamic-update-slice":
            read[0], written = 0, min(written, shape_bytes(shapes[1], on_chip=True))
        parameters = [i for i in inside if i.opcode == "parameter"]
        for parameter in parameters:
            number = int(re.match(r"(\d+)\)", parameter.rest).group(1))
            if number < len(read):
                read[number] = min(read[number], self._of_parameter(parameter))
        for update in self._in_place(inside):
            whole, part = (self.instructions[name].shape for name in (update.name, update.operands[1]))
            if not _space(whole):
                written -= min(written, shape_bytes(whole)) - shape_bytes(part, on_chip=True)
        return sum(read), max(written, 0)

    def _of_parameter(self, parameter: _Instruction) -> int:
        """Return the bytes that a fusion reads of a parameter, if it only slices it or updates it in place."""
        total, pending = 0, [parameter]
        while pending:
            x = pending.pop()
            for user in self.users.get(x.name, ()):
                if user.opcode == "bitcast":
                    pending.append(user)
                elif user.opcode in ("slice", "dynamic-slice") and user.operands[0] == x.name:
                    total += shape_bytes(user.shape, on_chip=True)
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != x.name:
                    return shape_bytes(parameter.shape, on_chip=True)
        return total

    def _in_place(self, inside: Iterable[_Instruction]) -> list[_Instruction]:
        """Return the updates in place among a fusion's results."""
        root = next((i for i in inside if i.root), None)
        results = [] if root is None else [root]
        if root is not None and root.opcode == "tuple":
            results = [self.instructions[name] for name in root.operands]
        return [i for i in results if i.opcode == "dynamic-update-slice"]


def _quoted(key: str, text: str) -> str:
    found = re.search(rf'{key}="([^"]*)"', text)
    return found.group(1) if found else ""


def place(op_name: str) -> tuple[str, bool]:
    """Return the layer of an operation, one of PLACES, and whether it belongs to the backward pass."""
    words, backward = re.findall(r"\w+", op_name), "transpose(" in op_name
    layer = next((word for word in words if word in LAYERS), None)
    if layer and {"dropout", "fold_in", "_threefry_fold_in", "_bernoulli", "example_keys"} & set(words):
        return DROPOUT, backward
    if layer:
        return layer, backward
    scopes = {"metrics": METRICS, "optimizer": UPDATE, "preprocess": INPUT}
    return next((name for scope, name in scopes.items() if scope in words), OTHER), backward and "metrics" not in words
