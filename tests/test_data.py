"""Data sets: opened, prepared, read into memory, in batches."""

import functools
import gzip
import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from runners import CIFAR10, ROOT
from synthetic_data import encoded, photograph

from alexnet_jax import data, sharding
from alexnet_jax.data import DataError, fashion_mnist
from alexnet_jax.data.dataset import Dataset


def _rows(images, labels):
    return sorted(bytes(i) + bytes([c]) for i, c in zip(images.reshape(len(labels), -1), labels, strict=True))


def test_prepared_set_holds_exactly_the_original_examples(fashion_mnist, idx_folder):
    for split, prefix, size in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        images, labels = data.load(fashion_mnist, split)
        assert images.shape == (size, 28, 28, 1) and images.dtype == np.uint8 and labels.dtype == np.int32
        original = np.frombuffer((idx_folder / f"{prefix}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
        classes = np.frombuffer((idx_folder / f"{prefix}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
        assert _rows(images, labels) == _rows(original, classes)


def test_parts_of_a_split(synthetic):
    split = data.load(synthetic, "test[:100]")
    part = data.load(synthetic, "test[30:50]")
    np.testing.assert_array_equal(part.images, split.images[30:50])
    np.testing.assert_array_equal(part.labels, split.labels[30:50])
    assert data.split_size(synthetic, "train[:10%]") == 120


@pytest.mark.parametrize("split,words", [("valid", "it has"), ("train[", "it has"), ("train[5:5]", "empty")])
def test_missing_splits(synthetic, split, words):
    with pytest.raises(DataError, match=words):
        data.load(synthetic, split)


def test_unknown_and_unprepared_data_sets(tmp_path):
    with pytest.raises(DataError, match="config.dataset='fashion_mnst'"):
        data.open_builder("fashion_mnst", str(tmp_path))
    with pytest.raises(DataError, match="config.data_dir=.*tfds build cifar100"):
        data.open_builder("cifar100", str(tmp_path))


@pytest.mark.parametrize("dataset,words", [
    ("imagenet2012_256", r"once: pip install tensorflow apache-beam mlcroissant && "
     r"tfds build imagenet2012 --file_format=array_record --data_dir={folder} --manual_dir=ARCHIVES && "
     r"python -m alexnet_jax.prepare --dataset imagenet2012 --data_dir {folder} --out {folder} "
     r"\(manual_dir should contain two files: ILSVRC2012_img_train.tar and"),
    ("mine_256", r"once: python -m alexnet_jax.prepare --dataset mine --data_dir IMAGES --out {folder} \(IMAGES is"),
    ("imagenet2012", r"once: pip install .* --manual_dir=ARCHIVES \(manual_dir should"),
])  # fmt: skip
def test_the_error_names_the_commands_that_prepare(dataset, words, tmp_path):
    with pytest.raises(DataError, match=words.format(folder=tmp_path)) as error:
        data.open_builder(dataset, str(tmp_path))
    assert "\n" not in str(error.value)


def test_cifar10_without_tensorflow():
    if not CIFAR10.exists():
        pytest.skip("no prepared CIFAR-10 in $ALEXNET_TEST_DATA")
    images, labels = data.load(data.open_builder("cifar10", str(CIFAR10)), "test[:300]")
    assert images.shape == (300, 32, 32, 3) and set(labels) == set(range(10))


def copy(folder, to, compress=False):
    to.mkdir()
    for name in fashion_mnist_files():
        content = (folder / name).read_bytes()
        if compress:
            (to / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (to / name).write_bytes(content)
    return to


def fashion_mnist_files():
    return list(fashion_mnist.SHA256)


@pytest.mark.parametrize("compress", [False, True])
def test_a_folder_of_the_users_own(idx_folder, tmp_path, compress):
    files = fashion_mnist.find_files(str(copy(idx_folder, tmp_path / "own", compress)))
    assert files == {name: (idx_folder / name).read_bytes() for name in fashion_mnist_files()}


def test_a_download(idx_folder, tmp_path):
    folder = copy(idx_folder, tmp_path / "served", compress=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        files = fashion_mnist.from_url(f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert files == {name: (idx_folder / name).read_bytes() for name in fashion_mnist_files()}


# A machine without a network: no proxy answers, and no apt-get is on the path.
OFFLINE = {**os.environ, **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"), "no_proxy": ""}
OFFLINE |= {"PATH": os.path.dirname(sys.executable)}


def open_offline(data_dir, source_dir, **popen):
    """Open Fashion-MNIST in another process, without a network."""
    code = (
        "import logging, sys; logging.basicConfig(level=20, format='%(message)s', stream=sys.stdout)\n"
        "from alexnet_jax import data\n"
        f"try: data.open_builder('fashion_mnist', {str(data_dir)!r}, {str(source_dir)!r})\n"
        "except data.DataError as error: sys.exit(f'ERROR {error}')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=OFFLINE, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **popen,
    )  # fmt: skip


@pytest.mark.parametrize("fault,words", [
    (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "no t10k-labels-idx1-ubyte"),
    (lambda folder: (folder / "train-images-idx3-ubyte").write_bytes(b"x" * 100), "SHA-256 differs"),
    (lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(b"\x1f\x8bnot gzip at all"), "train-labels"),
])  # fmt: skip
def test_no_other_source_replaces_a_bad_folder_of_the_users_own(idx_folder, tmp_path, fault, words):
    folder = copy(idx_folder, tmp_path / "own")
    fault(folder)
    process = open_offline(tmp_path / "tfds", folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    (message,) = [line for line in output.splitlines() if "Fashion-MNIST" in line]
    start = f"ERROR config.dataset='fashion_mnist': Fashion-MNIST cannot be read from config.source_dir={folder}: "
    assert message.startswith(start)
    assert str(folder) in message and words in message and "--config.source_dir=FOLDER" in message
    assert not list((tmp_path / "tfds").glob("fashion_mnist/**/*.array_record*"))


@pytest.mark.skipif(fashion_mnist.DEBIAN_FOLDER.exists(), reason="Debian's package is installed: a source is left")
def test_every_source_failing_is_one_message(tmp_path):
    process = open_offline(tmp_path / "tfds", "")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    *attempts, message = [line for line in output.splitlines() if "Fashion-MNIST" in line]
    assert len(attempts) == 4
    assert message.startswith("ERROR") and "--config.source_dir=FOLDER" in message
    for source in ("/usr/share/datasets", "amazonaws.com", "githubusercontent.com", "apt-get"):
        assert source in message


def test_a_killed_preparation_leaves_nothing_half_done(idx_folder, tmp_path):
    process = open_offline(tmp_path, idx_folder)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("fashion_mnist/*incomplete*/*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    process.kill()
    process.communicate()
    assert not (tmp_path / "fashion_mnist" / "3.0.1").exists()
    process = open_offline(tmp_path, idx_folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert [p.name for p in (tmp_path / "fashion_mnist").iterdir()] == ["3.0.1"]
    assert data.split_size(data.open_builder("fashion_mnist", str(tmp_path)), "train") == 60_000


@pytest.mark.skipif(not shutil.which("apt-get"), reason="not a Debian or Ubuntu machine")
def test_debians_package_needs_no_root(idx_folder):
    try:
        files = fashion_mnist.from_apt()
    except OSError as error:
        pytest.skip(f"the package archive cannot be reached: {error}")
    assert files == {name: (idx_folder / name).read_bytes() for name in fashion_mnist_files()}


def test_an_epoch_is_a_permutation(synthetic):
    examples = data.load(synthetic, "test[:103]")
    examples = data.Examples(examples.images, np.arange(103, dtype=np.int32))  # the label is the example's position
    device_data = data.DeviceData(examples, 20)
    key = jax.random.key(0)
    epochs = [np.concatenate([device_data.batch(key, 5 * e + i).labels for i in range(5)]) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 100
    assert (epochs[0] != epochs[1]).any()
    batch = data.DeviceData(examples, 20).batch(key, 7)  # a resumed run gets the same batch
    np.testing.assert_array_equal(batch.labels, epochs[1][40:60])
    np.testing.assert_array_equal(batch.images, examples.images[batch.labels])


def stored(folder, images, labels, name="mine", feature=None, label=None, keys=("image", "label"), split="train"):
    """A TFDS data set of image files and labels, written without any check of ours."""
    features = tfds.features.FeaturesDict({
        keys[0]: feature or tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
        keys[1]: label or tfds.features.ClassLabel(names=["a", "b"]),
    })  # fmt: skip
    folder = folder / name / "1.0.0"
    folder.mkdir(parents=True)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    path = folder / f"{name}-{split}.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for image, value in zip(images, labels, strict=True):
        example = features.encode_example({keys[0]: io.BytesIO(image), keys[1]: value})
        writer.write(serializer.serialize_example(example))
    writer.close()
    info = tfds.core.SplitInfo(split, [len(labels)], path.stat().st_size)
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[info], version="1.0.0", check_data=False
    )
    return tfds.builder_from_directory(folder)


def pngs(count=4, mode="RGB", size=(32, 32)):
    return [encoded(Image.fromarray(photograph(i, *size)).convert(mode), "PNG") for i in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("options,words", [
    ({"feature": tfds.features.Image(shape=(32, 32, 1), dtype=np.uint16, encoding_format="png")}, "uint16 with 1 chan"),
    ({"feature": tfds.features.Image(shape=(32, 32, 4), encoding_format="png")}, "uint8 with 4 channels; expected"),
    ({"keys": ("picture", "label")}, "label, picture; expected image and label"),
    ({"keys": ("image", "class")}, "expected image and label"),
    ({"label": tfds.features.Scalar(np.int64)}, "feature label is Scalar; expected tfds.features.ClassLabel"),
])  # fmt: skip
def test_other_features_are_refused_alike_in_memory_and_streamed(tmp_path, streaming, options, words):
    builder = stored(tmp_path, pngs(), [0, 1, 0, 1], **options)
    with pytest.raises(DataError, match=words) as error:
        Dataset(builder, streaming, 1).training("train", 2, sharding.one_device())
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=words):
        data.load(builder, "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_file_of_a_split_is_named(tmp_path, streaming):
    builder = stored(tmp_path, pngs(), [0, 1, 0, 1])
    file = next((tmp_path / "mine" / "1.0.0").glob("*array_record*"))
    file.unlink()
    with pytest.raises(DataError, match=f"{file} is missing; restore it"):
        Dataset(builder, streaming, 1).training("train", 2, sharding.one_device())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels,words", [([-1] * 4, "without a label; training"), ([0, 1, -1, 1], "without a label")])
def test_unlabeled_images_are_refused_for_training_and_testing_and_can_be_read(tmp_path, streaming, labels, words):
    dataset = Dataset(stored(tmp_path, pngs(), labels), streaming, 1)
    mesh = sharding.one_device()
    with pytest.raises(DataError, match=words):
        dataset.training("train", 4, mesh).batch(jax.random.key(0), 0)
    with pytest.raises(DataError, match=words):
        list(dataset.batches("train", 4, mesh))
    pixels = [np.asarray(Image.open(io.BytesIO(file))) for file in pngs()]
    np.testing.assert_array_equal(np.concatenate(list(dataset.images("train"))), pixels)
    np.testing.assert_array_equal(dataset.load("train").images, pixels)


def test_files_with_an_alpha_channel_or_of_sixteen_bits_are_the_same_in_memory_and_streamed(tmp_path):
    deep = np.array([[0, 1000], [10_000, 63_000]], np.uint16).repeat(16, 0).repeat(16, 1)
    files = [*pngs(2, "RGBA"), encoded(Image.fromarray(deep), "PNG")]
    builder = stored(tmp_path, files, [0, 1, 0])
    memory, streamed = (np.concatenate(list(Dataset(builder, s, 1).images("train"))) for s in (False, True))
    np.testing.assert_array_equal(memory, streamed)
    np.testing.assert_array_equal(memory[:2], [photograph(i, 32, 32) for i in range(2)])
    assert np.abs(memory[2, ::16, ::16, 0] - np.array([[0, 1000], [10_000, 63_000]]) / 257).max() < 1
