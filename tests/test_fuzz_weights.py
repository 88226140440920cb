"""Corrupt files of weights: one line, in bounded time and memory, whatever their bytes are."""

import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import jax
import numpy as np
import pytest
import weight_files
from weight_files import random_params

from alexnet_jax import AlexNet, Stem
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.weights import Weights, WeightsError, load_weights, write_native

TINY = (2, 2, 2, 2, 2, 2, 2)


def safetensors(header, content=b""):
    return struct.pack("<Q", len(header)) + header + content


def pickled(*opcodes):
    return b"\x80\x02" + b"".join(opcodes) + b"."


def mat(*elements):
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + b"".join(elements)


def matrix(kind, dims, content=b""):
    content = (
        struct.pack("<IIII", 6, 8, kind, 0) + struct.pack("<IIii", 5, 8, *dims) + struct.pack("<II", 1, 0) + content
    )
    return struct.pack("<II", 14, len(content)) + content


def deflated(content):
    content = zlib.compress(content, 9)
    return struct.pack("<II", 15, len(content)) + content


BOMBS = {
    "a memo of 2^31": pickled(b"N", b"r\xff\xff\xff\x7f"),
    "bytes of 2^62": pickled(b"\x96" + struct.pack("<Q", 1 << 62)),
    "a million lists": pickled(b"]" * 1_000_000),
    "a shape of 2^60": safetensors(
        b'{"features.0.weight":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,8]}}', bytes(8)),
    "a header of 2^40": struct.pack("<Q", 1 << 40) + b"{" + bytes(100),
    "a deep header": safetensors(b"{" + b'"a":[' * 100_000),
    "a header of lists": safetensors(b'{"a":[' + b"{}," * 600_000 + b"1]}"),
    "metadata of lists": safetensors(
        b'{"__metadata__":{"alexnet_jax":"[' + b"{}," * 600_000 + b'1]"}}'),
    "calls without end": pickled(
        b"ccollections\nOrderedDict\nq\x00", b"(" + b"(K\x01K\x02t" * 5000 + b"lq\x01" + b"h\x00h\x01\x85R" * 5000),
    "structs without end": mat(*[matrix(2, (20_000, 1), struct.pack("<II4xI", 0x00040005, 32, 1))] * 1000),
    "a wide header": safetensors(b'{"a":[' + b"{}," * 3_000_000),
    "a cell of 2^30": mat(matrix(1, (1 << 15, 1 << 15))),
    "an array of 2^31": mat(struct.pack("<II", 14, 0x7FFFFFF0) + matrix(7, (1 << 15, 1 << 15))[8:]),
    "a deflated bomb": mat(deflated(
        struct.pack("<II", 14, 1 << 30) + matrix(7, (1 << 14, 1 << 14))[8:] + struct.pack("<II", 7, 1 << 30)
        + bytes(1 << 28))),
    "deflated lists": mat(deflated(matrix(1, (50_000, 1), matrix(1, (50_000, 1)) * 50_000))),
    "fields without end": b"\x0a\x00" * 5_000_000,
    "a long varint": b"\x0a" + b"\xff" * 100,
    "layers without end": b"\x12\x02\x0a\x00" * 2_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_allocate_little(tmp_path, name):
    path = tmp_path / "a.bin"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as error:
            load_weights(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert peak < 2 * len(BOMBS[name]) + 100e6, f"{peak / 1e6:.0f} MB: {error.value}"


def test_a_zip_bomb(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 28))
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match="is compressed or corrupt"):
            load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def write_tiny_native(path):
    """A network of one kernel a layer, in this project's format."""
    model = AlexNet(1, "torchvision", stem=Stem(3, 1, 1), widths=(1,) * 7, towers=1)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"])
    mean = np.zeros((16, 16, 3), np.float32)
    preprocess = Preprocess(mean=mean, pad=0, crop=16, resize=0, flip=True, lighting=None, scale=1.0)
    write_native(Weights(model, params, preprocess, class_names=("a",)), path)


def tiny(write, towers=2, **options):
    return lambda path: write(path, random_params(TINY, 2, towers), **options)


COLOR = dict(average=np.array([1.0, 2.0, 3.0]), names=("a", "b"))
WRITERS = {
    "native": write_tiny_native,
    "zip": tiny(weight_files.torch_zip, 1),
    "legacy": tiny(weight_files.torch_legacy, 1),
    "safetensors": tiny(weight_files.torch_safetensors, 1),
    "caffe V0": tiny(weight_files.caffe, generation=0),
    "caffe V2": tiny(weight_files.caffe),
    "onnx": tiny(weight_files.onnx_zoo),
    "npy": tiny(weight_files.toronto),
    "mat": tiny(weight_files.matconvnet, **COLOR),
    "mat, compressed": tiny(weight_files.matconvnet, compress=True, **COLOR),
}


def outcome(path):
    """The weights of a file, or None if it is refused in one line; anything else is raised."""
    try:
        return load_weights(path)
    except WeightsError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize("name", WRITERS)
def test_every_truncation_is_one_line(tmp_path, name):
    path = tmp_path / "a.bin"
    WRITERS[name](path)
    size = path.stat().st_size
    for length in range(size - 1, -1, -1):
        os.truncate(path, length)
        # A protocol buffer ends after any field: the last ones of these have no part in the network.
        assert outcome(path) is None or name in ("caffe V0", "caffe V2", "onnx") and size - length < 40, length


@pytest.mark.parametrize("name", WRITERS)
def test_changed_bytes_are_one_line_or_a_network(tmp_path, name):
    path = tmp_path / "a.bin"
    WRITERS[name](path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    assert outcome(path) is not None
    refused = 0
    for i in range(400):
        changed = bytearray(content)
        for position in rng.integers(0, len(content) if i % 2 else min(len(content), 1000), rng.integers(1, 4)):
            changed[position] = rng.integers(256)
        path.write_bytes(changed)
        refused += outcome(path) is None
    assert refused > 20


def test_hardly_any_pickle_of_python_is_read(tmp_path):
    path = tmp_path / "a.npy"
    for value in (None, 3, [1, 2], {"conv1": 3}, {1: 2}, {"conv1": [{}, {}]}, [[]], "text", b"bytes", {None: []}):
        for protocol in range(2, 6):
            path.write_bytes(pickle.dumps(value, protocol))
            assert outcome(path) is None
