"""Features by name against the network's activations, and files of them for folders, lists and splits."""

import os
import subprocess
import sys

import h5py
import jax
import numpy as np
import pytest
from networks import SMALL, images_of, small_params
from PIL import Image
from runners import ROOT

from alexnet_jax import activations
from alexnet_jax.features import __main__ as command
from alexnet_jax.features import extraction, features
from alexnet_jax.features.__main__ import FeaturesError, open_images, write_features
from alexnet_jax.features.files import FeatureFileError
from alexnet_jax.features.names import TORCHVISION
from alexnet_jax.model import OUTPUTS
from alexnet_jax.weights import read_workdir, write_native

# What each module of torchvision's alexnet is: its output is that of the layer, before or after its ReLU.
MODULES = {
    "features.0": ("conv1", 0), "features.1": ("conv1", 1), "features.2": ("pool1", 1), "features.3": ("conv2", 0),
    "features.4": ("conv2", 1), "features.5": ("pool2", 1), "features.6": ("conv3", 0), "features.7": ("conv3", 1),
    "features.8": ("conv4", 0), "features.9": ("conv4", 1), "features.10": ("conv5", 0), "features.11": ("conv5", 1),
    "features.12": ("pool5", 1), "avgpool": ("pool5", 1), "classifier.0": ("pool5", 1), "classifier.1": ("fc6", 0),
    "classifier.2": ("fc6", 1), "classifier.3": ("fc6", 1), "classifier.4": ("fc7", 0), "classifier.5": ("fc7", 1),
    "classifier.6": ("fc8", 1),
}  # fmt: skip


@pytest.mark.parametrize("variant", ["paper", "torchvision"])
def test_each_name_against_the_activations(variant):
    model = SMALL.clone(variant=variant)
    images = np.asarray(images_of(30, batch=5))
    params = small_params(images, model)
    exact = activations(model, params, images)
    names = [name for name in OUTPUTS if name in exact]
    outputs = features(model, params, images, [*names, *MODULES, "relu3", "relu7", "drop6"], batch_size=2)
    for name in names:
        np.testing.assert_allclose(outputs[name], exact[name], rtol=1e-5, atol=1e-4)
    assert MODULES.keys() == TORCHVISION.keys()
    for alias, (name, after) in {**MODULES, "relu3": ("conv3", 1), "relu7": ("fc7", 1), "drop6": ("fc6", 1)}.items():
        x = outputs[alias] if after else np.maximum(outputs[alias], 0)
        np.testing.assert_array_equal(x, outputs[name], alias)
        assert after or (outputs[alias] < 0).any(), alias


def test_outputs_before_the_activation_of_tanh_and_of_the_original_code():
    images = np.asarray(images_of(30, batch=2))
    model = SMALL.clone(activation="tanh")
    params = small_params(images)
    outputs = features(model, params, images, ["conv4:pre", "conv4", "fc6:pre", "fc6", "fc8:pre", "fc8"])
    for name in ("conv4", "fc6"):
        np.testing.assert_allclose(np.tanh(outputs[f"{name}:pre"]), outputs[name], atol=1e-5)
    np.testing.assert_array_equal(outputs["fc8:pre"], outputs["fc8"])
    outputs = features(SMALL.clone(variant="source2012"), params, images, ["conv1:pre", "conv1", "pool1", "relu1"])
    np.testing.assert_array_equal(outputs["conv1:pre"], outputs["conv1"])  # its ReLU comes after the pooling
    np.testing.assert_array_equal(outputs["relu1"], outputs["pool1"])
    assert (outputs["conv1"] < 0).any() and not (outputs["relu1"] < 0).any()


def test_any_number_of_images_in_one_program_with_the_same_values():
    images = np.asarray(images_of(30, batch=9))
    params = small_params(images)
    before = extraction._program()._cache_size()
    some = [features(SMALL, params, images[:n], ["conv5", "fc7"], batch_size=4) for n in (1, 4, 9, 0)]
    assert extraction._program()._cache_size() == before + 1
    assert [len(x["fc7"]) for x in some] == [1, 4, 9, 0] and some[3]["conv5"].shape[1:] == some[2]["conv5"].shape[1:]
    for size in (1, 9, 20):
        whole = features(SMALL, params, images, ["conv5", "fc7"], batch_size=size)
        for name, x in whole.items():
            np.testing.assert_allclose(x, some[2][name], rtol=1e-5, atol=1e-5 * np.abs(x).max())


def test_convolutions_on_larger_images():
    params = small_params(np.asarray(images_of(30)))
    large = np.asarray(images_of(61, batch=2))
    names = ["conv1:pre", "norm2", "conv5", "pool5", "features.10"]
    outputs = features(SMALL, params, large, names)
    larger_params = {**small_params(large), **{k: v for k, v in params.items() if k.startswith("conv")}}
    exact = activations(SMALL, larger_params, large)
    for name in ("norm2", "conv5", "pool5"):
        np.testing.assert_allclose(outputs[name], exact[name], rtol=1e-4, atol=1e-4 * np.abs(exact[name]).max())


@pytest.mark.parametrize("size,layers,words", [
    (61, ["conv1", "classifier.4"], r"layer 'classifier.4': images of 61×61 give fc6 108 inputs, and it has 12"),
    (61, ["avgpool"], "layer 'avgpool': images of 61×61"),
    (8, ["conv1"], "images of 8×8: too small"),
    (30, ["fc9"], "layer 'fc9': expected some of conv1, norm1"),
    (30, ["pool1:pre"], "layer 'pool1:pre': expected"),
    (30, [], "expected the name of at least one"),
])  # fmt: skip
def test_what_has_no_features_is_one_line(size, layers, words):
    params = small_params(np.asarray(images_of(30)))
    with pytest.raises(ValueError, match=words) as error:
        features(SMALL, params, np.asarray(images_of(size)), layers)
    assert "\n" not in str(error.value)


def test_a_layer_that_the_network_lacks_is_named():
    model, images = SMALL.clone(variant="torchvision"), np.asarray(images_of(30))
    with pytest.raises(ValueError, match="layer 'norm1': this network has none of this name"):
        features(model, small_params(images, model), images, ["norm1"])


@pytest.fixture
def folder(opened, tmp_path):
    """Eleven images in two classes and one without, two files that are none, and files that are skipped."""
    images = opened.load("test[:11]").images
    for i, image in enumerate(images):
        path = tmp_path / "images" / ("a", "b/deep", "")[0 if i < 5 else 1 if i < 10 else 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    (tmp_path / "images" / "a" / "03a.png").write_text("no image")
    (tmp_path / "images" / "b" / "half.png").write_bytes(path.read_bytes()[:60])
    (tmp_path / "images" / ".hidden").write_text("")
    (tmp_path / "images" / "Thumbs.db").write_text("")
    return tmp_path / "images"


def arrays_of(path):
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays}
    with h5py.File(path) as file:
        return {k: x.asstr()[:].astype(str) if x.dtype == object else x[:] for k, x in file.items()}


NAMES = ["10.png", *(f"a/{i}.png" for i in ("00", "01", "02", "03", "03a", "04")), "b/half.png",
         *(f"b/deep/{i:02}.png" for i in range(5, 10))]  # fmt: skip


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_folder(opened, folder, tmp_path, suffix, capfd):
    images, out = opened.load("test[:11]").images, tmp_path / f"out{suffix}"
    exact = {name: opened.activations(images, name) for name in ("conv5", "fc7")}
    failed = write_features(opened, open_images(str(folder), opened), ["conv5", "fc7", "conv3:pre"], out, batch_size=4)
    assert failed == 2 and [p.name for p in tmp_path.iterdir() if p.is_file()] == [out.name]
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("Error: ") for line in errors)
    arrays = arrays_of(out)
    assert sorted(arrays) == sorted(["names", "labels", "class_names", "valid", "conv5", "fc7", "conv3:pre"])
    assert arrays["names"].tolist() == NAMES and arrays["class_names"].tolist() == ["a", "b"]
    assert arrays["labels"].tolist() == [-1] + 6 * [0] + 6 * [1] and arrays["valid"].dtype == bool
    for i, name in enumerate(NAMES):
        number = os.path.basename(name).removesuffix(".png")
        assert arrays["valid"][i] == number.isdigit(), name
        for layer, x in exact.items():
            expected = x[int(number)] if number.isdigit() else np.full(x.shape[1:], np.nan)
            np.testing.assert_allclose(arrays[layer][i], expected, rtol=1e-5, atol=1e-5 * np.abs(x).max())
            assert arrays[layer].dtype == np.float32


def test_a_list_and_half_precision(opened, folder, tmp_path):
    (folder / "list.txt").write_text("a/00.png\tcat\n\nb/deep/05.png\n10.png\tbird\n")
    out, images = tmp_path / "out.h5", opened.load("test[:11]").images[[0, 5, 10]]
    assert write_features(opened, open_images(str(folder / "list.txt"), opened), ["fc6"], out, "float16") == 0
    arrays = arrays_of(out)
    assert arrays["class_names"].tolist() == ["bird", "cat"] and arrays["labels"].tolist() == [1, -1, 0]
    assert arrays["fc6"].dtype == np.float16
    np.testing.assert_array_equal(arrays["fc6"], opened.activations(images, "fc6").astype(np.float16))


@pytest.mark.parametrize("text", ["test[:45]", "synthetic:test[:45]"])
def test_a_split(opened, tmp_path, text):
    examples, out = opened.load("test[:45]"), tmp_path / "out.npz"
    images = open_images(text, opened, opened.config.data_dir)
    assert write_features(opened, images, ["fc7"], out) == 0
    arrays = arrays_of(out)
    np.testing.assert_array_equal(arrays["labels"], examples.labels)
    assert arrays["class_names"].tolist() == opened.names and arrays["names"][3] == "synthetic/1.0.0:test[:45]#3"
    np.testing.assert_allclose(arrays["fc7"], opened.activations(examples.images), rtol=1e-5, atol=1e-5)


def test_an_interrupted_file_is_resumed(opened, folder, tmp_path, capfd):
    out, layers, images = tmp_path / "out.h5", ["conv5", "classifier.4"], open_images(str(folder), opened)
    write_features(opened, images, layers, tmp_path / "whole.h5", batch_size=4)
    read = []

    def interrupted(i):
        read.append(i)
        if i == 9:
            raise KeyboardInterrupt
        return images.read(i)

    with pytest.raises(KeyboardInterrupt):
        write_features(opened, images._replace(read=interrupted, threads=1), layers, out, batch_size=4)
    assert not out.exists() and (tmp_path / "out.h5.partial").exists()
    with pytest.raises(FeatureFileError, match="begun with other images, layers, weights or types"):
        write_features(opened, images, ["conv5"], out)
    capfd.readouterr()
    read.clear()
    assert write_features(opened, images._replace(read=lambda i: read.append(i) or images.read(i)), layers, out) == 2
    assert sorted(read) == list(range(8, 13)) and not (tmp_path / "out.h5.partial").exists()
    assert len(capfd.readouterr().err.splitlines()) == 0  # both were named before
    whole = arrays_of(tmp_path / "whole.h5")
    for name, x in arrays_of(out).items():
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, whole[name], rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, whole[name], name)
    (tmp_path / "again.h5.partial").write_bytes(b"no HDF5")
    with pytest.raises(FeatureFileError, match="again.h5.partial cannot be resumed"):
        write_features(opened, images, ["conv5"], tmp_path / "again.h5")


def test_a_process_that_is_killed_leaves_a_file_that_is_resumed(trained, opened, folder, tmp_path):
    killing = (
        "import os, signal, sys\nfrom alexnet_jax.features import __main__ as features\n"
        "from alexnet_jax.features.files import Writer\n"
        "write = Writer.write\n"
        "def write_and_die(self, *rest):\n    write(self, *rest)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Writer.write = write_and_die\nfeatures.main()\n"
    )
    arguments = [str(trained), str(folder), "--layers=fc7", f"--out={tmp_path / 'out.h5'}", "--batch_size=6"]
    done = subprocess.run([sys.executable, "-c", killing, *arguments], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == -9, done.stderr
    command = [sys.executable, "-m", "alexnet_jax.features", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr  # 03a.png was named before
    assert "(2 images could not be read; their rows are NaN)" in done.stdout
    arrays = arrays_of(tmp_path / "out.h5")
    assert arrays["names"].tolist() == NAMES and arrays["valid"].sum() == 11
    assert np.isnan(arrays["fc7"]).all(1).tolist() == (~arrays["valid"]).tolist()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and again.stderr == f"Error: --out={tmp_path / 'out.h5'} exists; delete it, or name " \
        "another file\n"  # fmt: skip


def test_values_beyond_half_precision_are_one_line(opened, folder, tmp_path):
    params = jax.tree.map(lambda x: x * 1e5, opened.weights.params)
    weights = read_workdir(opened.path)
    for layer, arrays in params.items():
        weights.params[layer].update(arrays)
    write_native(weights, tmp_path / "large.safetensors")
    large = command.open_run(tmp_path / "large.safetensors")
    for suffix in (".npz", ".h5"):
        with pytest.raises(FeatureFileError, match="layer 'fc7' exceeds float16.*use --dtype float32"):
            write_features(large, open_images(str(folder), large), ["fc7"], tmp_path / f"out{suffix}", "float16")
    assert not any(p.name.startswith(".out") for p in tmp_path.iterdir())


@pytest.mark.parametrize("text,words", [
    ("images/none", "images/none: no such folder or list; expected one, or a split"),
    ("empty", "empty holds no images"),
    ("picture.png", "picture.png is not text; expected a list"),
    ("test:x", "TFDS has no such data set"),
    ("exam", "split 'exam' of synthetic: it has"),
])  # fmt: skip
def test_images_that_are_not_there_are_one_line(opened, tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("L", (28, 28)).save("picture.png")
    with pytest.raises(command.UserError, match=words) as error:
        open_images(text, opened)
    assert "\n" not in str(error.value)
    with pytest.raises(FeaturesError, match="layer 'fc9': expected some of"):
        write_features(opened, open_images("test[:3]", opened), ["fc9"], tmp_path / "out.h5")


def test_images_of_another_shape_than_the_networks_are_refused(opened, synthetic_rgb):
    with pytest.raises(FeaturesError, match="synthetic_rgb/1.0.0 has images of 32×32×3; expected 28×28×1, as"):
        open_images("synthetic_rgb:test[:3]", opened, opened.config.data_dir)
