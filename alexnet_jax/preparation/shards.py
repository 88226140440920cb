"""Shards of a prepared data set: one process writes each from a fixed list of images, completely or not at all."""

import contextlib
import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from alexnet_jax.data.images import JPEG_QUALITY, SIDE, to_jpeg, to_square
from alexnet_jax.errors import one_line
from alexnet_jax.preparation.sources import Part, PrepareError
from alexnet_jax.runtime.output import escaped

SHARD_SIZE = 1024  # images, at most


class Shard(NamedTuple):
    """A part of a split and the file that it becomes: the work of one process."""

    split: str
    part: Part
    path: Path
    features: tfds.features.FeaturesDict

    @property
    def sums(self) -> Path:
        """The file next to it with its `ShardInfo` and its sums over images and pixels."""
        return self.path.with_name(f"{self.path.name}.npz")

    @property
    def temporary(self) -> Path:
        """The file of each of the two until it is complete."""
        return self.path.with_name(f"{self.path.name}.writing")


def plan(name: str, parts: dict[str, list[Part]], label: tfds.features.ClassLabel, folder: Path) -> list[Shard]:
    """Return the shards of the data set `name` in a folder.

    Raises:
      PrepareError: a split's name that TFDS does not accept.
    """
    for split in parts:
        if not re.fullmatch(r"\w+", split):
            raise PrepareError(f"split {split!r}: expected a name of letters, digits and _, as TFDS needs it")
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


class ShardInfo(NamedTuple):
    """A description of a shard's file."""

    fingerprint: str
    examples: int
    file_bytes: int
    undecodable: list[str]


def read_shard_info(shard: Shard) -> ShardInfo:
    """Return what `make_shard` wrote next to the file."""
    with np.load(shard.sums) as arrays:
        return ShardInfo(*(arrays[field].tolist() for field in ShardInfo._fields))


def make_shard(shard: Shard) -> ShardInfo:
    """Write a shard and its description, unless both exist already from the same images; return the description.

    Raises:
      PrepareError: the files cannot be written.
      data.DataError: an image cannot be read.
    """
    fingerprint = hashlib.sha256(f"{JPEG_QUALITY} {shard.part.fingerprint()}".encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or truncated
        info = read_shard_info(shard)
        if info.fingerprint == fingerprint and info.file_bytes == shard.path.stat().st_size:
            return info

    try:
        return _write_shard(shard, fingerprint)
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
        raise write_error(shard.path, error) from None


def write_error(path: Path, error: OSError | RuntimeError) -> PrepareError:
    """Return what to raise if a file of --out cannot be written."""
    reason = getattr(error, "strerror", None) or one_line(error).split(";")[0]
    return PrepareError(
        f"--out: {path} cannot be written ({reason}); free some space, or name a folder that can be written; finished "
        "shards are kept, run the same command again to resume"
    )


def _write_shard(shard: Shard, fingerprint: str) -> ShardInfo:
    temporary = shard.temporary
    examples, undecodable = 0, []
    # Integers are exact in any order: the first holds 1,024 images, the second all of ImageNet.
    pixel_sum, products = np.zeros((SIDE, SIDE, 3), np.uint32), np.zeros((3, 3), np.int64)
    serializer = tfds.core.example_serializer.ExampleSerializer(shard.features.get_serialized_info())
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # random access; JPEG is compressed already
    for name, file, label in shard.part.read():
        try:
            pixels = to_square(file)
        except Exception as error:  # any exception of a corrupt file
            reason = re.sub(r" <.*>", "", one_line(error))  # without the address of Pillow's file object
            undecodable.append(f"{shard.split}/{name}: {reason}")
            continue
        example = {"image": io.BytesIO(to_jpeg(pixels)), "label": label, "file_name": escaped(name)}
        example = serializer.get_tf_example(shard.features.encode_example(example))
        writer.write(example.SerializeToString(deterministic=True))
        examples += 1
        pixel_sum += pixels
        flat = pixels.reshape(-1, 3).astype(np.int64)
        products += flat.T @ flat
    writer.close()
    info = ShardInfo(fingerprint, examples, temporary.stat().st_size, undecodable)
    temporary.replace(shard.path)
    with open(temporary, "wb") as output:
        fields = {**info._asdict(), "undecodable": np.array(undecodable, str)}
        np.savez(output, pixel_sum=pixel_sum, products=products, **fields)
    temporary.replace(shard.sums)
    return info
