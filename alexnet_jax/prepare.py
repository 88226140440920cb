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
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePath
from types import FrameType
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from alexnet_jax import data, report
from alexnet_jax.augment import principal_components
from alexnet_jax.images import JPEG_QUALITY, SIDE, to_jpeg, to_square
from alexnet_jax.workers import signals_held, start_worker

log = logging.getLogger(__name__)

VERSION = "1.0.0"
SHARD_SIZE = 1024  # images, at most
STATISTICS = "statistics.npz"
UNDECODABLE = "undecodable.txt"
HANDFUL = 5  # names that a message holds


class PrepareError(Exception):
    """A data set that cannot be prepared; one line that says what to do."""


def _reason(error: Exception) -> str:
    """One line, less an address."""
    return re.sub(r" <.*>", "", " ".join(str(error).split()))[:200] or type(error).__name__


class FolderPart(NamedTuple):
    """Some images of a folder class/name."""

    folder: Path
    paths: Sequence[str]
    classes: Sequence[str]

    @property
    def size(self) -> int:
        return len(self.paths)

    def read(self) -> Iterator[tuple[str, bytes, int]]:
        """Name, file and label of each image; raises data.DataError if a file cannot be read."""
        for path in self.paths:
            try:
                file = (self.folder / path).read_bytes()
            except OSError as error:
                raise data.DataError(f"{self.folder / path} cannot be read ({error.strerror})") from None
            yield path, file, self.classes.index(path.split("/")[0])

    def fingerprint(self) -> str:
        """Changes with what `read` gives."""
        files = [(path, (self.folder / path).stat()) for path in self.paths]
        return repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in files] + [*self.classes])


class TfdsPart(NamedTuple):
    """Some images of a prepared TFDS data set."""

    folder: Path
    split: str
    places: range

    @property
    def size(self) -> int:
        return len(self.places)

    def read(self) -> Iterator[tuple[str, bytes, int]]:
        """Name, file and label of each image; raises data.DataError if the data set is damaged."""
        for place in self.places:
            try:
                example = _records(self.folder, self.split)[place]
            except Exception as error:  # whatever the damage makes the reader raise
                raise data.DataError(
                    f"{self.folder}, {self.split}: example {place} cannot be read ({_reason(error)}); restore its "
                    "file, or delete the folder and make the data set again"
                ) from None
            yield example.get("file_name", b"%d" % place).decode(), example["image"], int(example["label"])

    def fingerprint(self) -> str:
        return repr(self)


Part = FolderPart | TfdsPart


@functools.lru_cache(maxsize=2)  # an open data set may be a temporary one
def _records(folder: Path, split: str):
    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split, decoders=dict.fromkeys(["image"], tfds.decode.SkipDecoding()))


def _pieces(images: int, size: int) -> list[range]:
    """Consecutive places, up to `size` of them each, and fewer where that leaves cores without work."""
    size = min(size, max(16, -(-images // 64)))
    return [range(i, min(i + size, images)) for i in range(0, images, size)]


def _hidden(name: str) -> bool:
    return any(word.startswith(".") for word in name.split("/"))


def folder_parts(
    files: Iterable[str], folder: Path, size: int, others: Iterable[str] = ()
) -> tuple[dict[str, list[FolderPart]], tfds.features.ClassLabel | None]:
    """The parts of each split, up to `size` images each, and the classes, of the files split/class/name of a folder.

    A line says what is passed over: files that lie otherwise, and `others`. What is hidden is not looked at.
    """
    paths: dict[str, list[str]] = {}
    passed_over = {name for name in others if not _hidden(name)}
    for file in files:
        if _hidden(file):
            continue
        if file.count("/") == 2:
            split, path = file.split("/", 1)
            paths.setdefault(split, []).append(path)
        else:
            passed_over.add(file)
    if passed_over:
        more = f" and {len(passed_over) - HANDFUL:,} more" if len(passed_over) > HANDFUL else ""
        some = ", ".join(sorted(passed_over)[:HANDFUL])
        log.info("passed over, as no split/class/image: %s%s", some, more)
    classes = sorted({path.split("/")[0] for split in paths.values() for path in split})
    for split in paths.values():
        split.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
    parts = {
        split: [FolderPart(folder / split, [of_split[i] for i in p], classes) for p in _pieces(len(of_split), size)]
        for split, of_split in sorted(paths.items())
    }
    return parts, tfds.features.ClassLabel(names=classes) if classes else None


def find_parts(dataset: str, data_dir: Path, size: int) -> tuple[dict[str, list[Part]], tfds.features.ClassLabel]:
    """The parts of each split, up to `size` images each, and the classes: of a prepared TFDS data set or of a folder.

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
            split: [TfdsPart(folder, split, piece) for piece in _pieces(count, size)]
            for split, count in sizes.items()
        }
        label = info.features["label"]
    else:
        found = (path for pattern in ("*", "*/*", "*/*/*") for path in data_dir.glob(pattern))
        files, others = [], set()
        for path in found:
            (files.append if path.is_file() else others.add)(path.relative_to(data_dir).as_posix())
        for split, folder, *image in (file.split("/") for file in files if "/" in file):  # ways to an image
            others -= {split, f"{split}/{folder}"} if image else set()
        parts, label = folder_parts(files, data_dir, size, others)
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
      PrepareError: a split's name that TFDS does not take.
    """
    for split in parts:
        if not re.fullmatch(r"\w+", split):
            raise PrepareError(f"split {split!r}: expected a name of letters, digits and _, as TFDS has them")
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

    temporary = shard.path.with_name(f"{shard.path.name}.writing")
    try:
        return _write_shard(shard, fingerprint, temporary)
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
        temporary.unlink(missing_ok=True)
        raise not_written(shard.path, error) from None


def not_written(path: Path, error: OSError | RuntimeError) -> PrepareError:
    """What to raise where --out does not take what is written."""
    reason = getattr(error, "strerror", None) or _reason(error).split(";")[0]
    return PrepareError(
        f"--out: {path} cannot be written ({reason}); make room, or name a folder that can be written; what is "
        "finished stays, and the same command goes on"
    )


def _write_shard(shard: Shard, fingerprint: str, temporary: Path) -> Made:
    examples, undecodable = 0, []
    # Integers are exact in any order: 1,024 images in the first, and all of ImageNet in the second.
    pixel_sum, products = np.zeros((SIDE, SIDE, 3), np.uint32), np.zeros((3, 3), np.int64)
    serializer = tfds.core.example_serializer.ExampleSerializer(shard.features.get_serialized_info())
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # each image alone; JPEG is compressed
    for name, file, label in shard.part.read():
        try:
            pixels = to_square(file)
        except Exception as error:  # whatever damage makes Pillow raise
            undecodable.append(f"{shard.split}/{name}: {_reason(error)}")
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
      PrepareError: nothing to prepare, a value or an `out` that does not do, or too many files that cannot be decoded.
      data.DataError: a source that is damaged.
      OSError: a source that cannot be read.
    """
    check_values(dataset, max_undecodable, workers)
    name, workers = f"{dataset}_{SIDE}", workers or len(os.sched_getaffinity(0))
    folder = Path(out).absolute() / name / VERSION
    if (folder / "dataset_info.json").exists():
        _check_prepared(folder, max_undecodable)
        return folder
    if folder.exists():
        raise PrepareError(f"{folder} is not whole, and not this command's; remove it")
    parts, label = find_parts(dataset, Path(data_dir).absolute(), shard_size)
    check_apart(parts["train"][0], Path(data_dir).resolve(), folder.parent.resolve())
    work = folder.with_name(f"incomplete.{VERSION}")
    shards = plan(name, parts, label, work)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(work, error) from None
    with _only_writer(work):
        made = _make_all(shards, workers, max_undecodable)
        try:
            finish(work, shards, made)
            work.rename(folder)
        except (OSError, RuntimeError) as error:
            raise not_written(folder, error) from None
    return folder


def check_values(dataset: str, max_undecodable: int, workers: int = 0) -> None:
    """Raises PrepareError for values that no data set could make right."""
    if not re.fullmatch(r"\w+", dataset):
        raise PrepareError(f"--dataset={dataset!r}: expected a name of letters, digits and _, as TFDS has them")
    for flag, value in (("max_undecodable", max_undecodable), ("workers", workers)):
        if value < 0:
            raise PrepareError(f"--{flag}={value}: expected 0 or more")


def check_apart(part: Part, data_dir: PurePath, made: PurePath) -> None:
    """Raises PrepareError if what is made lies in the folder of images that it is made of, and would be one of them."""
    if isinstance(part, FolderPart) and made.is_relative_to(data_dir):
        raise PrepareError(
            f"--out: {made} lies in the folder of images --data_dir={data_dir}, where the next start would take it "
            "for images; name an --out outside of it"
        )


def _check_prepared(folder: Path, max_undecodable: int) -> None:
    """Says what is there; raises PrepareError if files are not whole, or too many images were left out."""
    splits = tfds.builder_from_directory(folder).info.splits
    for split in splits.values():
        try:
            there = sum((folder / name).stat().st_size for name in split.filenames)
        except OSError as error:
            raise PrepareError(f"{error.filename} is missing; delete {folder}, and prepare it again") from None
        if there != split.num_bytes:
            raise PrepareError(f"{folder}, {split.name}: files are not whole; delete the folder, and prepare it again")
    names = folder / UNDECODABLE
    undecodable = names.read_text().splitlines() if names.exists() else []
    check_undecodable(undecodable, max_undecodable, names, f"repair or remove them, delete {folder}")
    images = ", ".join(f"{split.num_examples:,} {split.name}" for split in splits.values())
    log.info(
        "%s is prepared already, from what --data_dir held then: %s, %d files undecodable; delete the folder to make "
        "it anew", folder, images, len(undecodable),
    )  # fmt: skip


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
    names = shards[0].path.with_name(UNDECODABLE)
    progress, everything = report.Progress(len(shards), 0), sum(shard.part.size for shard in shards)
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would not survive
    started, images = time.monotonic(), 0
    with ProcessPoolExecutor(workers, context, start_worker) as pool:
        try:
            with signals_held():  # as it starts the workers
                futures = [pool.submit(make_shard, shard) for shard in shards]
            for done, future in enumerate(as_completed(futures), 1):
                images += future.result().examples
                if future.result().undecodable:
                    undecodable = sorted(undecodable + future.result().undecodable)
                    write_names(undecodable, names)
                    check_undecodable(undecodable, max_undecodable, names)
                progress.advance()
                if done * 100 // len(shards) > (done - 1) * 100 // len(shards):
                    seconds = time.monotonic() - started
                    progress.show(
                        done, seconds * (everything / (images + len(undecodable)) - 1),
                        images=f"{images:,} of {everything:,}", images_per_s=f"{images / seconds:.0f}",
                        undecodable=str(len(undecodable)),
                    )  # fmt: skip
        except BrokenProcessPool:
            raise PrepareError("a worker was killed (out of memory?); run the same command again, it goes on") from None
        finally:
            progress.close()
            pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def write_names(undecodable: Sequence[str], file: Path) -> None:
    """One a line; raises PrepareError if the file cannot be written."""
    try:
        file.write_text("".join(f"{name}\n" for name in undecodable))
    except OSError as error:
        raise not_written(file, error) from None


def check_undecodable(
    undecodable: Sequence[str], limit: int, file: Path | str, remedy: str = "repair or remove them"
) -> None:
    """Raises PrepareError if there are more than `limit`, with some of them and the file that names all."""
    if len(undecodable) > limit:
        raise PrepareError(
            f"{len(undecodable)} files cannot be decoded, more than --max_undecodable={limit}; {remedy}, and run the "
            f"same command again:{_some(undecodable, file)}"
        )


def _some(undecodable: Sequence[str], file: Path | str) -> str:
    rest = [f"and {len(undecodable) - HANDFUL:,} more in {file}"] if len(undecodable) > HANDFUL else []
    return "".join(f"\n  {line}" for line in [*undecodable[:HANDFUL], *rest])


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
    undecodable = sorted(name for m in made for name in m.undecodable)
    if undecodable:
        write_names(undecodable, work / UNDECODABLE)
    rows = [(split.name, split.num_examples, f"{split.num_bytes / 1e6:.1f}") for split in splits]
    log.info("%s", report.table(rows, ("split", "images", "MB")))
    log.info("%d files could not be decoded%s", len(undecodable), _some(undecodable, UNDECODABLE))


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


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        folder = prepare(**vars(flags))
    except (PrepareError, data.DataError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on")
        sys.exit(128 + stop.args[0])
    print(f"{folder}: train with --config.dataset={folder.parent.name} --config.data_dir={folder.parent.parent}")


if __name__ == "__main__":
    main()
