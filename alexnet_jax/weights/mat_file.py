"""MATLAB's MAT-files of version 5, compressed or not.

`scipy.io.loadmat` allocates what a header declares: a cell array of a hundred bytes can ask for gigabytes.
"""

import io
import math
import struct
import zlib
from typing import Any

import numpy as np

from alexnet_jax.weights.description import WeightsError
from alexnet_jax.weights.stored import Region, stored

MAX_ELEMENTS, MAX_DEPTH = 100_000, 8  # with 1,000 class names it has 12,000
SPARE = 50 << 20  # decompressed bytes beyond one and a half times the file's
CHUNK = 1 << 16
MAX_TEXT, MAX_DIMENSIONS = 1 << 16, 8
NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
MATRIX, COMPRESSED = 14, 15
CELL, STRUCT, CHAR, NUMERIC = 1, 2, 4, range(6, 16)
ENCODINGS = {2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}


def read_mat(file: Region) -> dict[str, Any]:
    """Return the variables of a MAT-file.

    A struct is a dict, a cell array or an array of structs a list in column-major order, text is `str`, a numeric array
    a `Stored` in Fortran order; anything else is None.

    Raises:
      WeightsError: another file, or one whose contents exceed its size by far.
      Exception: of several types, for a corrupt file.
    """
    if file.bytes(126, 2) != b"IM":
        raise WeightsError("a big-endian MAT-file; save it on another machine")
    variables: dict[str, Any] = {}
    reader = _Reader(_Plain(file.part(128, file.size - 128)))
    budget = decompressed_limit(file)
    while reader.source.left:
        kind, size, small = reader.tag()
        if kind == COMPRESSED:
            inner = _Reader(_Inflated(reader.source.take(size), budget), reader.count)
            kind, inner_size, _ = inner.tag()
            name, value = inner.matrix(inner_size) if kind == MATRIX else ("", None)
            inner.source.finish()
            budget -= inner.source.done
            reader.count = inner.count
        elif kind == MATRIX:
            name, value = reader.matrix(size)
        else:
            raise WeightsError("its variables are corrupt")
        variables[name] = value
    return variables


def decompressed_limit(file: Region) -> int:
    """Return the number of bytes that a file may expand to: floats become a tenth smaller, class names a half."""
    return file.size * 3 // 2 + SPARE


class _Plain:
    """The bytes of a region in order."""

    def __init__(self, region: Region):
        self.region, self.done = region, 0

    @property
    def left(self) -> int:
        return self.region.size - self.done

    def take(self, size: int) -> Region:
        part = self.region.part(self.done, size)
        self.done += size
        return part


class _Inflated:
    """The decompressed bytes of a region in order, at most `limit` of them."""

    def __init__(self, region: Region, limit: int):
        self.compressed, self.zlib, self.limit = _Plain(region), zlib.decompressobj(), limit
        self.buffer, self.done = b"", 0

    def take(self, size: int) -> Region:
        if not 0 <= size <= self.limit - self.done:
            raise WeightsError("it expands to far more than its size: it is corrupt")
        self.done += size
        parts, missing = [], size
        while missing:
            self.buffer = self.buffer or self.more()
            parts.append(self.buffer[:missing])
            self.buffer = self.buffer[missing:]
            missing -= len(parts[-1])
        content = parts[0] if len(parts) == 1 else b"".join(parts)
        return Region(io.BytesIO(content), 0, size)

    def more(self) -> bytes:
        """Return up to `CHUNK` bytes; raises WeightsError at the end."""
        while True:
            source = self.zlib.unconsumed_tail
            if not source:
                part = self.compressed.take(min(CHUNK, self.compressed.left))
                source = part.bytes(0, part.size)
            if self.zlib.eof or not source:
                raise WeightsError("it is truncated or corrupt: a variable ends early")
            if content := self.zlib.decompress(source, CHUNK):
                return content

    def finish(self) -> None:
        """Check that this is the end, with the right checksum."""
        rest = self.compressed.take(min(CHUNK, self.compressed.left))
        more = self.buffer or self.zlib.decompress(self.zlib.unconsumed_tail + rest.bytes(0, rest.size), 1)
        if more or not self.zlib.eof:
            raise WeightsError("it is truncated or corrupt: a variable is longer than it declares")


class _Reader:
    """MAT-file elements in order, from a source of bytes; `count` is the elements so far."""

    def __init__(self, source: Any, count: int = 0):
        self.source, self.count = source, count

    def take(self, size: int) -> bytes:
        return self.source.take(size).bytes(0, size)

    def tag(self) -> tuple[int, int, bool]:
        """Return the type and size of the next element, and whether its content shares the tag's eight bytes."""
        self.counted(1)
        (kind,) = struct.unpack("<I", self.take(4))
        if kind >> 16:
            return kind & 0xFFFF, kind >> 16, True
        return kind, struct.unpack("<I", self.take(4))[0], False

    def element(self) -> tuple[int, Region]:
        """Return the type and the content of the next element, which holds no other."""
        kind, size, small = self.tag()
        content = self.source.take(size)
        self.source.take(4 - size if small else -size % 8)  # padding
        return kind, content

    def small(self) -> tuple[int, bytes]:
        """Return the type and the content of the next element, which is short."""
        kind, content = self.element()
        self.counted(content.size // 100)
        if content.size > MAX_TEXT:
            raise WeightsError("its names are too long: it is corrupt")
        return kind, content.bytes(0, content.size)

    def counted(self, count: int) -> None:
        """Raise WeightsError if there are too many elements with `count` more."""
        self.count += count
        if self.count > MAX_ELEMENTS:
            raise WeightsError(f"it has more than {MAX_ELEMENTS:,} elements; no AlexNet has as many")

    def matrix(self, size: int, depth: int = 0) -> tuple[str, Any]:
        """Return the name and the value of a matrix whose tag was read."""
        if not size:
            return "", None
        if depth > MAX_DEPTH:
            raise WeightsError(f"its cells and structs are more than {MAX_DEPTH} deep")
        start = self.source.done
        (flags,) = struct.unpack("<I4x", self.small()[1])
        dims = np.frombuffer(self.small()[1], "<i4").tolist()[:MAX_DIMENSIONS]
        name = self.small()[1].decode("latin-1")
        count, kind = math.prod(dims), flags & 0xFF
        if kind in (CELL, STRUCT):
            self.counted(abs(count))
        if kind == CELL:
            return name, [self._inner(depth) for _ in range(count)]
        if kind == STRUCT:
            length = struct.unpack("<i", self.small()[1])[0]
            names = self.small()[1]
            fields = [names[i : i + length].split(b"\0")[0].decode("latin-1") for i in range(0, len(names), length)]
            values = [{field: self._inner(depth) for field in fields} for _ in range(count)]
            return name, values[0] if count == 1 else values
        value: Any = None
        if kind == CHAR:
            code, text = self.small()
            value = text.decode(ENCODINGS[code], "replace")
        elif kind in NUMERIC and not flags & 0x800:  # not complex
            code, content = self.element()
            value = stored(content, np.dtype(NUMBERS[code]), tuple(dims[::-1]), fortran=True)
        self.source.take(size - (self.source.done - start))
        return name, value

    def _inner(self, depth: int) -> Any:
        kind, size, _ = self.tag()
        if kind != MATRIX:
            raise WeightsError("its cells or structs are corrupt")
        return self.matrix(size, depth + 1)[1]
