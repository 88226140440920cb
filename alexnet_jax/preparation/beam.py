"""The preparation of a data set as an Apache Beam pipeline, for many machines; the bytes are those of `local.prepare`.

Both folders must be visible to every worker: a shared disk, or an address of a file system that Beam knows (gs://,
s3://, hdfs://). A worker copies the sources of a shard to its own disk, makes the shard there, and copies it back. Beam
repeats what fails; a pipeline that is stopped starts again from the beginning.
"""

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from alexnet_jax.data.images import SIDE
from alexnet_jax.preparation.local import (
    UNDECODABLE,
    VERSION,
    check_undecodable,
    check_values,
    finish,
    write_names,
)
from alexnet_jax.preparation.shards import SHARD_SIZE, Shard, make_shard, plan, read_shard_info
from alexnet_jax.preparation.sources import PrepareError, TfdsPart, check_apart, find_parts, folder_parts
from alexnet_jax.runtime.files import user_path

log = logging.getLogger(__name__)

UNCOMPRESSED = CompressionTypes.UNCOMPRESSED


class Task(NamedTuple):
    """A shard and the files of `data_dir` that it needs; all paths are relative."""

    shard: Shard
    files: Sequence[str]


def _list(folder: str, pattern: str) -> list[str]:
    """Return the paths of the files below a folder that match, relative to it."""
    files = FileSystems.match([f"{folder}/{pattern}"])[0].metadata_list
    return [file.path.removeprefix(f"{folder}/") for file in files]


def _fetch(address: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileSystems.open(address, compression_type=UNCOMPRESSED) as source, open(path, "wb") as copy:
        shutil.copyfileobj(source, copy)


def _store(path: Path, address: str) -> None:
    with open(path, "rb") as source, FileSystems.create(address, compression_type=UNCOMPRESSED) as copy:
        shutil.copyfileobj(source, copy)


def tasks(dataset: str, data_dir: str, shard_size: int) -> list[Task]:
    """Return the tasks of a preparation, in the order of the data set.

    Raises:
      PrepareError: as `sources.find_parts`.
    """
    name = f"{dataset}_{SIDE}"
    metadata = [file for file in _list(data_dir, f"{dataset}/**") if ".array_record" not in file]
    if not any(file.endswith("/dataset_info.json") for file in metadata):
        parts, label = folder_parts(_list(data_dir, "**"), Path(), shard_size)
        if "train" not in parts:
            raise PrepareError(f"--data_dir={data_dir}: expected {dataset}/, a TFDS data set, or train/CLASS/IMAGE")
        shards = plan(name, parts, label, Path())
        return [Task(shard, [f"{shard.split}/{path}" for path in shard.part.paths]) for shard in shards]
    with tempfile.TemporaryDirectory() as scratch:
        for file in metadata:
            _fetch(f"{data_dir}/{file}", Path(scratch, file))
        parts, label = find_parts(dataset, Path(scratch), shard_size)
        folder = parts["train"][0].folder.relative_to(scratch)
        splits = tfds.builder_from_directory(Path(scratch, folder)).info.splits
    metadata = [file for file in metadata if Path(file).parent == folder]

    def record_files(part: TfdsPart) -> list[str]:
        split = splits[part.split]
        ends = itertools.accumulate(split.shard_lengths)
        spans = zip(sorted(split.filenames), split.shard_lengths, ends, strict=True)
        return [f"{folder}/{f}" for f, n, end in spans if end - n < part.positions.stop and part.positions.start < end]

    shards = plan(name, parts, label, Path())
    return [Task(s._replace(part=s.part._replace(folder=folder)), metadata + record_files(s.part)) for s in shards]


def make(task: Task, data_dir: str, folder: str) -> None:
    """Make the shard of a task, and the file next to it, in `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in task.files:
            _fetch(f"{data_dir}/{file}", Path(scratch, file))
        part = task.shard.part._replace(folder=Path(scratch, task.shard.part.folder))
        shard = task.shard._replace(part=part, path=Path(scratch, task.shard.path))
        make_shard(shard)
        for path in (shard.path, shard.sums):
            _store(path, f"{folder}/{path.name}")


def prepare(
    dataset: str,
    data_dir: str,
    out: str,
    max_undecodable: int = 10,
    shard_size: int = SHARD_SIZE,
    options: PipelineOptions | None = None,
) -> str:
    """Write the data set `{dataset}_256` below `out`, as `local.prepare` does, with Beam's workers.

    Args:
      dataset, max_undecodable, shard_size: as in `local.prepare`.
      data_dir, out: as in `local.prepare`, or addresses of one of Beam's file systems.
      options: Beam's: the runner, and what it needs.

    Returns:
      The address of the data set's folder.

    Raises:
      PrepareError, data.DataError, OSError: as `local.prepare`.
      RuntimeError: Beam's own, if a worker fails repeatedly.
    """
    check_values(dataset, max_undecodable)
    flags = {"--data_dir": data_dir, "--out": out}
    data_dir, out = (f.rstrip("/") if "://" in f else os.path.abspath(user_path(f, k)) for k, f in flags.items())
    folder = f"{out}/{dataset}_{SIDE}/{VERSION}"
    names = f"{folder}/{UNDECODABLE}"
    if FileSystems.exists(f"{folder}/dataset_info.json"):
        if FileSystems.exists(names):
            with FileSystems.open(names, compression_type=UNCOMPRESSED) as file:
                undecodable = file.read().decode().splitlines()
            check_undecodable(undecodable, max_undecodable, names, f"repair or remove them, delete {folder}")
        log.info("%s is prepared already; delete the folder to prepare it again", folder)
        return folder
    planned = tasks(dataset, data_dir, shard_size)
    check_apart(planned[0].shard.part, PurePath(data_dir), PurePath(folder))
    with beam.Pipeline(options=options) as pipeline:
        # A worker computes the list again: that of ImageNet is too long to be part of the pipeline.
        all_tasks = pipeline | beam.Create([dataset]) | beam.FlatMap(tasks, data_dir, shard_size)
        all_tasks | beam.Reshuffle() | beam.Map(make, data_dir, folder)
    with tempfile.TemporaryDirectory() as scratch:
        shards = [task.shard._replace(path=Path(scratch, task.shard.path)) for task in planned]
        for shard in shards:
            shard.path.touch()  # TFDS checks the names
            _fetch(f"{folder}/{shard.sums.name}", shard.sums)
        infos = [read_shard_info(shard) for shard in shards]
        undecodable = sorted(name for info in infos for name in info.undecodable)
        if undecodable:
            write_names(undecodable, Path(scratch, UNDECODABLE))
            _store(Path(scratch, UNDECODABLE), names)
        check_undecodable(undecodable, max_undecodable, names)
        finish(Path(scratch), shards, infos)
        metadata = set(Path(scratch).iterdir()) - {shard.path for shard in shards}
        # The info file is last: it marks a complete data set.
        for path in sorted(metadata, key=lambda path: path.name == "dataset_info.json"):
            _store(path, f"{folder}/{path.name}")
    FileSystems.delete([f"{folder}/{shard.sums.name}" for shard in shards])
    return folder
