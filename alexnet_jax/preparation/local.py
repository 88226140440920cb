"""The preparation of a data set on one machine, in worker processes."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from alexnet_jax.data.images import JPEG_QUALITY, SIDE
from alexnet_jax.data.source import STATISTICS
from alexnet_jax.preparation.shards import SHARD_SIZE, Shard, ShardInfo, make_shard, plan, write_error
from alexnet_jax.preparation.sources import NAMES_SHOWN, PrepareError, check_apart, find_parts
from alexnet_jax.preparation.statistics import statistics
from alexnet_jax.progress import Progress
from alexnet_jax.runtime.files import lock, user_path
from alexnet_jax.runtime.output import escaped
from alexnet_jax.runtime.workers import MAIN_GUARD, available_cores, kill, start_worker, started_workers
from alexnet_jax.tables import table

log = logging.getLogger(__name__)

VERSION = "1.0.0"
UNDECODABLE = "undecodable.txt"


def prepare(
    dataset: str,
    data_dir: str | Path,
    out: str | Path,
    workers: int = 0,
    max_undecodable: int = 10,
    shard_size: int = SHARD_SIZE,
) -> Path:
    """Write the data set `{dataset}_256` below `out`, or resume an interrupted preparation.

    Args:
      dataset: the name of a TFDS data set that is prepared in `data_dir`, or any name for a folder.
      data_dir: where TFDS keeps prepared data sets, or a folder split/class/image.
      workers: processes; 0 for one per core.
      max_undecodable: how many files may be skipped because they cannot be decoded.
      shard_size: images in a file.

    Returns:
      The folder of the data set, for `tfds.builder_from_directory`. It also holds `statistics.npz` (see
      `statistics.statistics`) of the split `train`, and `undecodable.txt` if files were skipped.

    Raises:
      PrepareError: no source, a value or an `out` that cannot be used, or too many files that cannot be decoded.
      data.DataError: a source that is corrupt.
      OSError: a source that cannot be read.
    """
    check_values(dataset, max_undecodable, workers)
    name, workers = f"{dataset}_{SIDE}", workers or available_cores()
    data_dir, out = (user_path(p, f).absolute() for p, f in ((data_dir, "--data_dir"), (out, "--out")))
    folder = out / name / VERSION
    if (folder / "dataset_info.json").exists():
        _check_prepared(folder, max_undecodable)
        return folder
    if folder.exists():
        raise PrepareError(f"{folder} is incomplete and was not written by this command; remove it")
    parts, label = find_parts(dataset, data_dir, shard_size)
    check_apart(parts["train"][0], data_dir.resolve(), folder.parent.resolve())
    work = folder.with_name(f"incomplete.{VERSION}")
    shards = plan(name, parts, label, work)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(work, error) from None
    with _locked(work):
        infos = _make_shards(shards, workers, max_undecodable)
        try:
            finish(work, shards, infos)
            work.rename(folder)
        except (OSError, RuntimeError) as error:
            raise write_error(folder, error) from None
    return folder


def check_values(dataset: str, max_undecodable: int, workers: int = 0) -> None:
    """Raise PrepareError for a value that is invalid for every data set."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", dataset):
        raise PrepareError(
            f"--dataset={dataset!r}: expected a name of lower-case letters, digits and _ that begins with a letter, as "
            f"TFDS needs it; for example {_similar_name(dataset)}"
        )
    for flag, value in (("max_undecodable", max_undecodable), ("workers", workers)):
        if value < 0:
            raise PrepareError(f"--{flag}={value}: expected 0 or more")


def _similar_name(text: str) -> str:
    """Return a name that TFDS accepts."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"\W+", "_", tfds.core.naming.camelcase_to_snakecase(text)).strip("_")
    return text if text[:1].isalpha() else f"images_{text}".rstrip("_")


def _check_prepared(folder: Path, max_undecodable: int) -> None:
    """Log what the data set holds; raises PrepareError if files are truncated, or too many images were skipped."""
    splits = tfds.builder_from_directory(folder).info.splits
    for split in splits.values():
        try:
            size = sum((folder / name).stat().st_size for name in split.filenames)
        except OSError as error:
            raise PrepareError(f"{error.filename} is missing; delete {folder} and prepare it again") from None
        if size != split.num_bytes:
            raise PrepareError(f"{folder}, {split.name}: files are truncated; delete the folder and prepare it again")
    names = folder / UNDECODABLE
    undecodable = names.read_text(encoding="utf-8").splitlines() if names.exists() else []
    check_undecodable(undecodable, max_undecodable, names, f"repair or remove them, delete {folder}")
    images = ", ".join(f"{split.num_examples:,} {split.name}" for split in splits.values())
    log.info(
        "%s is prepared already: %s, %d files undecodable; delete the folder to prepare it again",
        folder, images, len(undecodable),
    )  # fmt: skip


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Lock a folder against other processes; the system releases the lock when this process dies."""
    folder = os.open(work, os.O_RDONLY)
    try:
        lock(folder, work)
        yield
    except BlockingIOError:
        raise PrepareError(f"another process is preparing {work.parent}; wait for it, or stop it") from None
    finally:
        os.close(folder)


def _make_shards(shards: Sequence[Shard], workers: int, max_undecodable: int) -> list[ShardInfo]:
    """Make all shards in worker processes; raises PrepareError as soon as too many files could not be decoded."""
    undecodable: list[str] = []
    names = shards[0].path.with_name(UNDECODABLE)
    progress, total = Progress(len(shards), 0), sum(shard.part.size for shard in shards)
    context = multiprocessing.get_context("spawn")  # JAX has threads, and a forked process would deadlock
    started, images = time.monotonic(), 0
    pool = ProcessPoolExecutor(workers, context, start_worker)
    processes: Sequence[BaseProcess] = ()
    try:
        with started_workers() as processes:
            started_pool = pool.submit(int)
            futures = [pool.submit(make_shard, shard) for shard in shards]
        started_pool.result()
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
                    done, seconds * (total / (images + len(undecodable)) - 1),
                    images=f"{images:,} of {total:,}", images_per_s=f"{images / seconds:.0f}",
                    undecodable=str(len(undecodable)),
                )  # fmt: skip
    except BrokenProcessPool:
        if started_pool.exception():
            raise PrepareError(MAIN_GUARD) from None
        raise PrepareError("a worker was killed (out of memory?); run the same command again to resume") from None
    finally:
        progress.close()
        kill(processes)  # the pool would wait until they have imported the package and made the shards that they began
        pool.shutdown(cancel_futures=True)
        for shard in shards:  # of the shards that they were making
            shard.temporary.unlink(missing_ok=True)
    return [future.result() for future in futures]


def write_names(undecodable: Sequence[str], file: Path) -> None:
    """Write one name per line; raises PrepareError if the file cannot be written."""
    try:
        file.write_text("".join(f"{escaped(name)}\n" for name in undecodable), encoding="utf-8")
    except OSError as error:
        raise write_error(file, error) from None


def check_undecodable(
    undecodable: Sequence[str], limit: int, file: Path | str, remedy: str = "repair or remove them"
) -> None:
    """Raise PrepareError if there are more than `limit`, with some of them and the file that names all."""
    if len(undecodable) > limit:
        raise PrepareError(
            f"{len(undecodable)} files cannot be decoded, more than --max_undecodable={limit}; {remedy}, and run the "
            f"same command again:{_first_names(undecodable, file)}"
        )


def _first_names(undecodable: Sequence[str], file: Path | str) -> str:
    rest = [f"and {len(undecodable) - NAMES_SHOWN:,} more in {file}"] if len(undecodable) > NAMES_SHOWN else []
    return "".join(f"\n  {line}" for line in [*undecodable[:NAMES_SHOWN], *rest])


def finish(work: Path, shards: Sequence[Shard], infos: Sequence[ShardInfo]) -> None:
    """Write TFDS's metadata and the statistics, and remove all other files of the folder except the shards."""
    arrays: dict[str, Any] = statistics(shard.sums for shard in shards if shard.split == "train")
    sums = {shard.sums for shard in shards}
    for leftover in set(work.iterdir()) - {shard.path for shard in shards} - sums:
        leftover.unlink()
    np.savez(work / STATISTICS, **arrays)
    splits = []
    for split, pairs in itertools.groupby(zip(shards, infos, strict=True), lambda pair: pair[0].split):
        group = [info for _, info in pairs]
        lengths, size = [info.examples for info in group], sum(info.file_bytes for info in group)
        splits.append(tfds.core.SplitInfo(split, lengths, size))
    tfds.folder_dataset.write_metadata(
        data_dir=work, features=shards[0].features, split_infos=splits, version=VERSION, check_data=False,
        description=f"Shorter side resized to {SIDE}, {SIDE}×{SIDE} center crop, JPEG of quality {JPEG_QUALITY}.",
    )  # fmt: skip
    undecodable = sorted(name for info in infos for name in info.undecodable)
    if undecodable:
        write_names(undecodable, work / UNDECODABLE)
    for path in sums:  # last: after an error before this line, the shards are still used again
        path.unlink()
    rows = [(split.name, split.num_examples, f"{split.num_bytes / 1e6:.1f}") for split in splits]
    log.info("%s", table(rows, ("split", "images", "MB")))
    log.info("%d files could not be decoded%s", len(undecodable), _first_names(undecodable, UNDECODABLE))
