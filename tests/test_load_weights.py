"""Files of weights of other programs: read bit for bit, or refused in one line and in bounded memory."""

import hashlib
import logging
import tracemalloc
import zipfile

import cv2
import numpy as np
import onnx
import pytest
import weight_files
from weight_files import CLASSES, ORDER, random_params

from alexnet_jax import AlexNet, Stem
from alexnet_jax.weights import WeightsError, load_weights, write_native

DEVIATION = np.array([58.395, 57.12, 57.375])
CAFFE_WIDTHS = (4, 4, 6, 4, 4, 2, 2)
TORCH = random_params(towers=1)
CAFFE = random_params()
CAFFENET = (
    "conv1",
    "pool1",
    "norm1",
    "conv2",
    "pool2",
    "norm2",
    "conv3",
    "conv4",
    "conv5",
    "pool5",
    "fc6",
    "fc7",
    "fc8",
)
CROP_MEAN = np.random.default_rng(1).uniform(90, 130, (227, 227, 3)).astype(np.float32)
NAMES = ("tench", "goldfish, Carassius auratus", "ä shark")


def prefixed(state):
    return {"epoch": 7, "arch": "alexnet", "state_dict": {f"module.{key}": x for key, x in state.items()}}


def inner(state):
    return {"state_dict": {key.replace("features.", "features.module."): x for key, x in state.items()}}


TORCH_FILES = {
    "zip": (weight_files.torch_zip, {}),
    "zip, prefixed": (weight_files.torch_zip, {"wrap": prefixed}),
    "legacy": (weight_files.torch_legacy, {}),
    "legacy, prefixed inside": (weight_files.torch_legacy, {"wrap": inner}),
    "legacy, Python 2": (weight_files.torch_legacy, {"python2": True}),
    "safetensors": (weight_files.torch_safetensors, {}),
}
CAFFE_FILES = {
    "caffe V0": (weight_files.caffe, {"generation": 0}),
    "caffe V1": (weight_files.caffe, {"generation": 1}),
    "caffe V2": (weight_files.caffe, {}),
    "caffe, float64": (weight_files.caffe, {"double": True}),
    "caffe, arrays alone": (weight_files.caffe, {"order": tuple(CAFFE)}),
    "onnx": (weight_files.onnx_zoo, {}),
    "onnx, float_data": (weight_files.onnx_zoo, {"raw": False}),
    "npy": (weight_files.toronto, {}),
    "npy of Python 2": (weight_files.toronto_python2, {}),
    "pickle 2": (weight_files.toronto, {"protocol": 2}),
    "pickle 5": (weight_files.toronto, {"protocol": 5}),
    "mat": (weight_files.matconvnet, {"average": CROP_MEAN, "names": NAMES}),
    "mat, compressed": (weight_files.matconvnet, {"average": CROP_MEAN, "names": NAMES, "compress": True}),
    "mat, old": (weight_files.matconvnet, {"average": CROP_MEAN, "names": NAMES, "old": True}),
}


def assert_equal_params(found, expected):
    assert {layer: set(p) for layer, p in found.items()} == {layer: set(p) for layer, p in expected.items()}
    for layer, arrays in expected.items():
        for name, x in arrays.items():
            y = found[layer][name]
            assert y.dtype == np.float32 and y.flags.c_contiguous
            np.testing.assert_array_equal(y, x, err_msg=f"{layer}.{name}")


@pytest.mark.parametrize("name", TORCH_FILES)
def test_torchs_files_are_read_bit_for_bit(tmp_path, name):
    write, options = TORCH_FILES[name]
    write(tmp_path / "a.bin", TORCH, **options)
    weights = load_weights(tmp_path / "a.bin")
    divided = {
        "kernel": (TORCH["conv1"]["kernel"] / DEVIATION[:, None]).astype(np.float32),
        "bias": TORCH["conv1"]["bias"],
    }
    assert_equal_params(weights.params, TORCH | {"conv1": divided})
    assert weights.model == AlexNet(CLASSES, "torchvision", stem=Stem(11, 4, 2), towers=1, widths=CAFFE_WIDTHS)
    assert weights.resizing == "torchvision" and weights.preprocess.crop == 224 and weights.class_names is None
    np.testing.assert_array_equal(
        weights.preprocess.mean, np.full((256, 256, 3), [123.675, 116.28, 103.53], np.float32)
    )
    image = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    inputs = np.asarray(weights.preprocess.center_crop(image), np.float64) / DEVIATION
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(inputs, expected[:, 16:240, 16:240], atol=1e-5)


def test_a_zip_file_with_64_bit_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    weight_files.torch_zip(tmp_path / "a.pth", TORCH)
    content = (tmp_path / "a.pth").read_bytes()
    assert b"PK\6\6" in content
    (tmp_path / "a.pth").write_bytes(content[:-14] + b"\xff" * 12 + bytes(2))  # the sizes that do not fit
    assert_equal_params({"fc7": load_weights(tmp_path / "a.pth").params["fc7"]}, {"fc7": TORCH["fc7"]})


def test_a_changed_byte_in_a_zip_file_is_found(tmp_path):
    weight_files.torch_zip(tmp_path / "a.pth", TORCH)
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.find(TORCH["conv2"]["bias"].tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="another CRC-32"):
        load_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("name", CAFFE_FILES)
def test_files_of_caffes_network_are_read_bit_for_bit(tmp_path, name):
    write, options = CAFFE_FILES[name]
    write(tmp_path / "a.bin", CAFFE, **options)
    weights = load_weights(tmp_path / "a.bin")
    assert_equal_params(weights.params, CAFFE)
    assert weights.model == AlexNet(CLASSES, "caffe", widths=CAFFE_WIDTHS)
    assert weights.resizing == "caffe" and weights.preprocess.crop == 227
    assert weights.class_names == (NAMES if name.startswith("mat") else None)
    crop = weights.preprocess.mean[14:241, 14:241]
    expected = CROP_MEAN if name.startswith("mat") else np.broadcast_to(
        np.float32(weight_files.MEAN_BGR[::-1]), (227, 227, 3)
    )  # fmt: skip
    assert weights.preprocess.mean.shape == (256, 256, 3)
    np.testing.assert_array_equal(crop, expected)
    assert weights.source.sha256 == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    assert weights.source.file == "a.bin" and weights.source.format
    write_native(weights, tmp_path / "b.safetensors")
    again = load_weights(tmp_path / "b.safetensors")
    assert_equal_params(again.params, CAFFE)
    assert again.source == weights.source and again.model == weights.model


def test_caffes_mean_image(tmp_path):
    image = np.random.default_rng(0).uniform(90, 130, (3, 256, 256)).astype(np.float32)
    weight_files.caffe_mean(tmp_path / "mean.binaryproto", image)
    for write in (weight_files.caffe, weight_files.onnx_zoo, weight_files.toronto):
        write(tmp_path / "a.bin", CAFFE)
        weights = load_weights(tmp_path / "a.bin", tmp_path / "mean.binaryproto")
        np.testing.assert_array_equal(weights.preprocess.mean, image[::-1].transpose(1, 2, 0))
    weight_files.torch_zip(tmp_path / "a.pth", TORCH)
    with pytest.raises(WeightsError, match="this format has its own mean"):
        load_weights(tmp_path / "a.pth", tmp_path / "mean.binaryproto")
    weight_files.caffe_mean(tmp_path / "mean.binaryproto", image[:, :200])
    weight_files.caffe(tmp_path / "a.bin", CAFFE)
    with pytest.raises(WeightsError, match="mean image of 200×256×3; expected"):
        load_weights(tmp_path / "a.bin", tmp_path / "mean.binaryproto")


def test_classes_and_widths_are_those_of_the_file(tmp_path):
    places = random_params((4, 6, 8, 6, 4, 2, 3), 365, towers=1)
    weight_files.torch_legacy(tmp_path / "places.pth", places, inner)
    weights = load_weights(tmp_path / "places.pth")
    assert weights.model.num_classes == 365 and weights.model.widths == (4, 6, 8, 6, 4, 2, 3)
    one_tower = random_params(towers=1)
    weight_files.caffe(tmp_path / "one.caffemodel", one_tower)
    weights = load_weights(tmp_path / "one.caffemodel")
    assert weights.model.towers == 1
    assert_equal_params(weights.params, one_tower)


def test_a_known_name_with_another_hash_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for name in ("alexnet-owt-7be5be79.pth", "bvlc_alexnet.caffemodel"):
            writer = weight_files.caffe if name.endswith("caffemodel") else weight_files.torch_zip
            writer(tmp_path / name, CAFFE if name.endswith("caffemodel") else TORCH)
            load_weights(tmp_path / name)
        weight_files.torch_zip(tmp_path / "a.pth", TORCH)
        digest = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
        (tmp_path / "a.pth").rename(known := tmp_path / f"alexnet-owt-{digest[:8]}.pth")
        load_weights(known)  # no warning
    texts = [record.getMessage() for record in caplog.records]
    assert "SHA-256" in texts[0] and "expected 7be5be79" in texts[0] and len(texts) == 2 and "9116a64c" in texts[1]


class Command:
    """An object whose pickle runs a command when it is loaded with `pickle`."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("write", [weight_files.torch_zip, weight_files.torch_legacy])
def test_a_pickle_that_names_a_command_runs_nothing(tmp_path, write):
    marker = tmp_path / "executed"
    write(tmp_path / "a.pth", TORCH, lambda state: {"state_dict": state, "other": Command(marker)})
    with pytest.raises(WeightsError, match="names (posix|os).system, which was not loaded"):
        load_weights(tmp_path / "a.pth")
    with open(tmp_path / "a.npy", "wb") as file:
        np.save(file, {"conv1": Command(marker)}, allow_pickle=True)
    with pytest.raises(WeightsError, match="names (posix|os).system, which was not loaded"):
        load_weights(tmp_path / "a.npy")
    assert not marker.exists()


def without(params, layer):
    return {name: arrays for name, arrays in params.items() if name != layer}


def filled(params, value):
    bias = params["fc8"]["bias"].copy()
    bias[0] = value
    return params | {"fc8": params["fc8"] | {"bias": bias}}


def alphabet(path, params):
    weight_files.torch_zip(path, params, lambda state: {**state, "features.12.weight": state["features.0.weight"]})


OTHER_NETWORKS = {
    "CaffeNet": (lambda path: weight_files.caffe(path, CAFFE, order=CAFFENET), "CaffeNet's, which pools before"),
    "CaffeNet, V0": (lambda path: weight_files.caffe(path, CAFFE, 0, CAFFENET, "CaffeNet"), "CaffeNet's"),
    "CaffeNet of the zoo": (lambda path: weight_files.onnx_zoo(path, CAFFE, CAFFENET), "CaffeNet's"),
    "CaffeNet of MatConvNet": (
        lambda path: weight_files.matconvnet(path, CAFFE, CROP_MEAN, NAMES, order=CAFFENET), "CaffeNet's"),
    "an unknown order": (
        lambda path: weight_files.caffe(path, CAFFE, order=tuple(CAFFE), name="Net"), "its layers are conv conv"),
    "LRN": (lambda path: weight_files.caffe(path, CAFFE, lrn_alpha=1.0), "α=1, β=0.75, k=1; expected n=5, α=0.0001"),
    "stride": (lambda path: weight_files.caffe(path, CAFFE, stride=2), "conv1 has stride 2 and padding 0; expected 4"),
    "a layer less": (
        lambda path: weight_files.caffe(path, CAFFE, order=tuple(n for n in ORDER if n != "fc7")), "its layers are"),
    "a missing tensor": (
        lambda path: weight_files.torch_zip(path, TORCH, lambda s: {k: x for k, x in s.items() if "10.bias" not in k}),
        "features.10.bias is missing"),
    "an extra tensor": (lambda path: alphabet(path, TORCH), "it has 'features.12.weight'"),
    "NaN": (lambda path: weight_files.torch_legacy(path, filled(TORCH, np.nan)), "fc8.bias holds values that are not"),
    "infinity": (lambda path: weight_files.toronto(path, filled(CAFFE, np.inf)), "fc8.bias holds values that are not"),
    "another shape": (
        lambda path: weight_files.torch_zip(path, TORCH | {"fc7": CAFFE["fc6"]}), "fc7.kernel is .*; expected"),
    "a compressed zip": (
        lambda path: weight_files.torch_zip(path, TORCH, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a zip of text": (lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"), "zip"),
    "an array": (lambda path: np.save(path.open("wb"), np.zeros(3)), "a .npy file of one array"),
    "nothing": (lambda path: path.write_bytes(b""), "not a file of weights"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "not a file of weights"),
    "a folder's name": (lambda path: None, "No such file"),
    "MAT 7.3": (lambda path: path.write_bytes(b"MATLAB 7.3 MAT-file" + bytes(600)), "HDF5"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_other_files_are_one_line(tmp_path, name):
    write, words = OTHER_NETWORKS[name]
    path = tmp_path / "a.bin"
    write(path)
    with pytest.raises(WeightsError, match=words) as error:
        load_weights(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path)) and len(str(error.value)) < 600


def scaled(params):
    """Parameters whose activations neither grow nor shrink from layer to layer."""
    kernels = {layer: arrays["kernel"] for layer, arrays in params.items()}
    return {
        layer: {"kernel": kernel * np.float32(100 * np.prod(kernel.shape[:-1]) ** -0.5), "bias": params[layer]["bias"]}
        for layer, kernel in kernels.items()
    }


@pytest.mark.parametrize("runtime", ["onnxruntime", "cv2.dnn"])
def test_logits_of_the_zoos_graph_equal_those_of_others(tmp_path, runtime):
    weight_files.onnx_zoo(tmp_path / "a.onnx", scaled(random_params((8, 8, 12, 8, 8, 6, 6))), side=227)
    weights = load_weights(tmp_path / "a.onnx")
    image = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    inputs = weights.preprocess.center_crop(image)
    logits = np.asarray(weights.model.apply({"params": weights.params}, inputs))

    graph = onnx.load(tmp_path / "a.onnx")
    assert graph.graph.node[-1].op_type == "Softmax"
    del graph.graph.node[-1], graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info("fc8_1", 1, [1, CLASSES]))
    onnx.save(graph, tmp_path / "logits.onnx")
    bgr = np.ascontiguousarray(np.asarray(inputs)[..., ::-1].transpose(0, 3, 1, 2))
    if runtime == "cv2.dnn":
        network = cv2.dnn.readNetFromONNX(str(tmp_path / "logits.onnx"))
        network.setInput(bgr)
        expected = network.forward()
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(tmp_path / "logits.onnx", providers=["CPUExecutionProvider"])
        (expected,) = session.run(None, {"data_0": bgr})
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_itself(tmp_path, legacy):
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.alexnet(num_classes=50).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    weights = load_weights(tmp_path / "a.pth")
    arrays = {key: x.numpy() for key, x in model.state_dict().items()}
    found = weight_files.torch_keys(weights.params)
    for key, x in arrays.items():
        expected = (x / DEVIATION[:, None, None]).astype(np.float32) if key == "features.0.weight" else x
        np.testing.assert_array_equal(found[key], expected, err_msg=key)
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
    logits = weights.model.apply({"params": weights.params}, weights.preprocess.center_crop(images))
    normalized = ((images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])[:, 16:240, 16:240].transpose(
        0, 3, 1, 2
    )
    with torch.no_grad():
        expected = model(torch.tensor(normalized, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


MEDIUM = (96, 256, 384, 384, 256, 256, 256)


@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors", "caffe V2", "onnx", "npy", "mat", "mat, compressed"])
def test_reading_holds_the_parameters_and_little_more(tmp_path, name):
    write, options = (TORCH_FILES | CAFFE_FILES)[name]
    path = tmp_path / "a.bin"
    write(path, random_params(MEDIUM, 3, towers=1 if name in TORCH_FILES else 2), **options)
    size = path.stat().st_size
    tracemalloc.start()
    try:
        load_weights(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = 4 * 36 * MEDIUM[4] * MEDIUM[5]
    assert size > 15e6 and peak < size + 20e6 + 2 * largest * ("compressed" in name), f"{peak / size:.2f} × the file"
