"""CIFAR-10 from an archive of the official form, and the prepared set of the test data."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from runners import CIFAR10

from alexnet_jax import data
from alexnet_jax.data import DataError, cifar10

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# TFDS's own set, as pages that print its first examples and a test of another project have it.
FIRST_IDS = [b"train_16399", b"train_01680", b"train_47917", b"train_17307", b"train_27051", b"train_48736"]
IDS_SHA256 = "826f1dad26a11a20249e95c71c6f1532d857fb35e648694f9758d4c5c1747679"  # of the first 5,000, one a line


def members(images, seed=0):
    """The files of an archive with so many images in each of its six batches, and these batches' records."""
    rng = np.random.default_rng(seed)
    records = np.repeat(rng.integers(0, 256, (6 * images, 3 * 8), np.uint8), 128, axis=1)  # stripes of four rows
    records = np.concatenate([rng.integers(0, 10, (6 * images, 1), np.uint8), records], axis=1)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    files = {
        f"cifar-10-batches-bin/{name}": batch.tobytes() for name, batch in zip(names, np.split(records, 6), strict=True)
    }
    meta = {"cifar-10-batches-bin/batches.meta.txt": ("\n".join(CLASSES) + "\n\n").encode()}
    readme = {"cifar-10-batches-bin/readme.html": b"<META HTTP-EQUIV=REFRESH>"}
    return meta | files | readme, records


def write_archive(path, files, monkeypatch, links=()):
    """Write an archive, whose size and SHA-256 are then those expected."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    monkeypatch.setattr(cifar10, "SIZE", path.stat().st_size)
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive; the official URL cannot be reached."""
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    return write_archive(tmp_path / "cifar-10-binary.tar.gz", members(20)[0], monkeypatch)


def check(builder, split, records):
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == len(records)
    ids = [example["id"].decode() for example in source]
    assert sorted(ids) == [f"{split}_{i:05}" for i in range(len(records))]
    order = [int(name.removeprefix(f"{split}_")) for name in ids]
    images, labels = data.load(builder, split)
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2).reshape(len(records), -1), records[order, 1:])
    np.testing.assert_array_equal(labels, records[order, 0])
    return ids


def test_every_example_in_the_order_of_tfds(tmp_path, monkeypatch):
    files, records = members(10_000)
    path = write_archive(tmp_path / "archive", files, monkeypatch)
    builder = data.open_builder("cifar10", str(tmp_path / "tfds"), str(path))
    assert builder.info.full_name == "cifar10/3.0.2" and builder.info.features["label"].names == CLASSES
    ids = [name.encode() for name in check(builder, "train", records[:50_000])]
    assert ids[:6] == FIRST_IDS
    assert hashlib.sha256(b"\n".join(ids[:5000])).hexdigest() == IDS_SHA256
    check(builder, "test", records[50_000:])


def test_a_folder_with_the_archive_and_a_second_opening_without_it(archive, tmp_path):
    first = data.open_builder("cifar10", str(tmp_path / "tfds"), str(tmp_path))
    check(first, "train", members(20)[1][:100])
    archive.unlink()
    second = data.open_builder("cifar10", str(tmp_path / "tfds"))
    check(second, "test", members(20)[1][100:])
    assert [p.name for p in (tmp_path / "tfds" / "cifar10").iterdir()] == ["3.0.2"]


def test_the_download(archive, tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        builder = data.open_builder("cifar10", str(tmp_path / "tfds"))
        server.shutdown()
    check(builder, "train", members(20)[1][:100])


def refused(tmp_path, source_dir):
    """The one line that says why a preparation failed; nothing was written."""
    with pytest.raises(DataError) as error:
        data.open_builder("cifar10", str(tmp_path / "tfds"), str(source_dir))
    message = str(error.value)
    assert "\n" not in message and message.startswith(
        f"config.dataset='cifar10': CIFAR-10 cannot be read from config.source_dir={source_dir}: "
    )
    assert "http://" not in message  # no other source
    assert "--config.source_dir=FOLDER" in message
    assert [p.name for p in (tmp_path / "tfds").rglob("*")] == [".cifar10.lock"]
    return message


@pytest.mark.parametrize("change,words", [
    (lambda content: content[:-1], "bytes, and cifar-10-.* has .*: it is truncated, or not the published file"),
    (lambda content: content + b"\0", "bytes, and cifar-10-.* has .*: it is truncated, or not the published file"),
    (lambda content: content[:5000] + b"\0\0" + content[5002:], r"not the published file \(SHA-256 differs\)"),
    (lambda content: b"", "^0 bytes, and cifar-10-binary.tar.gz has"),
])  # fmt: skip
def test_another_archive(archive, tmp_path, change, words):
    content = change(archive.read_bytes())
    archive.write_bytes(content)
    assert pytest.raises(ValueError, cifar10.from_path, archive).match(words)
    refused(tmp_path, archive)
    assert archive.read_bytes() == content


def test_no_archive(archive, tmp_path):
    assert "no such file or folder" in refused(tmp_path, tmp_path / "missing")
    archive.rename(tmp_path / "cifar.tar.gz")
    assert "it has no cifar-10-binary.tar.gz" in refused(tmp_path, tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").mkdir()
    assert "it has no cifar-10-binary.tar.gz" in refused(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin", "batches.meta.txt"])
def test_a_file_that_the_archive_does_not_have(archive, tmp_path, monkeypatch, name):
    files, _ = members(20)
    del files[f"cifar-10-batches-bin/{name}"]
    write_archive(archive, files, monkeypatch)
    assert f"has no cifar-10-batches-bin/{name}" in refused(tmp_path, archive)


@pytest.mark.parametrize("content", [lambda whole: b"not gzip", lambda whole: whole[:2000] + bytes(1000)])
def test_an_archive_that_is_none(archive, tmp_path, monkeypatch, content):
    content = content(archive.read_bytes())
    archive.write_bytes(content)
    monkeypatch.setattr(cifar10, "SIZE", len(content))
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(content).hexdigest())
    assert pytest.raises(ValueError, cifar10.from_path, archive).match("cannot be unpacked|has no cifar")
    refused(tmp_path, archive)


def test_paths_outside_of_the_archive_are_neither_written_nor_read(archive, tmp_path, monkeypatch):
    files, records = members(20)
    outside = {"../outside": b"x", str(tmp_path / "outside"): b"x", "cifar-10-batches-bin/../../outside": b"x"}
    write_archive(archive, outside | files, monkeypatch)
    check(data.open_builder("cifar10", str(tmp_path / "other"), str(archive)), "train", records[:100])
    assert not list(tmp_path.rglob("outside")) and not (tmp_path.parent / "outside").exists()

    (tmp_path / "secret").write_bytes(files.pop("cifar-10-batches-bin/test_batch.bin"))
    write_archive(archive, files, monkeypatch, [("cifar-10-batches-bin/test_batch.bin", str(tmp_path / "secret"))])
    assert "cannot be unpacked" in refused(tmp_path, archive)


def test_a_folder_that_cannot_be_written(archive, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="config.data_dir=.* cannot be read or written"):
        data.open_builder("cifar10", str(tmp_path / "file"), str(archive))
    assert (tmp_path / "file").read_bytes() == b""


def test_the_prepared_set_of_tfds(monkeypatch):
    if not CIFAR10.exists():
        pytest.skip("no prepared CIFAR-10 in $ALEXNET_TEST_DATA")
    monkeypatch.setattr(cifar10, "prepare", None)
    builder = data.open_builder("cifar10", str(CIFAR10))
    assert builder.info.features["label"].names == CLASSES
    assert [data.split_size(builder, split) for split in ("train", "test")] == [50_000, 10_000]
    labels = data.load(builder, "test").labels
    assert np.bincount(labels).tolist() == [1000] * 10
