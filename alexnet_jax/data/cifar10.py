"""CIFAR-10, prepared as a TFDS data set in ArrayRecord without TensorFlow, from the official archive."""

import io
import logging
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_jax.data.original_files import Files, Source, check_sha256, download, from_first_source, write

log = logging.getLogger(__name__)

ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
SIZE = 170_052_171
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"  # in the archive
BATCHES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
CLASS_NAMES = "batches.meta.txt"  # one a line
IMAGE = (3, 32, 32)  # after a byte with the label


def _check_size(size: int) -> None:
    if size != SIZE:
        raise ValueError(f"{size:,} bytes, and {ARCHIVE} has {SIZE:,}: it is truncated, or not the published file")


def _unpacked(content: bytes) -> Files:
    """Return the files of the archive that the data set is made of, by name; nothing is extracted to a disk."""
    _check_size(len(content))
    check_sha256(ARCHIVE, content, SHA256)
    names = {f"{FOLDER}/{name}": name for name in (*BATCHES["train"], *BATCHES["test"], CLASS_NAMES)}
    files: Files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r|gz") as archive:
            for member in archive:
                if member.name in names and (file := archive.extractfile(member)):
                    files[names[member.name]] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{ARCHIVE} cannot be unpacked: {error}") from None
    if missing := [path for path, name in names.items() if name not in files]:
        raise ValueError(f"{ARCHIVE} has no {missing[0]}")
    return files


def from_path(path: Path) -> Files:
    """Return the files of the archive at a path, or in the folder that it names; raises OSError or ValueError."""
    archive = path / ARCHIVE if path.is_dir() else path
    if not archive.is_file():
        raise FileNotFoundError(f"it has no {ARCHIVE}" if path.is_dir() else "no such file or folder")
    _check_size(archive.stat().st_size)
    return _unpacked(archive.read_bytes())


def from_url(url: str) -> Files:
    """Return the files of the archive at a URL; raises OSError, HTTPException or ValueError."""
    log.info("CIFAR-10: downloading %s (%.0f MB)", url, SIZE / 1e6)
    return _unpacked(download(url, SIZE + 1))


def find_files(source_dir: str = "") -> Files:
    """Return the files of the official archive by name, from the first source that has it; each attempt is logged.

    Args:
      source_dir: the archive, or a folder with it; "" for none.

    Raises:
      NoSourceError: no source had it; the message lists what was tried.
    """
    sources: list[Source] = [(f"the official download {URL}", lambda: from_url(URL))]
    advice = f"Put {ARCHIVE} into a folder and name it: --config.source_dir=FOLDER"
    return from_first_source("CIFAR-10", sources, source_dir, from_path, advice)


def prepare(data_dir: str | Path | None, source_dir: str = "") -> None:
    """Write the TFDS data set `cifar10` below `data_dir`, the complete set or nothing.

    Its ids, its images and their order are those of TFDS's own preparation.

    Args:
      data_dir: None is TFDS's default.
      source_dir: as in `find_files`.

    Raises:
      NoSourceError: no source has the archive.
      OSError, RuntimeError: the folder cannot be written.
    """
    files = find_files(source_dir)

    def examples(split: str) -> Iterator[dict[str, Any]]:
        batches = b"".join(files[name] for name in BATCHES[split])
        records = np.frombuffer(batches, np.uint8).reshape(-1, 1 + np.prod(IMAGE))
        for index, record in enumerate(records):
            image = Image.fromarray(record[1:].reshape(IMAGE).transpose(1, 2, 0).copy())
            yield {"id": f"{split}_{index:05}", "image": image, "label": int(record[0])}

    class_names = files[CLASS_NAMES].decode().split()
    write("cifar10", data_dir, {split: examples(split) for split in BATCHES}, class_names)
