"""Read the collectives of a compiled program: the layer, the mesh axis and the bytes of each."""

import re
from collections import Counter
from itertools import combinations
from math import prod
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from alexnet_jax.model import LAYERS

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}  # the other types end in their size: f32, s8, u64

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Collective(NamedTuple):
    """One array that the devices of a group communicate."""

    kind: str  # one of KINDS
    layer: str  # conv1 … fc8; "metrics" for loss and error
    axis: str  # the mesh axes that the group spans, joined by "+"
    backward: bool
    array_bytes: int  # of the array after a gather, before a scatter, on each device of an all-reduce
    received: int  # bytes that reach each device when the group passes its parts around a ring

    @classmethod
    def make(cls, kind: str, layer: str, axis: str, backward: bool, array_bytes: int, parts: int) -> "Collective":
        once = array_bytes * (parts - 1) // parts
        received = {"all-reduce": 2 * once, "collective-permute": array_bytes}.get(kind, once)
        return cls(kind, layer, axis, backward, array_bytes, received)


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    operands: tuple[str, ...]
    op_name: str
    calls: str
    line: str


def _bytes(shape: str) -> int:
    """Return the bytes of an array's or a tuple's shape, as HLO writes it."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(dtype) or int(re.search(r"\d+$", dtype).group())
        total += bits // 8 * prod(int(s) for s in sizes.split(",") if s)
    return total


def _parse(text: str) -> tuple[dict[str, _Instruction], dict[str, list[str]]]:
    """Return all instructions by name, and the names in each computation."""
    instructions, computations, current = {}, {}, []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations.setdefault(start.group(1), [])
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            arguments = rest.partition("), ")[0] if "), " in rest else rest
            op_name = re.search(r'op_name="([^"]*)"', rest)
            calls = re.search(r"calls=%?([\w.\-]+)", rest)
            instructions[name] = _Instruction(
                shape, opcode, tuple(_OPERAND.findall(arguments)), op_name.group(1) if op_name else "",
                calls.group(1) if calls else "", rest,
            )  # fmt: skip
            current.append(name)
    return instructions, computations


def _named_layer(op_name: str) -> str | None:
    return next((word for word in re.findall(r"\w+", op_name) if word in LAYERS), None)


def _groups(line: str) -> list[frozenset[int]]:
    """Return the groups of device numbers of a collective; none stands for one group of all devices."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return [frozenset(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    if "replica_groups={}" in line:  # all devices as one group
        return []
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        axes = re.findall(r"'(\w+)'", named.group(2))
        numbers = np.arange(prod(sizes.values())).reshape(tuple(sizes.values()))
        numbers = np.moveaxis(numbers, [list(sizes).index(axis) for axis in axes], range(-len(axes), 0))
        return [frozenset(map(int, g)) for g in numbers.reshape(-1, prod(sizes[axis] for axis in axes))]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    count, shape = (tuple(map(int, x.split(","))) for x in iota.groups()[:2])
    order = np.arange(prod(shape)).reshape(shape)
    if iota.group(3):
        order = order.transpose(tuple(map(int, iota.group(3).split(","))))
    return [frozenset(map(int, g)) for g in order.reshape(count)]


def _axis(groups: list[frozenset[int]], mesh: Mesh) -> tuple[str, int]:
    """Return the smallest set of mesh axes that contains every group, and the size of a group."""
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    wide = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    for count in range(1, len(wide) + 1):
        for axes in combinations(wide, count):
            places = [mesh.axis_names.index(axis) for axis in axes]
            rows = np.moveaxis(numbers, places, range(-count, 0)).reshape(-1, prod(mesh.shape[a] for a in axes))
            if all(any(group <= set(row) for row in rows.tolist()) for group in groups):
                return "+".join(axes), max(map(len, groups))
    raise ValueError(f"the groups {groups} are not those of any axes of the mesh {dict(mesh.shape)}")


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Return the collectives of a program, in the order of LAYERS, forward before backward.

    Args:
      text: `compiled.as_text()` of a program compiled for the mesh.

    Each array of a combined collective is counted alone, under the layer whose operation produced it. Arrays of the
    same kind, layer, axis and direction (the gradients of a kernel and of its bias) are summed.
    """
    instructions, computations = _parse(text)

    def origin(name: str, depth: int = 0) -> str:
        """Return the op_name of the layer's operation that produced an array."""
        instruction = instructions.get(name)
        if instruction is None or depth > 8:
            return ""
        inside = [instructions[i].op_name for i in computations.get(instruction.calls, ())]
        for op_name in (instruction.op_name, *reversed(inside)):
            if _named_layer(op_name):
                return op_name
        return next(filter(None, (origin(operand, depth + 1) for operand in instruction.operands)), "")

    def concatenated(name: str) -> tuple[str, ...]:
        """Return the arrays that a fusion only concatenates, as XLA does with small ones on a GPU, or the array."""
        fusion = instructions[name]
        opcodes = {instructions[i].opcode for i in computations.get(fusion.calls, ())}
        parts = [part for part in fusion.operands if part in instructions]
        only = "concatenate" in opcodes and not opcodes - {"concatenate", "parameter", "bitcast", "reshape"}
        whole = only and sum(_bytes(instructions[part].shape) for part in parts) == _bytes(fusion.shape)
        return tuple(parts) if whole else (name,)

    sums: Counter[tuple] = Counter()
    for instruction in instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = _groups(instruction.line) or [frozenset(range(mesh.size))]
        if max(map(len, groups)) == 1:
            continue
        axis, parts = _axis(groups, mesh)
        operands = [part for name in instruction.operands for part in concatenated(name)]
        alone = len(operands) == 1  # a combined collective has the name of one of its parts, or of all
        for operand in operands:
            own, producer = instruction.op_name, origin(operand)
            op_name = own if _named_layer(own) and alone else producer
            layer = _named_layer(op_name) or "metrics"
            scalar = _bytes(instructions[operand].shape) <= 4  # the loss and the error are the only ones
            if scalar or alone and "metrics" in re.findall(r"\w+", own):
                layer, op_name, own = "metrics", "", ""
            size = _bytes(instructions[operand].shape) * (parts if kind == "all-gather" else 1)
            backward = "transpose(" in own or "transpose(" in op_name
            sums[kind, layer, axis, backward, parts] += size
    order = {layer: i for i, layer in enumerate(LAYERS)}
    summed = [Collective.make(*key[:4], array_bytes, key[4]) for key, array_bytes in sums.items()]
    return sorted(summed, key=lambda c: (c.backward, order.get(c.layer, len(order)), c.axis, c.kind))
