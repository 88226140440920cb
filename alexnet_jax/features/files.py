"""Features of many images in one file, written batch by batch: HDF5, which resumes, or NumPy's .npz."""

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from alexnet_jax.errors import UserError, one_line
from alexnet_jax.runtime.files import replaced

SUFFIXES = (".npz", ".h5")
TODO, VALID, FAILED = 0, 1, 2  # of a row


class FeatureFileError(UserError):
    """A file of features that cannot be written, or resumed."""


class Rows(NamedTuple):
    """What the rows of a file are.

    Attributes:
      names: of the images.
      labels: int32 [N], places in `class_names`; −1 for an image without a label, or one that is not yet read.
      class_names: the names of the classes.
    """

    names: Sequence[str]
    labels: np.ndarray
    class_names: Sequence[str]


class Writer(NamedTuple):
    """Arrays of all rows: `labels` and those of the layers, and `state`, which is TODO from `first` on."""

    arrays: Mapping[str, Any]
    state: Any
    first: int

    def write(self, start: int, values: Mapping[str, np.ndarray], valid: np.ndarray) -> None:
        """Write rows from `start` on; values of rows that are not valid are NaN.

        Raises:
          FeatureFileError: a value that the type of the file cannot hold.
        """
        part = slice(start, start + len(valid))
        for name, x in values.items():
            with np.errstate(over="ignore"):
                stored = x.astype(self.arrays[name].dtype)
            if np.isinf(stored).any() and not np.isinf(x).any():
                raise FeatureFileError(f"layer {name!r} exceeds {stored.dtype}, at most 65,504; use --dtype float32")
            self.arrays[name][part] = stored
        self._flush()  # the rows are there before they are marked
        self.state[part] = np.where(valid, VALID, FAILED)
        self._flush()

    def _flush(self):
        if isinstance(self.state, h5py.Dataset):
            self.state.file.flush()


@contextlib.contextmanager
def open_writer(
    path: Path, rows: Rows, shapes: Mapping[str, tuple[int, ...]], dtype: str, settings: Mapping[str, Any]
) -> Iterator[Writer]:
    """Open a file to write; it appears at `path` when the block ends without an exception.

    It has an array for each layer [N, …], and `names`, `labels`, `class_names` as in `Rows`, and `valid`, bool [N]:
    False for an image that could not be read, whose rows are NaN. HDF5 is written to PATH.partial, from which the same
    settings resume.

    Args:
      shapes: of each layer's output of one image.
      settings: of JSON's types: what the rows depend on.

    Raises:
      FeatureFileError: it cannot be written; or PATH.partial is of other settings, or corrupt.
    """
    size = len(rows.names) * sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(dtype).itemsize
    write = _hdf5 if path.suffix == ".h5" else _npz
    try:
        with write(path, rows, shapes, dtype, json.dumps(settings, sort_keys=True), size) as writer:
            yield writer
    except OSError as error:
        raise FeatureFileError(f"{path} cannot be written: {one_line(error)}") from None


def _require_space(folder: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(folder).free):
        raise FeatureFileError(
            f"{folder} has {free / 1e9:.1f} GB free; expected {size / 1e9:.1f} GB (fewer layers or --dtype float16 "
            "take less)"
        )


@contextlib.contextmanager
def _hdf5(path, rows, shapes, dtype, settings, size):
    partial = path.with_name(f"{path.name}.partial")
    if not partial.exists():
        _require_space(path.parent, size)
        _create_hdf5(partial, rows, shapes, dtype, settings)
    try:
        file = h5py.File(partial, "r+")
    except OSError as error:
        raise FeatureFileError(
            f"{partial} cannot be resumed ({one_line(error)}); wait for the process that writes it, or delete it"
        ) from None
    with file:
        if file.attrs.get("settings") != settings:
            raise FeatureFileError(
                f"{partial} was begun with other images, layers, weights or types; delete it, or name another --out"
            )
        state = file["state"]
        yield Writer(file, state, int(np.count_nonzero(state[:])))
        file["valid"] = state[:] == VALID
        del file["state"]
    partial.replace(path)


def _create_hdf5(path, rows, shapes, dtype, settings):
    """Create all datasets at their full size: later nothing but rows is written, so that a crash corrupts nothing."""
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    text = h5py.string_dtype()
    with replaced(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("names", data=list(rows.names), dtype=text)
        file.create_dataset("class_names", data=list(rows.class_names), shape=(len(rows.class_names),), dtype=text)
        file.create_dataset("labels", data=rows.labels)
        for name, shape in shapes.items():
            file.create_dataset(name, (len(rows.names), *shape), dtype, dcpl=early)
        file.create_dataset("state", data=np.full(len(rows.names), TODO, np.uint8))
        file.attrs["settings"] = settings


@contextlib.contextmanager
def _npz(path, rows, shapes, dtype, settings, size):
    _require_space(path.parent, 2 * size)  # the arrays, then the archive
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        files = {name: Path(folder) / f"{i}.npy" for i, name in enumerate(shapes)}
        arrays = {
            name: np.lib.format.open_memmap(file, "w+", dtype, (len(rows.names), *shapes[name]))
            for name, file in files.items()
        }
        state = np.full(len(rows.names), TODO, np.uint8)
        labels = np.array(rows.labels)
        yield Writer(arrays | {"labels": labels}, state, 0)
        for array in arrays.values():
            array.flush()
        others = {"labels": labels, "valid": state == VALID}
        others |= {"names": np.array(rows.names, str), "class_names": np.array(rows.class_names, str)}
        for name, x in others.items():
            files[name] = Path(folder) / f"{name}.npy"
            np.save(files[name], x)
        with replaced(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, file in files.items():
                archive.write(file, f"{name}.npy")
