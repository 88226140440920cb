"""What preparing a data set from its original files takes: find them, check them, write them as TFDS does."""

import hashlib
import logging
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from alexnet_jax.errors import UserError, one_line
from alexnet_jax.runtime.files import user_path

log = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_S = 20
Files = dict[str, bytes]
Source = tuple[str, Callable[[], Files]]  # its name, and how to read the files from it


class NoSourceError(UserError):
    """No source has the data set; the message lists the sources that were tried."""


def check_sha256(name: str, content: bytes, expected: str) -> None:
    """Raise ValueError unless the content of the file `name` has the SHA-256 `expected`, in hex."""
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"{name} is not the published file (SHA-256 differs)")


def download(url: str, limit: int | None = None) -> bytes:
    """Return what a URL has, at most `limit` bytes; raises OSError or HTTPException."""
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
        return response.read(limit)


def from_first_source(
    title: str, sources: Sequence[Source], source_dir: str, read: Callable[[Path], Files], advice: str
) -> Files:
    """Return the files from the first source that has them; each attempt is logged.

    Args:
      title: the data set's name in messages.
      sources: in order; a source that does not have the files raises OSError, HTTPException, ValueError or
        TimeoutExpired.
      source_dir: `config.source_dir`, which no other source replaces; "" for none.
      read: returns the files from the path `source_dir`, and raises OSError or ValueError.
      advice: ends the message of the error.

    Raises:
      NoSourceError: no source had them; the message lists what was tried.
    """
    if source_dir:
        try:
            files = read(user_path(source_dir, "config.source_dir"))
        except (OSError, ValueError) as error:
            raise NoSourceError(
                f"{title} cannot be read from config.source_dir={source_dir}: {one_line(error, 500)}. {advice}"
            ) from None
        log.info("%s: files from config.source_dir=%s", title, source_dir)
        return files
    tried = []
    for name, files_of_source in sources:
        try:
            files = files_of_source()
        except (OSError, HTTPException, ValueError, subprocess.TimeoutExpired) as error:
            tried.append(f"{name}: {one_line(error, 500)}")
            log.info("%s: no files from %s", title, tried[-1])
        else:
            log.info("%s: files from %s", title, name)
            return files
    raise NoSourceError(f"{title} was not found. Tried: {'; '.join(tried)}. {advice}")


def write(
    name: str,
    data_dir: str | Path | None,
    splits: dict[str, Iterable[dict[str, Any]]],
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a data set that TFDS has a builder for, in ArrayRecord, the complete set or nothing.

    TFDS orders the examples by a hash of their positions, writes into a folder `incomplete.…` and renames it at the
    end. Its own preparation needs TensorFlow, for extraction and PNG encoding.

    Args:
      name: TFDS's.
      data_dir: None is TFDS's default.
      splits: the examples of each split in the order of the original files; images as `PIL.Image.Image`.
      class_names: None is those of TFDS's builder.

    Raises:
      OSError, RuntimeError: the folder cannot be written.
    """
    official: Any = tfds.builder_cls(name)

    def generators(builder, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: enumerate(examples) for split, examples in splits.items()}

    with tfds.core.registered.skip_registration():
        builder_cls = type(
            official.__name__, (official,), {"__module__": __name__, "name": name, "_split_generators": generators}
        )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = builder_cls(data_dir=data_dir, file_format="array_record")
    if class_names:
        builder.info.features["label"].names = list(class_names)
    for leftover in Path(builder.data_path).parent.glob("incomplete.*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    builder.download_and_prepare()
