"""Compare the loader with its decoder alone and with PyTorch's DataLoader: python -m experiments.loader --workdir DIR

All read the same 256×256 JPEGs with `--workers` processes, in alternation. A loader that is not being measured is idle,
with full buffers.
"""

import argparse
import contextlib
import datetime
import importlib.util
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax import augment, data, sharding
from alexnet_jax.data import streaming
from alexnet_jax.data.images import SIDE, decode
from alexnet_jax.data.source import open_source
from alexnet_jax.errors import UserError, errors_on_one_line
from alexnet_jax.preparation.local import VERSION, prepare
from alexnet_jax.runtime.files import write_json
from alexnet_jax.runtime.signals import exit_at_signals
from alexnet_jax.runtime.workers import available_cores
from alexnet_jax.tables import table
from experiments.command import make_workdir, write_text

DECODER, LOADER, PLACED = "decoder alone", "loader", "loader, onto the device"
CROPPED, TORCH = "loader, onto the device, crop and flip", "torch DataLoader, Pillow, crop and flip"
BATCH_SIZE = 128
SKIPPED = 8  # batches per worker before each measurement: those in the buffers


def make_images(folder: Path, count: int = 200) -> None:
    """Draw images with the spectrum of photographs."""
    folder.mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        sides = [2**k for k in range(1, 9)]
        octaves = (rng.normal(0, 60 / side**0.7, (side, side, 3)) for side in sides)
        images = [np.stack([np.asarray(Image.fromarray(o[..., c].astype(np.float32)).resize((320, 256), 3))
                            for c in range(3)], -1) for o in octaves]  # fmt: skip
        Image.fromarray(np.clip(128 + sum(images), 0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)


def prepare_once(images: Path | None, workdir: Path) -> tuple[Path, list[bytes]]:
    """Prepare the data set, unless it is prepared; return its folder and its JPEGs as bytes."""
    out = workdir / "loader_256" / VERSION
    if not out.exists():
        root = workdir / "images"
        if images is None and not (root / "train" / "all").exists():
            make_images(root / "train" / "all")
        elif images is not None:
            (root / "train" / "all").mkdir(parents=True, exist_ok=True)
            for path in sorted(p for p in images.rglob("*") if p.is_file()):
                (root / "train" / "all" / "_".join(path.relative_to(images).parts)).write_bytes(path.read_bytes())
        prepare("loader", root, workdir, shard_size=8)  # many files, as of a large data set
    builder = tfds.builder_from_directory(out)
    files = [example["image"] for example in open_source(builder, "train")]
    if len(files) < BATCH_SIZE:
        raise UserError(f"--images: {len(files)} images; expected at least {BATCH_SIZE}, and with them a new --workdir")
    (workdir / "jpegs").mkdir(exist_ok=True)
    for i, file in enumerate(files):
        (workdir / "jpegs" / f"{i}.jpg").write_bytes(file)
    return out, files


def _decode_for(seconds: float, files: list[bytes]) -> float:
    out, count, started = np.empty((SIDE, SIDE, 3), np.uint8), 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        for file in files:
            decode(file, out)
        count += len(files)
    return count / spent


def decoder_alone(files: list[bytes], pool: Pool, workers: int) -> Callable[[float], float]:
    """Return a function of seconds to the decoder's images/s: files in memory, one output array, a pool's processes."""
    pool.starmap(_decode_for, [(0.1, files)] * workers)
    return lambda seconds: sum(pool.starmap(_decode_for, [(seconds, files)] * workers))


def rate(batches: Iterator[Any], batch_size: int, workers: int, seconds: float) -> float:
    """Return images/s of an endless iterator over batches."""
    for _ in range(SKIPPED * workers):
        next(batches)
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        next(batches)
        count += batch_size
    return count / spent


def loader(folder: Path, batch_size: int, workers: int) -> Iterator[Any]:
    """Return an iterator over batches in host memory."""
    builder = tfds.builder_from_directory(folder)
    order = streaming.Shuffled(data.split_size(builder, "train"), batch_size, seed=0)
    decoder = streaming.Decoder(builder, "train", slice(None))
    return streaming.decoded_batches(range(sys.maxsize), order, decoder, workers)


def placed(folder: Path, batch_size: int, workers: int) -> Iterator[data.Batch]:
    """Yield batches on the device, as training reads them, when they have arrived."""
    builder, key, step = tfds.builder_from_directory(folder), jax.random.key(0), 0
    streamed = streaming.StreamedData(builder, "train", batch_size, sharding.one_device(), workers)
    with contextlib.closing(streamed):
        while True:
            yield jax.block_until_ready(streamed.batch(key, step))
            step += 1


@jax.jit
def _crop_and_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    crop_key, flip_key = jax.random.split(key)
    return augment.random_flip(flip_key, augment.random_crop(crop_key, images, 224))


def cropped(batches: Iterator[data.Batch]) -> Iterator[jax.Array]:
    """Yield the batches after crop and flip, with which the train step begins."""
    with contextlib.closing(batches):
        for i, batch in enumerate(batches):
            yield jax.block_until_ready(_crop_and_flip(jax.random.key(i), batch.images))


class Folder:
    """The same JPEGs for PyTorch: read, decoded by Pillow, with random crop and horizontal flip, uint8."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        with Image.open(self.paths[index * 7919 % len(self.paths)]) as image:
            pixels = np.asarray(image.convert("RGB"))
        rng = np.random.default_rng(index)
        top, left, flip = rng.integers(0, 33), rng.integers(0, 33), rng.integers(0, 2)
        pixels = pixels[top : top + 224, left : left + 224]
        return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels), 0


def torch_loader(folder: Path, batch_size: int, workers: int) -> Iterator[Any]:
    """Return PyTorch's DataLoader over `Folder`."""
    from torch.utils.data import DataLoader  # PyTorch is optional

    return iter(DataLoader(Folder(folder), batch_size, num_workers=workers, multiprocessing_context="spawn"))


def compare(workdir: Path, images: Path | None, workers: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Return the rates of all loaders in each round, their medians, and two ratios of medians."""
    folder, files = prepare_once(images, workdir)
    with contextlib.ExitStack() as opened:
        pool = opened.enter_context(multiprocessing.get_context("spawn").Pool(workers))
        iterators = {
            LOADER: loader(folder, BATCH_SIZE, workers),
            PLACED: placed(folder, BATCH_SIZE, workers),
            CROPPED: cropped(placed(folder, BATCH_SIZE, workers)),
        }
        for batches in iterators.values():
            opened.enter_context(contextlib.closing(batches))
        if importlib.util.find_spec("torch"):
            iterators[TORCH] = torch_loader(workdir / "jpegs", BATCH_SIZE, workers)
        loaders = {DECODER: decoder_alone(files, pool, workers)}
        loaders |= {name: partial(rate, batches, BATCH_SIZE, workers) for name, batches in iterators.items()}
        for measure in loaders.values():
            measure(0.0)  # starts its processes
        rates = {name: [] for name in loaders}
        for i in range(rounds):
            for name, measure in loaders.items():
                rates[name].append(measure(seconds))
                print(f"round {i + 1}/{rounds}  {name}  {rates[name][-1]:.0f} images/s", flush=True)
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "date": f"{datetime.date.today():%-d %B %Y}",
        "cores": available_cores(),
        "workers": workers,
        "batch_size": BATCH_SIZE,
        "jpeg_bytes": round(sum(map(len, files)) / len(files)),
        "images_per_s": rates,
        "median": medians,
        "loader_over_decoder": medians[LOADER] / medians[DECODER],
        "loader_over_torch": medians[CROPPED] / medians[TORCH] if TORCH in medians else None,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the result in Markdown."""
    rows = [
        (name, f"{result['median'][name]:.0f}", f"{min(rates):.0f} to {max(rates):.0f}")
        for name, rates in result["images_per_s"].items()
    ]
    rounds, over_torch = len(result["images_per_s"][LOADER]), result["loader_over_torch"]
    torch = f"with crop and flip, {over_torch:.2f} times PyTorch's" if over_torch else "PyTorch is not installed"
    return (
        f"{table(rows, ('stage', 'images/s', 'range'), markdown=True)}\n\n"
        f"Medians of {rounds} rounds; {result['workers']} processes on {result['cores']} cores; 256×256 JPEGs of "
        f"{result['jpeg_bytes'] / 1000:.1f} KB; {result['date']}. The loader reaches "
        f"{result['loader_over_decoder']:.1%} of its decoder's rate; {torch}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for the prepared set, loader.json and loader.md")
    parser.add_argument("--images", type=Path, help="a folder of images (default: images are drawn)")
    parser.add_argument("--workers", type=int, default=0, help="worker processes (default: one per core)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each loader (default: 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement (default: 4)")
    flags = parser.parse_args()
    exit_at_signals()
    with errors_on_one_line():
        if flags.images and not any(path.is_file() for path in flags.images.rglob("*")):
            raise UserError(f"--images={flags.images}: expected a folder with images")
        if flags.rounds < 1 or flags.seconds <= 0 or flags.workers < 0:
            raise UserError("expected --rounds of at least 1, --seconds above 0 and --workers of 0 or more")
        make_workdir(flags.workdir)
        workers = flags.workers or available_cores()
        result = compare(flags.workdir.absolute(), flags.images, workers, flags.rounds, flags.seconds)
        write_json(flags.workdir / "loader.json", result)
        write_text(flags.workdir / "loader.md", markdown(result) + "\n")
    print(f"\n{markdown(result)}\n\nWritten to {flags.workdir}")


if __name__ == "__main__":
    main()
