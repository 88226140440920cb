"""Pickles of arrays, read without `pickle`: a closed list of opcodes and of names, and nothing else is called.

`pickle.Unpickler` with a `find_class` of its own would execute nothing either, but a few bytes make it allocate
gigabytes (the index of LONG_BINPUT, the length of BYTEARRAY8). Here strings of more than `SHORT` bytes stay in the
file.
"""

import io
import struct
from collections.abc import Callable, Mapping
from typing import Any

from alexnet_jax.weights.description import WeightsError
from alexnet_jax.weights.stored import Region

MAX_OPCODES = 50_000  # a state dict of AlexNet takes 600; each makes an object of up to a few hundred bytes
SHORT = 256
CONSTANTS: dict[bytes, Callable[[], Any]] = {
    b"N": lambda: None,
    b"\x88": lambda: True,
    b"\x89": lambda: False,
    b"]": list,
    b")": tuple,
    b"}": dict,
}
NUMBERS = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
TEXTS = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q"}
BYTES = {b"T": "<i", b"U": "<B", b"B": "<I", b"C": "<B", b"\x8e": "<Q", b"\x96": "<Q"}
PUTS, GETS = {b"q": "<B", b"r": "<I"}, {b"h": "<B", b"j": "<I"}
TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


def read_pickle(
    region: Region, names: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None
) -> tuple[Any, int]:
    """Return the object of a pickle, and the bytes that it takes.

    Bytes, and strings of Python 2, are `bytes`, or a `Region` if they are longer than `SHORT`.

    Args:
      region: starts with the pickle.
      names: all that the pickle may name, "module.name"; the values that are callable are called with the pickle's
        arguments. The state that it gives an object is passed to the object's method `set_state`, if it has one.
      persistent: from a persistent id to its object.

    Raises:
      WeightsError: an opcode or a name that is not allowed, or a truncated pickle.
      Exception: of several types, for a corrupt pickle.
    """
    reader = _Reader(region)
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    def named(module: Any, name: Any) -> Any:
        full = f"{module}.{name}"[:200]
        if full not in names:
            raise WeightsError(f"it names {full}, which was not loaded; expected arrays alone, such as a state_dict's")
        return names[full]

    def update(target: Any, items: list[Any]) -> None:
        target.update(zip(map(as_text, items[::2]), items[1::2], strict=True))

    count = 0
    while count < MAX_OPCODES:
        count += 1
        op = reader.take(1)
        if op == b".":
            return stack.pop(), reader.position
        if op in CONSTANTS:
            stack.append(CONSTANTS[op]())
        elif op in NUMBERS:
            stack.append(reader.number(NUMBERS[op]))
        elif op in TEXTS:
            text = reader.string(reader.number(TEXTS[op]))
            stack.append(text if isinstance(text, Region) else text.decode("utf-8", "surrogatepass"))
        elif op in BYTES:
            stack.append(reader.string(reader.number(BYTES[op])))
        elif op in PUTS:
            memo[reader.number(PUTS[op])] = stack[-1]
        elif op in GETS:
            stack.append(memo[reader.number(GETS[op])])
        elif op in TUPLES:
            stack[-TUPLES[op] :] = [tuple(stack[-TUPLES[op] :])]
        elif op == b"\x94":
            memo[len(memo)] = stack[-1]
        elif op == b"(":
            outer.append(stack)
            stack = []
        elif op == b"t":
            items = marked()
            stack.append(tuple(items))
        elif op == b"l":
            items = marked()
            stack.append(items)
        elif op == b"d":
            items = marked()
            stack.append({})
            update(stack[-1], items)
        elif op == b"a":
            item = stack.pop()
            stack[-1].append(item)
        elif op == b"e":
            items = marked()
            stack[-1].extend(items)
        elif op == b"s":
            value, key = stack.pop(), stack.pop()
            update(stack[-1], [key, value])
        elif op == b"u":
            items = marked()
            update(stack[-1], items)
        elif op == b"I":
            line = reader.line()
            stack.append(line == b"01" if line in (b"00", b"01") else int(line))
        elif op == b"\x8a":
            stack.append(int.from_bytes(reader.take(reader.number("<B")), "little", signed=True))
        elif op == b"c":
            module, name = reader.line().decode(), reader.line().decode()
            stack.append(named(module, name))
        elif op == b"\x93":
            name, module = stack.pop(), stack.pop()
            stack.append(named(module, name))
        elif op in (b"R", b"\x81"):
            arguments, function = stack.pop(), stack.pop()
            count += sum(len(x) for x in arguments if isinstance(x, list | tuple | dict))  # which the call may copy
            stack.append(function(*arguments))
        elif op == b"b":
            state = stack.pop()
            if hasattr(stack[-1], "set_state"):
                stack[-1].set_state(state)
        elif op == b"Q" and persistent:
            stack.append(persistent(stack.pop()))
        elif op in (b"\x80", b"\x95"):  # the protocol's number, the length of a frame
            reader.take(1 if op == b"\x80" else 8)
        else:
            raise WeightsError(f"its pickle has the opcode {op!r}, which no file of weights needs: it is corrupt")
    raise WeightsError(f"its pickle has more than {MAX_OPCODES:,} opcodes and arguments; no AlexNet needs as many")


def as_text(value: Any) -> Any:
    """Return a string of Python 2, which a pickle gives as bytes, as text; other values as they are."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


def as_region(value: Any) -> Region:
    """Return bytes of a pickle as a region, wherever they are."""
    return value if isinstance(value, Region) else Region(io.BytesIO(value), 0, len(value))


class _Reader:
    """The bytes of a region in order."""

    def __init__(self, region: Region):
        self.region, self.position = region, 0

    def take(self, size: int) -> bytes:
        content = self.region.bytes(self.position, size)
        self.position += size
        return content

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self, size: int) -> Any:
        if size <= SHORT:
            return self.take(size)
        part = self.region.part(self.position, size)
        self.position += size
        return part

    def line(self) -> bytes:
        start = self.region.bytes(self.position, min(SHORT, self.region.size - self.position))
        line = start[: start.index(b"\n")]
        self.position += len(line) + 1
        return line
