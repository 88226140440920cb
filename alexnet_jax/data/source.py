"""Data sets of TFDS in ArrayRecord: uint8 images and integer labels. TensorFlow is never imported."""

import contextlib
import logging
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from alexnet_jax.data import cifar10, fashion_mnist
from alexnet_jax.data.original_files import NoSourceError
from alexnet_jax.errors import UserError, one_line
from alexnet_jax.runtime.files import lock, raise_open_files_limit, user_path
from alexnet_jax.runtime.imports import unchanged_logging

TFDS_BUILD = "tensorflow apache-beam mlcroissant"  # what `tfds build` imports
PREPARED_HERE = {"fashion_mnist": fashion_mnist.prepare, "cifar10": cifar10.prepare}  # without TensorFlow
STATISTICS = "statistics.npz"  # the mean image and the RGB covariance, which `prepare` writes into a data set's folder

log = logging.getLogger(__name__)


class DataError(UserError):
    """A data set, or a split of one, that is missing, corrupt, or in another format than expected."""


@contextlib.contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of a data set's preparation; the system releases it when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "w") as file:
        lock(file.fileno(), folder, wait=True)
        yield


def how_to_build(name: str, data_dir: Path) -> tuple[str, str]:
    """Return the command with which TFDS prepares one of its own data sets, and TFDS's note on manual downloads.

    The command needs TensorFlow. ARCHIVES in it is the folder of the files that must be downloaded by hand.

    Raises:
      tfds.core.registered.DatasetNotFoundError: TFDS has no such data set.
    """
    instructions = " ".join((tfds.builder_cls(name).MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    command = f"pip install {TFDS_BUILD} && tfds build {name} --file_format=array_record --data_dir={data_dir}"
    return (f"{command} --manual_dir=ARCHIVES", f" ({instructions})") if instructions else (command, "")


def _how_to_prepare(name: str, folder: Path) -> str:
    """Return the commands that make a data set of TFDS, or of `alexnet_jax.prepare` from one; "" if there are none."""
    original = name.removesuffix("_256")
    commands, note, source = [], "", str(folder)
    try:
        command, note = how_to_build(original, folder)
        commands.append(command)
    except tfds.core.registered.DatasetNotFoundError:
        source, note = "IMAGES", " (IMAGES is a folder split/class/image)"
    if any((folder / original).glob("**/dataset_info.json")):
        commands, note, source = [], "", str(folder)
    if original == name:
        return commands[0] + note if commands else ""
    commands.append(f"python -m alexnet_jax.prepare --dataset {original} --data_dir {source} --out {folder}")
    return " && ".join(commands) + note


@unchanged_logging()
def open_builder(name: str, data_dir: str = "", source_dir: str = "") -> tfds.core.DatasetBuilder:
    """Return the TFDS builder of a prepared data set; Fashion-MNIST and CIFAR-10 are prepared first if necessary.

    Args:
      name: a TFDS name.
      data_dir: where TFDS keeps prepared data sets; "" is TFDS's default, ~/tensorflow_datasets.
      source_dir: a folder with the original files of Fashion-MNIST, or with the archive of CIFAR-10; "" for none.

    Raises:
      DataError: an unknown name, or a data set that is not prepared and whose original files no source has.
    """
    folder = user_path(data_dir or tfds.core.constants.DATA_DIR, "config.data_dir").absolute()
    try:
        builder = tfds.builder(name, data_dir=folder)
        if not builder.info.splits and name in PREPARED_HERE:
            with _lock(folder, name):
                if not tfds.builder(name, data_dir=folder).info.splits:
                    start = time.monotonic()
                    PREPARED_HERE[name](folder, source_dir)
                    log.info("Prepared %s in %.0f s", builder.data_path, time.monotonic() - start)
            builder = tfds.builder(name, data_dir=folder)
        if builder.info.splits:
            return builder
    except tfds.core.registered.DatasetNotFoundError:
        pass
    except NoSourceError as error:
        raise DataError(f"config.dataset={name!r}: {error}") from None
    except (OSError, RuntimeError) as error:  # ArrayRecord's, of a full disk
        reason = one_line(error, 300)
        raise DataError(f"config.data_dir={str(folder)!r} cannot be read or written: {reason}") from None
    if commands := _how_to_prepare(name, folder):
        raise DataError(
            f"config.data_dir={str(folder)!r}: it has no prepared data set {name!r}; name the folder that has it, or "
            f"prepare it once: {commands}"
        )
    prepared = sorted(path.name for path in folder.glob("*/") if not path.name.startswith((".", "_")))
    raise DataError(
        f"config.dataset={name!r}: TFDS has no such data set, and {folder} contains {', '.join(prepared) or 'none'}"
    )


def split_size(builder: tfds.core.DatasetBuilder, split: str) -> int:
    """Return the number of examples of a split, in TFDS's notation.

    Raises:
      DataError: no such split, or an empty one.
    """
    try:
        size = builder.info.splits[split].num_examples
    except (ValueError, KeyError, AssertionError):
        splits = ", ".join(f"{k} ({v.num_examples:,})" for k, v in builder.info.splits.items())
        raise DataError(
            f"split {split!r} of {builder.name}: it has {splits}; name one of them, or a part, such as train[:90%]"
        ) from None
    if not size:
        raise DataError(f"split {split!r} of {builder.name} is empty")
    return size


def check_features(builder: tfds.core.DatasetBuilder, prepared: bool = True) -> None:
    """Check that a data set has one image and one class per example.

    Args:
      prepared: whether the images must be uint8 of one or three channels, as training reads them.

    Raises:
      DataError: the first feature that is missing or of another kind.
    """
    features, name = builder.info.features, builder.name
    if not {"image", "label"} <= set(features):
        raise DataError(f"{name} has the features {', '.join(sorted(features))}; expected image and label")
    image, label = features["image"], features["label"]
    if not isinstance(image, tfds.features.Image):
        raise DataError(f"{name}: its feature image is {type(image).__name__}; expected tfds.features.Image")
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise DataError(
            f"{name}: its feature label is {type(label).__name__}; expected tfds.features.ClassLabel with its classes"
        )
    dtype, channels = np.dtype(image.np_dtype), image.shape[-1]
    if prepared and (dtype != np.uint8 or channels not in (1, 3)):
        raise DataError(
            f"{name}: images of {dtype} with {channels} channels; expected uint8 with 1 or 3; python -m "
            f"alexnet_jax.prepare --dataset {name} converts it"
        )


def check_labels(labels: np.ndarray, classes: int, name: str, split: str) -> None:
    """Raise DataError unless every label is one of the classes; TFDS gives unlabeled images the label −1."""
    if wrong := {int(label) for label in (labels.min(), labels.max()) if not 0 <= label < classes}:
        if min(wrong) == -1:
            raise DataError(
                f"split {split!r} of {name} has images without a label; training and testing need labels: name "
                "another split (python -m alexnet_jax.predict classifies unlabeled image files)"
            )
        raise DataError(f"split {split!r} of {name} has the label {min(wrong)}; expected 0 to {classes - 1}")


def check_first_label(builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Check the label of a split's first example, before hours of training; raises DataError as `check_labels`."""
    try:
        label = open_source(builder, split)[0]["label"]
    except DataError:
        raise
    except Exception as error:  # any exception of a corrupt file
        raise unreadable(builder.data_path, split, 0, error) from None
    check_labels(np.array([label]), builder.info.features["label"].num_classes, builder.name, split)


def image_shape(builder: tfds.core.DatasetBuilder) -> tuple[int, int, int]:
    """Return [H, W, C] of every image; raises DataError if the data set's images have several shapes."""
    shape = builder.info.features["image"].shape
    if None in shape:
        raise DataError(
            f"{builder.name}: images of several sizes; expected one; python -m alexnet_jax.prepare --dataset "
            f"{builder.name} converts it"
        )
    return shape


def stored_shape(builder: tfds.core.DatasetBuilder, split: str) -> tuple[int, ...]:
    """Return [H, W, C] of the first image of a split; raises DataError if it cannot be read."""
    check_features(builder)
    feature = builder.info.features["image"]
    if None not in feature.shape:
        return feature.shape
    source = open_source(builder, split)
    try:
        return feature.decode_example_np(source[0]["image"]).shape
    except Exception as error:  # any exception of a corrupt file
        raise unreadable(builder.data_path, split, 0, error) from None


def unreadable(folder: Path | str, split: str, position: int | str, error: Exception) -> DataError:
    """Return what to raise if an example cannot be read, for any exception of a corrupt file."""
    where, reason = f"{folder}, {split}: example {position} cannot be read", one_line(error)
    if "Too many open files" in reason:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return DataError(
            f"{where}: too many open files; raise the limit of {limit:,} (ulimit -n), one per shard is needed"
        )
    advice = "restore its file, or delete the folder and prepare the data set again"
    return DataError(f"{where} ({reason}); {advice}")


def open_source(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """Return TFDS's random access to a split's examples, images as files.

    Raises:
      DataError: as `check_features`; a file that is missing, or another format than ArrayRecord.
    """
    check_features(builder)
    raise_open_files_limit()
    missing = [path for path in builder.info.splits[split].filepaths if not path.exists()]
    if missing and builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(f"{missing[0]} is missing; restore it, or delete its folder and prepare the data set again")
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise DataError(
            f"config.data_dir: {builder.data_path} is stored as {builder.info.file_format}; training reads "
            "ArrayRecord: prepare it with file_format=array_record"
        ) from None
