""".safetensors files: written by the library, and read here as a header and arrays in place.

To read, the library maps the file into memory, so that its pages count next to the arrays copied from them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from alexnet_jax.errors import one_line
from alexnet_jax.runtime.files import replaced
from alexnet_jax.weights.description import WeightsError
from alexnet_jax.weights.stored import Region, Stored, stored

MAX_HEADER = 2 << 20  # with the names of 21,000 classes it takes one
DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": jnp.bfloat16}


def read_safetensors(file: Region) -> tuple[dict[str, str], dict[str, Stored]]:
    """Return the metadata and the arrays by name.

    Raises:
      WeightsError: another file, a truncated one, or arrays that are not floats.
      Exception: of several types, for a corrupt file.
    """
    size = int.from_bytes(file.bytes(0, 8), "little")
    if not starts_as_safetensors(file) or size > MAX_HEADER:
        raise WeightsError(f"not a .safetensors file, or one with a header of more than {MAX_HEADER:,} bytes")
    header = json.loads(file.bytes(8, size))
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise WeightsError("its metadata is not text: it is corrupt")
    arrays, content, total = {}, file.part(8 + size, file.size - 8 - size), 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise WeightsError(f"{name[:80]!r} is of type {entry['dtype']!r:.20}; expected {', '.join(DTYPES)}")
        arrays[name] = stored(
            content.part(start, stop - start), np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        )
        total += stop - start
    if total != content.size:
        raise WeightsError("its arrays do not fill the file: it is truncated or corrupt")
    return metadata, arrays


def starts_as_safetensors(file: Region) -> bool:
    """Return whether a file starts with the size of a header and a header."""
    return file.size > 8 and file.bytes(8, 1) == b"{" and int.from_bytes(file.bytes(0, 8), "little") < 1 << 32


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write contiguous arrays to a file, the complete file or nothing; raises OSError."""
    with replaced(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(dict(arrays), temporary, dict(metadata))
            temporary.chmod(mode)  # the library gives only the owner access
        except SafetensorError as error:  # what the library raises instead of OSError
            raise OSError(one_line(error)) from None
