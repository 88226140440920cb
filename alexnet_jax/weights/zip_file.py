"""The directory of a zip file whose entries are stored, not compressed.

`zipfile` makes an object of a kilobyte for each 46 bytes of the directory, before a caller can look at their number.
"""

import struct
import zlib

from alexnet_jax.weights.description import WeightsError
from alexnet_jax.weights.stored import Region

MAX_DIRECTORY = 1 << 20  # torch's takes 100 bytes an entry
CHUNK = 1 << 22


def read_zip(file: Region) -> dict[str, Region]:
    """Return the contents of a zip file's entries by name, after a check of their CRC-32.

    Raises:
      WeightsError: a truncated or corrupt file, or a compressed entry.
    """
    end = file.size - 22
    if end < 0 or file.bytes(end, 4) != b"PK\5\6":
        raise WeightsError("its zip directory is missing: it is truncated, or has a comment")
    count, size, start = struct.unpack("<10xHII2x", file.bytes(end, 22))
    if count == 0xFFFF or 0xFFFFFFFF in (size, start):  # zip64
        (record,) = struct.unpack("<4x4xQ4x", file.bytes(end - 20, 20))
        count, size, start = struct.unpack("<32xQQQ", file.bytes(record, 56))
    if size > MAX_DIRECTORY:
        raise WeightsError(f"its zip directory has {size:,} bytes; expected at most {MAX_DIRECTORY:,}")
    directory, position, total = file.bytes(start, size), 0, 0
    entries: dict[str, Region] = {}
    for _ in range(count):
        fields = struct.unpack_from("<4s6xH4xIIIHHH8xI", directory, position)
        signature, method, crc, _, length, name_size, extra_size, comment_size, header = fields
        position += 46
        name = directory[position : position + name_size].decode("utf-8", "replace")
        extra = directory[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        if signature != b"PK\1\2" or method != 0:
            raise WeightsError(f"its zip entry {name[:80]!r} is compressed or corrupt; torch stores it as it is")
        length, header = _zip64(extra, length, header)
        local_sizes = struct.unpack("<26xHH", file.bytes(header, 30))
        content = file.part(header + 30 + sum(local_sizes), length)
        total += length
        if total > file.size:
            raise WeightsError("its zip entries overlap: it is corrupt")
        if _crc(content) != crc:
            raise WeightsError(f"its zip entry {name[:80]!r} has another CRC-32 than its directory: it is corrupt")
        entries[name] = content
    return entries


def _zip64(extra: bytes, length: int, header: int) -> tuple[int, int]:
    """Return an entry's length and the place of its header, from its extra field if they are too large for 32 bits."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{size // 8}Q", extra, position + 4))
            if length == 0xFFFFFFFF:
                length = next(values)
                next(values, None)  # the compressed length, if that is there as well
            if header == 0xFFFFFFFF:
                header = next(values)
        position += 4 + size
    return length, header


def _crc(content: Region) -> int:
    crc = 0
    for offset in range(0, content.size, CHUNK):
        crc = zlib.crc32(content.bytes(offset, min(CHUNK, content.size - offset)), crc)
    return crc
