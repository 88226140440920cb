"""The images that a data set is prepared from: a TFDS data set, or a folder split/class/image."""

import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from alexnet_jax.data.source import DataError, check_features, how_to_build, open_builder, unreadable
from alexnet_jax.errors import UserError
from alexnet_jax.runtime.files import raise_open_files_limit
from alexnet_jax.runtime.output import escaped

log = logging.getLogger(__name__)

NAMES_SHOWN = 5  # in a message
SYSTEM_NAMES = ("thumbs.db", "desktop.ini", ".ds_store", "__macosx", "@eadir")  # what systems write into any folder


class PrepareError(UserError):
    """A data set that cannot be prepared."""


class FolderPart(NamedTuple):
    """Some images of a folder class/image.

    Attributes:
      folder: the folder of the split.
      paths: class/image of each image.
      classes: the names of the data set's classes.
    """

    folder: Path
    paths: Sequence[str]
    classes: Sequence[str]

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self.paths)

    def read(self) -> Iterator[tuple[str, bytes, int]]:
        """Yield name, file and label of each image; raises data.DataError if a file cannot be read."""
        for path in self.paths:
            try:
                file = (self.folder / path).read_bytes()
            except OSError as error:
                raise DataError(f"{self.folder / path} cannot be read ({error.strerror})") from None
            yield path, file, self.classes.index(path.split("/")[0])

    def fingerprint(self) -> str:
        """Return a text that changes when what `read` yields does."""
        files = [(path, (self.folder / path).stat()) for path in self.paths]
        return repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in files] + [*self.classes])


class TfdsPart(NamedTuple):
    """Some images of a prepared TFDS data set.

    Attributes:
      folder: the data set's folder.
      positions: those of the images in the split.
    """

    folder: Path
    split: str
    positions: range

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self.positions)

    def read(self) -> Iterator[tuple[str, bytes, int]]:
        """Yield name, file and label of each image; raises data.DataError if the data set is corrupt."""
        for position in self.positions:
            try:
                example = _records(self.folder, self.split)[position]
            except Exception as error:  # any exception of a corrupt file
                raise unreadable(self.folder, self.split, position, error) from None
            yield example.get("file_name", b"%d" % position).decode(), example["image"], int(example["label"])

    def fingerprint(self) -> str:
        """Return a text that changes when what `read` yields does."""
        return repr(self)


Part = FolderPart | TfdsPart


@functools.lru_cache(maxsize=2)  # few, since an open data set may be a temporary one
def _records(folder: Path, split: str) -> Any:
    raise_open_files_limit()
    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split, decoders=dict.fromkeys(["image"], tfds.decode.SkipDecoding()))


def _pieces(images: int, size: int) -> list[range]:
    """Return ranges of up to `size` positions each, and of fewer if that would leave cores without work."""
    size = min(size, max(16, -(-images // 64)))
    return [range(i, min(i + size, images)) for i in range(0, images, size)]


def _hidden(name: str) -> bool:
    return any(word.startswith(".") for word in name.split("/"))


def _some(names: Sequence[str]) -> str:
    """Return the first of some names and the number of the others."""
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _of_system(name: str) -> bool:
    return any(word.lower() in SYSTEM_NAMES for word in name.split("/"))


def folder_parts(
    files: Iterable[str], folder: Path, size: int, others: Iterable[str] = ()
) -> tuple[dict[str, list[Part]], tfds.features.ClassLabel | None]:
    """Return the parts of each split, up to `size` images each, and the classes, of files split/class/image.

    A line is logged with what is skipped: files of the operating system, files in other places, and `others`. So is one
    with the classes that a split lacks. Other hidden files are ignored.

    Args:
      files, others: paths relative to `folder`.

    Raises:
      PrepareError: a class without images to train.
    """
    files = list(files)
    if of_system := sorted(file for file in files if _of_system(file)):
        log.info("skipped, files of the operating system: %s", _some(of_system))
    paths: dict[str, list[str]] = {}
    skipped = {name for name in others if not _hidden(name)}
    for file in files:
        if _hidden(file) or _of_system(file):
            continue
        if file.count("/") == 2:
            split, path = file.split("/", 1)
            paths.setdefault(split, []).append(path)
        else:
            skipped.add(file)
    if skipped:
        log.info("skipped, no images at split/class/image: %s", _some(sorted(skipped)))
    classes = sorted({path.split("/")[0] for images in paths.values() for path in images})
    train = {path.split("/")[0] for path in paths.get("train", ())}
    places = {(split, path.split("/")[0]) for split, images in paths.items() for path in images}
    if train and (unknown := sorted("/".join(place) for place in places if place[1] not in train)):
        raise PrepareError(
            f"{_some(unknown)}: no images of this class in train/, so that each would count as an error; add some, or "
            "move the folder elsewhere (python -m alexnet_jax.predict classifies unlabeled images)"
        )
    for split, images in sorted(paths.items()):
        present = {path.split("/")[0] for path in images}
        if train and (absent := [name for name in classes if name not in present]):
            log.info("%s: no images of %s", split, _some(absent))
        images.sort(key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
    parts: dict[str, list[Part]] = {
        split: [FolderPart(folder / split, [images[i] for i in piece], classes) for piece in _pieces(len(images), size)]
        for split, images in sorted(paths.items())
    }
    return parts, tfds.features.ClassLabel(names=[*map(escaped, classes)]) if classes else None


def find_parts(dataset: str, data_dir: Path, size: int) -> tuple[dict[str, list[Part]], tfds.features.ClassLabel]:
    """Return the parts of each split, up to `size` images each, and the classes: of a TFDS data set or of a folder.

    The order of the images of a folder is fixed and unrelated to the classes, so `train[:90%]` is a random sample.

    Raises:
      PrepareError: there is neither of the two, or it has no split `train`.
    """
    if not data_dir.is_dir():
        raise PrepareError(f"--data_dir={data_dir}: no such folder; expected the folder of images, or TFDS's")
    if any((data_dir / dataset).glob("**/dataset_info.json")):
        builder = open_builder(dataset, str(data_dir))
        info, folder = builder.info, Path(builder.data_path)
        check_features(builder, prepared=False)
        if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise PrepareError(f"{folder} is stored as {info.file_format.value}; expected array_record")
        sizes = {split: info.splits[split].num_examples for split in sorted(info.splits)}
        parts: dict[str, list[Part]] = {
            split: [TfdsPart(folder, split, piece) for piece in _pieces(count, size)] for split, count in sizes.items()
        }
        label = info.features["label"]
    else:
        files: list[str] = []
        others: set[str] = set()
        for path in (path for pattern in ("*", "*/*", "*/*/*") for path in data_dir.glob(pattern)):
            (files.append if path.is_file() else others.add)(path.relative_to(data_dir).as_posix())
        nested = (file.split("/") for file in files if "/" in file and not _of_system(file))
        for split, name, *image in nested:  # folders that hold an image
            others -= {split, f"{split}/{name}"} if image else set()
        parts, label = folder_parts(files, data_dir, size, others)
    if "train" not in parts:
        raise PrepareError(
            f"--data_dir={data_dir}: expected {dataset}/, a prepared TFDS data set, or train/CLASS/IMAGE, and other "
            f"splits like it; found {', '.join(parts) or 'neither'}. {_official(dataset, data_dir)}"
        )
    return parts, label


def _official(dataset: str, data_dir: Path) -> str:
    """Return how to prepare one of TFDS's own data sets."""
    try:
        return f"TFDS prepares {dataset} with: {''.join(how_to_build(dataset, data_dir))}"
    except tfds.core.registered.DatasetNotFoundError:
        return f"TFDS has no data set {dataset!r} of its own"


def check_apart(part: Part, data_dir: PurePath, output: PurePath) -> None:
    """Raise PrepareError if the prepared data set would be inside the folder of images that it is made from."""
    if isinstance(part, FolderPart) and output.is_relative_to(data_dir):
        raise PrepareError(
            f"--out: {output} is inside the folder of images --data_dir={data_dir}, where the next start would read it "
            "as images; name an --out outside of it"
        )
