"""The command that converts files of weights."""

import subprocess
import sys

import numpy as np
import pytest
import weight_files
from runners import ROOT
from weight_files import random_params

from alexnet_jax.weights import load_weights


def convert(*arguments):
    command = [sys.executable, "-m", "alexnet_jax.convert", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_file_is_converted_and_described(tmp_path):
    weight_files.matconvnet(tmp_path / "a.mat", random_params(), np.zeros((227, 227, 3)), ("cat", "dog", "ox"))
    code, output, errors = convert(tmp_path / "a.mat", tmp_path / "b.safetensors")
    assert code == 0, errors
    weights = load_weights(tmp_path / "b.safetensors")
    assert "recognized: MatConvNet, variant caffe, 2 towers" in output
    assert "conv1 55×55×4 11×11×3×4 1,456" in " ".join(output.split()) and "classes: 3 (cat, dog, ox)" in output
    assert f"source: a.mat, SHA-256 {weights.source.sha256}" in output
    assert output.endswith(f"Written to {tmp_path / 'b.safetensors'}\n") and weights.class_names == ("cat", "dog", "ox")


def test_a_mean_image_is_kept(tmp_path):
    weight_files.caffe(tmp_path / "a.caffemodel", random_params())
    image = np.random.default_rng(0).uniform(90, 130, (3, 256, 256)).astype(np.float32)
    weight_files.caffe_mean(tmp_path / "mean.binaryproto", image)
    mean = f"--mean={tmp_path / 'mean.binaryproto'}"
    code, _, errors = convert(tmp_path / "a.caffemodel", tmp_path / "b.safetensors", mean)
    assert code == 0, errors
    found = load_weights(tmp_path / "b.safetensors").preprocess.mean
    np.testing.assert_array_equal(found, image[::-1].transpose(1, 2, 0))


@pytest.mark.parametrize("source,out,words", [
    ("absent.pth", "b.safetensors", "absent.pth: No such file"),
    ("text", "b.safetensors", "text: not a file of weights"),
    ("text", "b.onnx", "b.onnx: expected a .safetensors file in an existing folder"),
    ("a.npy", "busy.safetensors", "busy.safetensors cannot be written: "),
    ("text", "absent/b.safetensors", "expected a .safetensors file in an existing folder"),
])  # fmt: skip
def test_an_error_is_one_line(tmp_path, source, out, words):
    (tmp_path / "text").write_text("text")
    weight_files.toronto(tmp_path / "a.npy", random_params())
    (tmp_path / "busy.safetensors.tmp").mkdir()
    code, output, errors = convert(tmp_path / source, tmp_path / out)
    assert code == 1 and words in errors and "Written" not in output
    assert errors.startswith("Error: ") and errors.count("\n") == 1
    assert not (tmp_path / out).exists()
