"""Write the features of many images: python -m alexnet_jax.features RUN_OR_FILE IMAGES --layers conv5,fc7 --out FILE.h5

IMAGES is a folder, a text file with the path of an image a line, or a split of a TFDS data set: DATASET:SPLIT, or SPLIT
alone for the data set of the run.
"""

import argparse
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.checkpoint import silence_orbax
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.data.images import decode, read_image
from alexnet_jax.data.source import open_source
from alexnet_jax.errors import UserError, one_line
from alexnet_jax.features.extraction import BATCH, extractor, features
from alexnet_jax.features.files import FAILED, SUFFIXES, Rows, open_writer
from alexnet_jax.preparation.sources import SYSTEM_NAMES
from alexnet_jax.progress import Progress
from alexnet_jax.run import Run, open_named_dataset, open_run
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.runtime.files import user_path
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.runtime.output import command_name, escape_output, escaped
from alexnet_jax.runtime.workers import available_cores

__all__ = ["FeaturesError", "features", "main", "write_features"]


class FeaturesError(UserError):
    """Images, layers or an output that features cannot be made of."""


class Images(NamedTuple):
    """Images in their order, each read when it is needed.

    Attributes:
      rows: their names and labels.
      read: the image at a place, uint8 [H, W, C] as the network takes it; any exception if it cannot be read.
      threads: how many may be read at the same time.
    """

    rows: Rows
    read: Callable[[int], np.ndarray]
    threads: int


def open_images(text: str, run: Run, data_dir: str = "") -> Images:
    """Return the images of a folder, a list or a split, as the command takes them; raises FeaturesError, DataError."""
    path = user_path(text, "IMAGES")
    if path.is_dir():
        files = list(_files(path))
        names = [os.path.relpath(file, path) for file in files]
        classes = [name.split(os.sep)[0] if os.sep in name else None for name in names]
        return _of_files(files, names, classes, text, run)
    if path.is_file():
        try:
            lines = [line.split("\t") for line in path.read_text("utf-8").splitlines() if line.strip()]
        except ValueError:
            raise FeaturesError(f"{path} is not text; expected a list with the path of an image a line") from None
        names = [line[0] for line in lines]
        classes = [line[1].strip() if len(line) > 1 else None for line in lines]
        return _of_files([path.parent / name for name in names], names, classes, text, run)
    if os.sep in text:
        raise FeaturesError(f"{path}: no such folder or list; expected one, or a split of a data set (cifar10:test)")
    name, separator, split = text.partition(":") if ":" in text.split("[")[0] else ("", "", text)
    if not separator and not run.weights.dataset:
        raise FeaturesError(
            f"{text}: no such folder or list, and {run.path} names no data set; expected one of these, or DATASET:SPLIT"
        )
    return _of_split(open_named_dataset(name, data_dir) if separator else run.dataset, split, run)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and those below it, without hidden ones and those of operating systems."""

    def shown(names):
        return sorted(name for name in names if name[0] != "." and name.lower() not in SYSTEM_NAMES)

    for parent, folders, names in os.walk(folder):
        folders[:] = shown(folders)  # those that `walk` enters
        yield from (Path(parent) / name for name in shown(names))


def _of_files(
    files: Sequence[Path], names: Sequence[str], classes: Sequence[str | None], text: str, run: Run
) -> Images:
    if not files:
        raise FeaturesError(f"{text} holds no images; expected at least one")
    class_names = sorted({name for name in classes if name is not None})
    place = {name: i for i, name in enumerate(class_names)} | {None: -1}
    labels = np.array([place[name] for name in classes], np.int32)
    rows = Rows([escaped(name) for name in names], labels, [escaped(name) for name in class_names])
    shape, resizing = run.preprocess.mean.shape, run.weights.resizing
    return Images(rows, lambda i: read_image(files[i], shape, resizing=resizing), available_cores())


def _of_split(dataset: Dataset, split: str, run: Run) -> Images:
    size, shape = dataset.size(split), run.preprocess.mean.shape
    stored = dataset.builder.info.features["image"].shape
    if None not in stored and stored != shape:
        sizes = ["×".join(map(str, x)) for x in (stored, shape)]
        raise FeaturesError(
            f"{dataset.full_name} has images of {sizes[0]}; expected {sizes[1]}, as {run.path} takes them"
        )
    source = open_source(dataset.builder, split)
    labels = np.full(size, -1, np.int32)

    def read(i):
        example, image = source[i], np.empty(shape, np.uint8)
        labels[i] = example["label"]
        decode(example["image"], image)
        return image

    names = [f"{dataset.full_name}:{split}#{i}" for i in range(size)]
    return Images(Rows(names, labels, dataset.class_names), read, 1)


@run_settings()
def write_features(
    run: Run, images: Images, layers: Sequence[str], out: Path, dtype: str = "float32", batch_size: int = BATCH
) -> int:
    """Write the features of images, of their center crops, and return how many images could not be read.

    Each of these is named in an error that is printed. An interrupted .h5 is resumed.

    Raises:
      FeaturesError: no such layer.
      feature_files.FeatureFileError: the file cannot be written, or was begun with other settings.
    """
    shape = run.preprocess.mean.shape
    try:
        call, shapes = extractor(run.model, run.weights.params, shape, layers, batch_size, run.preprocess)
    except ValueError as error:
        raise FeaturesError(str(error)) from None
    rows, preprocess, params = images.rows, run.preprocess, run.weights.params
    network = run.model, run.weights.resizing, preprocess.pad, preprocess.crop, preprocess.resize, preprocess.scale
    arrays = [preprocess.mean] + [params[layer][name] for layer in sorted(params) for name in ("kernel", "bias")]
    settings = {
        "layers": list(shapes),
        "dtype": dtype,
        "images": _digest(repr((rows.names, rows.class_names)), rows.labels),
        "weights": _digest(repr(network), *arrays),
    }
    total, unreadable = len(rows.names), np.zeros(shape, np.uint8)
    with open_writer(out, rows, shapes, dtype, settings) as writer:
        progress, started = Progress(total, writer.first), time.monotonic()
        failed = int(np.count_nonzero(writer.state[: writer.first] == FAILED))
        for start, pixels in _read_ahead(images, range(writer.first, total, batch_size), batch_size):
            done = start + len(pixels)
            valid = np.ones(len(pixels), bool)
            for i, x in enumerate(pixels):
                if isinstance(x, Exception):
                    valid[i] = False
                    pixels[i] = unreadable
                    print(f"Error: {rows.names[start + i]}: {one_line(x, 500)}", file=sys.stderr, flush=True)
            values = call(np.stack(pixels))
            values = {k: np.where(valid.reshape(-1, *[1] * (v.ndim - 1)), v, np.nan) for k, v in values.items()}
            writer.write(start, values | {"labels": rows.labels[start:done]}, valid)
            failed += int(np.count_nonzero(~valid))
            progress.advance(len(pixels))
            if done * 10 // total > start * 10 // total:
                rate = (done - writer.first) / (time.monotonic() - started)
                progress.show(done, (total - done) / rate, images_per_s=f"{rate:.1f}")
        progress.close()
    return failed


def _digest(text: str, *arrays: Any) -> str:
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()


def _read_ahead(images: Images, starts: range, size: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield the batches that begin at `starts`, with an exception for an image that cannot be read.

    The next batch is read while one is used.
    """

    def read(i):
        try:
            return images.read(i)
        except Exception as error:  # any exception of a corrupt file
            return error

    total, ahead = len(images.rows.names), None
    with ThreadPoolExecutor(images.threads) as pool:
        for start in starts:
            batch = ahead or [pool.submit(read, i) for i in range(start, min(start + size, total))]
            ahead = [pool.submit(read, i) for i in range(start + size, min(start + 2 * size, total))]
            yield start, [future.result() for future in batch]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=command_name("alexnet_jax.features"), description="Write the outputs of a network's layers on many images."
    )
    parser.add_argument("network", metavar="RUN_OR_FILE", help="a run's workdir, or a file of weights")
    parser.add_argument(
        "images", metavar="IMAGES", help="a folder; a text file with a path a line, and a label after a tab; a split "
        "of the run's data set (test[:1000]); or another's (cifar10:test)",
    )  # fmt: skip
    parser.add_argument("--layers", required=True, help="names separated by commas: conv5,fc7,conv3:pre,features.10")
    parser.add_argument("--out", required=True, help="the file to write: .h5, which resumes, or .npz")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="of what is written")
    parser.add_argument("--batch_size", default=BATCH, type=int, help=f"images at a time (default: {BATCH})")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps data sets (default: as in training)")
    parser.add_argument("--compile_cache", help="folder of compiled programs, as for alexnet_jax.main")
    flags = parser.parse_args()
    escape_output()
    silence_orbax()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        out = user_path(flags.out, "--out")
        if out.suffix not in SUFFIXES or not out.parent.is_dir():
            raise FeaturesError(f"--out={out}: expected a file {' or '.join(SUFFIXES)} in an existing folder")
        if out.exists():
            raise FeaturesError(f"--out={out} exists; delete it, or name another file")
        use_compilation_cache(flags.compile_cache)
        run = open_run(flags.network, flags.data_dir)
        images = open_images(flags.images, run, flags.data_dir)
        layers = [name.strip() for name in flags.layers.split(",") if name.strip()]
        failed = write_features(run, images, layers, out, flags.dtype, flags.batch_size)
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        if out.suffix == ".h5":
            print("Interrupted; run the same command to resume", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    print(f"Written to {out}" + f" ({failed} images could not be read; their rows are NaN)" * bool(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
