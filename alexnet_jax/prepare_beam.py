"""The work of prepare.py as an Apache Beam pipeline, for where one machine is not enough; the bytes are the same.

python -m alexnet_jax.prepare_beam --dataset NAME --data_dir DIR --out OUT [--runner=RUNNER and other flags of Beam]

Both folders are where every worker sees them: a shared disk, or an address of a file system that Beam knows (gs://,
s3://, hdfs://). A worker copies what a shard is made of to its own disk, makes it there as prepare.py does, and copies
it back. Beam repeats what fails; a pipeline that is stopped starts over.
"""

import argparse
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import tensorflow_datasets as tfds

from alexnet_jax import data
from alexnet_jax.images import SIDE
from alexnet_jax.prepare import (
    SHARD_SIZE,
    UNDECODABLE,
    VERSION,
    PrepareError,
    Shard,
    TfdsPart,
    check_apart,
    check_undecodable,
    check_values,
    find_parts,
    finish,
    folder_parts,
    known,
    make_shard,
    plan,
    write_names,
)

try:
    import apache_beam as beam
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f'Error: {error}; python -m alexnet_jax.prepare_beam needs Apache Beam: pip install -e ".[beam]"')

log = logging.getLogger("alexnet_jax.prepare")


class Task(NamedTuple):
    """A shard and the files of `data_dir` that it is made of; all paths are relative."""

    shard: Shard
    files: Sequence[str]


def _list(folder: str, pattern: str) -> list[str]:
    """The paths of the files below a folder that match, relative to it."""
    found = FileSystems.match([f"{folder}/{pattern}"])[0].metadata_list
    return [file.path.removeprefix(f"{folder}/") for file in found]


def _fetch(address: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileSystems.open(address, compression_type=CompressionTypes.UNCOMPRESSED) as source, open(path, "wb") as copy:
        shutil.copyfileobj(source, copy)


def _store(path: Path, address: str) -> None:
    with FileSystems.create(address, compression_type=CompressionTypes.UNCOMPRESSED) as copy, open(path, "rb") as made:
        shutil.copyfileobj(made, copy)


def tasks(dataset: str, data_dir: str, shard_size: int) -> list[Task]:
    """All that there is to do, in the order of the data set.

    Raises:
      PrepareError: as `prepare.find_parts`.
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

    def records(part: TfdsPart) -> list[str]:  # the files that hold its images
        split = splits[part.split]
        ends = itertools.accumulate(split.shard_lengths)
        spans = zip(sorted(split.filenames), split.shard_lengths, ends, strict=True)
        return [f"{folder}/{f}" for f, n, end in spans if end - n < part.places.stop and part.places.start < end]

    shards = plan(name, parts, label, Path())
    return [Task(s._replace(part=s.part._replace(folder=folder)), metadata + records(s.part)) for s in shards]


def make(task: Task, data_dir: str, folder: str) -> None:
    """Makes the shard of a task, and the file beside it, in `folder`."""
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
    """`prepare.prepare` on Beam's workers.

    Args:
      dataset, max_undecodable, shard_size: as there.
      data_dir, out: as there, or addresses of one of Beam's file systems.
      options: Beam's: the runner, and what it needs.

    Returns:
      The address of the data set's folder.

    Raises:
      PrepareError, data.DataError, OSError: as there.
      RuntimeError: Beam's own, if a worker goes on failing.
    """
    check_values(dataset, max_undecodable)
    data_dir, out = (f if "://" in f else os.path.abspath(f) for f in (data_dir.rstrip("/"), out.rstrip("/")))
    folder = f"{out}/{dataset}_{SIDE}/{VERSION}"
    names = f"{folder}/{UNDECODABLE}"
    if FileSystems.exists(f"{folder}/dataset_info.json"):
        if FileSystems.exists(names):
            with FileSystems.open(names, compression_type=CompressionTypes.UNCOMPRESSED) as file:
                undecodable = file.read().decode().splitlines()
            check_undecodable(undecodable, max_undecodable, names, f"repair or remove them, delete {folder}")
        log.info("%s is prepared already, from what --data_dir held then; delete the folder to make it anew", folder)
        return folder
    planned = tasks(dataset, data_dir, shard_size)
    check_apart(planned[0].shard.part, PurePath(data_dir), PurePath(folder))
    with beam.Pipeline(options=options) as pipeline:
        # The list is made again on a worker: that of ImageNet is too long to travel inside the pipeline.
        everything = pipeline | beam.Create([dataset]) | beam.FlatMap(tasks, data_dir, shard_size)
        everything | beam.Reshuffle() | beam.Map(make, data_dir, folder)
    with tempfile.TemporaryDirectory() as scratch:
        shards = [task.shard._replace(path=Path(scratch, task.shard.path)) for task in planned]
        for shard in shards:
            shard.path.touch()  # TFDS looks for the names
            _fetch(f"{folder}/{shard.sums.name}", shard.sums)
        made = [known(shard) for shard in shards]
        undecodable = sorted(name for of_shard in made for name in of_shard.undecodable)
        if undecodable:
            write_names(undecodable, Path(scratch, UNDECODABLE))
            _store(Path(scratch, UNDECODABLE), names)
        check_undecodable(undecodable, max_undecodable, names)
        finish(Path(scratch), shards, made)
        metadata = set(Path(scratch).iterdir()) - {shard.path for shard in shards}
        for path in sorted(metadata, key=lambda path: path.name == "dataset_info.json"):  # says that it is whole
            _store(path, f"{folder}/{path.name}")
    FileSystems.delete([f"{folder}/{shard.sums.name}" for shard in shards])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.prepare_beam", description="Section 2 of the paper, once, on many machines.",
        epilog="All other flags are Beam's: --runner and what it needs.",
    )  # fmt: skip
    parser.add_argument("--dataset", required=True, help="a TFDS data set in --data_dir, or a name for a folder")
    parser.add_argument("--data_dir", required=True, help="where TFDS keeps data sets, or a folder split/class/image")
    parser.add_argument("--out", required=True, help="where the data set NAME_256 goes")
    parser.add_argument("--max_undecodable", type=int, default=10, help="files that may be left out before it fails")
    flags, of_beam = parser.parse_known_args()
    log.addHandler(logging.StreamHandler(sys.stdout))  # of its own: Beam has set up the root's
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        folder = prepare(**vars(flags), options=PipelineOptions(of_beam))
    except (PrepareError, data.DataError, OSError) as error:
        sys.exit(f"Error: {error}")
    print(f"{folder}: train with --config.dataset={flags.dataset}_{SIDE} --config.data_dir={flags.out}")


if __name__ == "__main__":
    from alexnet_jax.prepare_beam import main  # workers look its functions up by the name of the module

    main()
