"""Section 2 of the paper, once for all training: python -m alexnet_jax.prepare --dataset NAME --data_dir DIR --out DIR

Every image becomes 256×256 RGB, stored as the TFDS data set NAME_256 in ArrayRecord, with the mean image and the
covariance of the colours of its split `train` beside it. A shard is made by one process from a fixed list of images and
appears whole or not at all: so the bytes are the same with any number of workers, and an interrupted run goes on.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image, UnidentifiedImageError

from alexnet_jax import data, report
from alexnet_jax.augment import principal_components
from alexnet_jax.workers import start_worker

log = logging.getLogger(__name__)

SIDE = 256
VERSION = "1.0.0"
SHARD_SIZE = 1024  # images
# With colours at half resolution, Pillow's default. 200 photographs of ImageNet at quality 80, 90 and 95: 15, 22 and
# 31 KB an image, 33.9, 36.3 and 38.4 dB, and 0.28, 0.36 and 0.49 ms to decode (libjpeg-turbo, one core). Full colour
# resolution at 90: 28 KB, 38.2 dB and 0.47 ms.
JPEG_QUALITY = 90
STATISTICS = "statistics.npz"


class PrepareError(Exception):
    """A data set that cannot be prepared; one line that says what to do."""


def to_square(file: bytes) -> np.ndarray:
    """The stored form of an image file (section 2): shorter side to 256, antialiased, then the central 256×256.

    The content tells the format, whatever the file's name says. Grey and CMYK become RGB, 16 bits 8; transparency is
    dropped, and a camera's note on how to turn the image is not followed, as by ImageNet's other readers.

    Returns:
      uint8 [256, 256, 3].

    Raises:
      Exception: of several types, for a file that is no image, not a whole one, one whose numbers have no known range
        (32-bit integers and floats), or one of more pixels than Pillow takes for honest.
    """
    if not file:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the transparency and the camera's notes, which are dropped
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(file)) as image:
                image = _eight_bits(image).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError("not an image") from None
    width, height = (max(SIDE, round(side * SIDE / min(image.size))) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)  # widens its kernel to the scale: antialiased
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no known range; expected 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would cut off all above 255
        return Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
    return image


def to_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


class FolderPart(NamedTuple):
    """Some images of a folder class/name."""

    folder: Path
    paths: Sequence[str]
    classes: Sequence[str]

    def read(self) -> Iterator[tuple[str, bytes, int]]:
        """Name, file and label of each image."""
        for path in self.paths:
            yield path, (self.folder / path).read_bytes(), self.classes.index(path.split("/")[0])

    def fingerprint(self) -> str:
        """Changes with what `read` gives."""
        files = [(path, (self.folder / path).stat()) for path in self.paths]
        return repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in files] + [*self.classes])


class TfdsPart(NamedTuple):
    """Some images of a prepared TFDS data set."""

    folder: Path
    split: str
    places: range

    def read(self) -> Iterator[tuple[str, bytes, int]]:
        """Name, file and label of each image."""
        for place in self.places:
            example = _records(self.folder, self.split)[place]
            yield example.get("file_name", b"%d" % place).decode(), example["image"], int(example["label"])

    def fingerprint(self) -> str:
        return repr(self)


Part = FolderPart | TfdsPart


@functools.lru_cache(maxsize=2)  # an open data set may be a temporary one
def _records(folder: Path, split: str):
    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split, decoders=dict.fromkeys(["image"], tfds.decode.SkipDecoding()))


def folder_parts(
    names: Iterable[str], folder: Path, size: int
) -> tuple[dict[str, list[FolderPart]], tfds.features.ClassLabel | None]:
    """The parts of each split, `size` images each, and the classes, of the files split/class/name of a folder."""
    paths: dict[str, list[str]] = {}
    for split, path in (name.split("/", 1) for name in names):
        if not path.split("/")[1].startswith("."):
            paths.setdefault(split, []).append(path)
    classes = sorted({path.split("/")[0] for split in paths.values() for path in split})
    for split in paths.values():
        split.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
    parts = {
        split: [FolderPart(folder / split, of_split[i : i + size], classes) for i in range(0, len(of_split), size)]
        for split, of_split in sorted(paths.items())
    }
    return parts, tfds.features.ClassLabel(names=classes) if classes else None


def find_parts(dataset: str, data_dir: Path, size: int) -> tuple[dict[str, list[Part]], tfds.features.ClassLabel]:
    """The parts of each split, `size` images each, and the classes: of a prepared TFDS data set or of a folder.

    The images of a folder split/class/name come in an order that is fixed and has nothing to do with the classes, so
    that `train[:90%]` is a fair sample.

    Raises:
      PrepareError: neither of the two is there, or it has no split `train`.
    """
    if any((data_dir / dataset).glob("**/dataset_info.json")):
        builder = data.open_builder(dataset, str(data_dir))
        info, folder = builder.info, Path(builder.data_path)
        if not {"image", "label"} <= set(info.features):
            raise PrepareError(f"--dataset={dataset} has {', '.join(info.features)}; needed: image, label")
        if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise PrepareError(f"{folder} is stored as {info.file_format.value}; needed: array_record")
        sizes = {split: info.splits[split].num_examples for split in sorted(info.splits)}
        parts = {
            split: [TfdsPart(folder, split, range(i, min(i + size, count))) for i in range(0, count, size)]
            for split, count in sizes.items()
        }
        label = info.features["label"]
    else:
        paths = (path for path in data_dir.glob("*/*/*") if path.is_file())
        parts, label = folder_parts((path.relative_to(data_dir).as_posix() for path in paths), data_dir, size)
    if "train" not in parts:
        raise PrepareError(
            f"--data_dir={data_dir}: expected {dataset}/, a prepared TFDS data set, or train/CLASS/IMAGE, and other "
            f"splits like it; found {', '.join(parts) or 'neither'}. {_official(dataset, data_dir)}"
        )
    return parts, label


def _official(dataset: str, data_dir: Path) -> str:
    """How to prepare one of TFDS's own data sets."""
    try:
        return f"TFDS prepares {dataset} with: {''.join(data.how_to_build(dataset, data_dir))}"
    except tfds.core.registered.DatasetNotFoundError:
        return f"TFDS knows no {dataset!r} that it could prepare itself"


class Shard(NamedTuple):
    """The work of one process at a time: a part of a split, and the file that it becomes."""

    split: str
    part: Part
    path: Path
    features: tfds.features.FeaturesDict

    @property
    def sums(self) -> Path:
        """The file beside it with its sums over images and pixels."""
        return self.path.with_name(f"{self.path.name}.npz")


def plan(name: str, parts: dict[str, list[Part]], label: tfds.features.ClassLabel, folder: Path) -> list[Shard]:
    """The shards of the data set `name` in a folder: what there is to do.

    Raises:
      PrepareError: a name that TFDS does not take.
    """
    for word in (name, *parts):
        if not re.fullmatch(r"\w+", word):
            raise PrepareError(f"{word!r}: the names of data sets and splits are letters, digits and _ in TFDS")
    features = tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=label.names),
        "file_name": tfds.features.Text(),
    })  # fmt: skip
    return [
        Shard(split, part, folder / f"{name}-{split}.array_record-{i:05}-of-{len(parts[split]):05}", features)
        for split in parts
        for i, part in enumerate(parts[split])
    ]


class Made(NamedTuple):
    """What is known of a shard once its file is there."""

    fingerprint: str
    examples: int
    file_bytes: int
    undecodable: list[str]


def known(shard: Shard) -> Made:
    """Reads what `make_shard` wrote beside the file."""
    with np.load(shard.sums) as found:
        return Made(*(found[field].tolist() for field in Made._fields))


def make_shard(shard: Shard) -> Made:
    """Writes the file and, beside it, what is known of it; if both are there from the same images, reads the latter."""
    fingerprint = hashlib.sha256(f"{JPEG_QUALITY} {shard.part.fingerprint()}".encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):  # not there, or not whole
        made = known(shard)
        if made.fingerprint == fingerprint and made.file_bytes == shard.path.stat().st_size:
            return made

    examples, undecodable = 0, []
    # Integers are exact in any order: 1,024 images in the first, and all of ImageNet in the second.
    pixel_sum, products = np.zeros((SIDE, SIDE, 3), np.uint32), np.zeros((3, 3), np.int64)
    serializer = tfds.core.example_serializer.ExampleSerializer(shard.features.get_serialized_info())
    temporary = shard.path.with_name(f"{shard.path.name}.writing")
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # each image alone; JPEG is compressed
    for name, file, label in shard.part.read():
        try:
            pixels = to_square(file)
        except Exception as error:  # whatever damage makes Pillow raise
            reason = re.sub(r" <.*>", "", " ".join(str(error).split())) or type(error).__name__  # less an address
            undecodable.append(f"{shard.split}/{name}: {reason}")
            continue
        example = {"image": io.BytesIO(to_jpeg(pixels)), "label": label, "file_name": name}
        example = serializer.get_tf_example(shard.features.encode_example(example))
        writer.write(example.SerializeToString(deterministic=True))
        examples += 1
        pixel_sum += pixels
        flat = pixels.reshape(-1, 3).astype(np.int64)
        products += flat.T @ flat
    writer.close()
    made = Made(fingerprint, examples, temporary.stat().st_size, undecodable)
    temporary.replace(shard.path)
    with open(temporary, "wb") as output:
        fields = {**made._asdict(), "undecodable": np.array(undecodable, str)}
        np.savez(output, pixel_sum=pixel_sum, products=products, **fields)
    temporary.replace(shard.sums)
    return made


def prepare(
    dataset: str,
    data_dir: str | Path,
    out: str | Path,
    workers: int = 0,
    max_undecodable: int = 10,
    shard_size: int = SHARD_SIZE,
) -> Path:
    """Writes the data set `{dataset}_256` below `out`, or goes on with it.

    Args:
      dataset: the name of a TFDS data set that is prepared in `data_dir`, or any name for a folder.
      data_dir: where TFDS keeps prepared data sets, or a folder split/class/name of images.
      workers: processes; 0 for one a core.
      max_undecodable: files that may be left out, because they cannot be decoded, before the preparation fails.
      shard_size: images to a file.

    Returns:
      The folder of the data set, for `tfds.builder_from_directory`. It holds `statistics.npz` too: of the split
      `train`, in float64 and for pixels in 0 to 255, `mean_image` [256, 256, 3], `covariance` [3, 3], `eigenvalues`
      [3], largest first, and `eigenvectors` [3, 3], a column each; and `undecodable.txt`, if there is such a file.

    Raises:
      PrepareError: nothing to prepare, or too many files that cannot be decoded.
      data.DataError, OSError.
    """
    name, workers = f"{dataset}_{SIDE}", workers or len(os.sched_getaffinity(0))
    folder = Path(out).absolute() / name / VERSION
    if (folder / "dataset_info.json").exists():
        log.info("%s is prepared already", folder)
        return folder
    if folder.exists():
        raise PrepareError(f"{folder} is not whole, and not this command's; remove it")
    parts, label = find_parts(dataset, Path(data_dir).absolute(), shard_size)
    work = folder.with_name(f"incomplete.{VERSION}")
    shards = plan(name, parts, label, work)
    work.mkdir(parents=True, exist_ok=True)
    with _only_writer(work):
        made = _make_all(shards, workers, max_undecodable)
        finish(work, shards, made)
        work.rename(folder)
    return folder


@contextlib.contextmanager
def _only_writer(work: Path) -> Iterator[None]:
    folder = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PrepareError(f"another process is preparing {work.parent}; wait for it, or stop it") from None
    finally:
        os.close(folder)


def _make_all(shards: Sequence[Shard], workers: int, max_undecodable: int) -> list[Made]:
    """All shards, in processes; raises PrepareError as soon as too many files could not be decoded."""
    undecodable: list[str] = []
    progress = report.Progress(len(shards), 0)
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would not survive
    started, images = time.monotonic(), 0
    with ProcessPoolExecutor(workers, context, start_worker) as pool:
        futures = [pool.submit(make_shard, shard) for shard in shards]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                images += future.result().examples
                undecodable += future.result().undecodable
                check_undecodable(undecodable, max_undecodable)
                progress.advance()
                if done * 100 // len(shards) > (done - 1) * 100 // len(shards):
                    seconds = time.monotonic() - started
                    progress.show(
                        done, seconds * (len(shards) / done - 1), images=f"{images:,}",
                        images_per_s=f"{images / seconds:.0f}", undecodable=str(len(undecodable)),
                    )  # fmt: skip
        except BrokenProcessPool:
            raise PrepareError("a worker was killed (out of memory?); run the same command again, it goes on") from None
        finally:
            progress.close()
            pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def check_undecodable(undecodable: Sequence[str], limit: int) -> None:
    """Raises PrepareError, with the names, if there are more than `limit`."""
    if len(undecodable) > limit:
        raise PrepareError(
            f"{len(undecodable)} files cannot be decoded, more than --max_undecodable={limit}: "
            f"{'; '.join(sorted(undecodable))}. Repair or remove them, and run the same command again"
        )


def finish(work: Path, shards: Sequence[Shard], made: Sequence[Made]) -> None:
    """Writes what makes the shards a data set, from the sums beside them; nothing else stays in the folder."""
    principal = statistics(shard.sums for shard in shards if shard.split == "train")
    for leftover in set(work.iterdir()) - {shard.path for shard in shards}:
        leftover.unlink()
    np.savez(work / STATISTICS, **principal)
    splits = []
    for split, group in itertools.groupby(zip(shards, made, strict=True), lambda pair: pair[0].split):
        of_split = [m for _, m in group]
        splits.append(tfds.core.SplitInfo(split, [m.examples for m in of_split], sum(m.file_bytes for m in of_split)))
    tfds.folder_dataset.write_metadata(
        data_dir=work, features=shards[0].features, split_infos=splits, version=VERSION, check_data=False,
        description=f"Shorter side to {SIDE}, central {SIDE}×{SIDE}, JPEG of quality {JPEG_QUALITY}.",
    )  # fmt: skip
    undecodable = [name for m in made for name in m.undecodable]
    if undecodable:
        (work / "undecodable.txt").write_text("\n".join(undecodable) + "\n")
    rows = [(split.name, split.num_examples, f"{split.num_bytes / 1e6:.1f}") for split in splits]
    log.info("%s", report.table(rows, ("split", "images", "MB")))
    log.info("%d files could not be decoded%s", len(undecodable), "".join(f"\n  {x}" for x in undecodable))


def statistics(files: Iterable[Path]) -> dict[str, np.ndarray]:
    """From the sums of the shards, the mean image and the principal components of the colours (sections 2 and 4.1)."""
    images, pixel_sum, products = 0, np.zeros((SIDE, SIDE, 3), np.int64), np.zeros((3, 3), np.int64)
    for file in files:
        with np.load(file) as sums:
            images += int(sums["examples"])
            pixel_sum += sums["pixel_sum"]
            products += sums["products"]
    if not images:
        raise PrepareError("no image of the split `train` could be decoded")
    colours = principal_components(images * SIDE**2, pixel_sum.sum((0, 1)), products)
    names = ("mean_image", "covariance", "eigenvalues", "eigenvectors")
    return dict(zip(names, (pixel_sum / images, *colours), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.prepare", description="Section 2 of the paper, once.")
    parser.add_argument("--dataset", required=True, help="a TFDS data set in --data_dir, or a name for a folder")
    parser.add_argument("--data_dir", required=True, help="where TFDS keeps data sets, or a folder split/class/image")
    parser.add_argument("--out", required=True, help="where the data set NAME_256 goes")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    parser.add_argument("--max_undecodable", type=int, default=10, help="files that may be left out before it fails")
    flags = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        folder = prepare(**vars(flags))
    except (PrepareError, data.DataError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        sys.exit(128 + signal.SIGINT)
    print(f"{folder}: train with --config.dataset={folder.parent.name} --config.data_dir={folder.parent.parent}")


if __name__ == "__main__":
    main()
