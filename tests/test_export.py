"""Weights written for other programs: the same bits, and the same logits where others compute them."""

import json
import shutil
import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from runners import ROOT, saved_state
from safetensors import safe_open
from safetensors.numpy import load_file

from alexnet_jax import VARIANTS, AlexNet, Stem
from alexnet_jax.export import export, main
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.weights import Source, Weights, WeightsError, read_native
from alexnet_jax.weights.to_onnx import onnx_model

WIDTHS = (8, 12, 16, 16, 12, 20, 24)
SMALL = dict(num_classes=3, widths=WIDTHS)
TORCH_STD = np.array([0.229, 0.224, 0.225])
TORCH_MEAN = np.array([0.485, 0.456, 0.406])


def random_weights(side=227, crop=224, resize=0, pad=0, channels=3, scale=1.0, mean=None, **fields):
    """Return random weights, whose activations neither grow nor shrink from layer to layer."""
    random = np.random.default_rng(0)
    model = AlexNet(**fields)
    mean = random.uniform(80, 130, (side, side, channels)) if mean is None else np.broadcast_to(mean, (side, side, 3))
    preprocess = Preprocess(np.float32(mean), pad, crop, resize, flip=False, lighting=None, scale=scale)
    image = jnp.zeros((1, *preprocess.image_shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]

    def draw(x):
        deviation = np.prod(x.shape[:-1]) ** -0.5 if x.ndim > 1 else 0.3
        return random.standard_normal(x.shape, np.float32) * np.float32(deviation)

    names = tuple(f"class ä{i}" for i in range(model.num_classes))
    return Weights(model, jax.tree.map(draw, shapes), preprocess, class_names=names, source=Source("torch", "a.pth"))


def pixels_of(weights, batch):
    return np.random.default_rng(1).integers(0, 256, (batch, *weights.preprocess.mean.shape), np.uint8)


def logits_of(weights, pixels):
    model = weights.model.clone(dtype=jnp.float32)
    return np.asarray(model.apply({"params": weights.params}, weights.preprocess.center_crop(pixels)))


def assert_close(logits, expected):
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


# Every variant; layers left out; one tower; tanh; borders, crops, resizing to more and to fewer pixels, gray images.
NETWORKS = {
    **{name: dict(variant=name, **SMALL) for name in VARIANTS},
    "single": dict(towers=1, num_classes=3, widths=(8, 0, 16, 0, 12, 20, 0)),
    "single without LRN": dict(towers=1, lrn=False, num_classes=3, widths=(8, 12, 16, 16, 0, 20, 24)),
    "two towers without conv2": dict(variant="source2012", num_classes=3, widths=(8, 0, 16, 16, 12, 20, 24)),
    "two towers without conv3": dict(num_classes=3, widths=(8, 12, 0, 16, 12, 20, 24)),
    "two layers": dict(variant="source2012", towers=1, num_classes=3, widths=(8, 8, 0, 0, 0, 0, 0)),
    "two towers of 2014": dict(variant="torchvision", towers=2, dropout=0.3, **SMALL),
    "tanh": dict(activation="tanh", lrn=False, dropout=0.3, scale=0.01, **SMALL),
    "gray": dict(side=28, crop=28, pad=4, stem=Stem(3, 1, 1), channels=1, lrn_alpha=0.3, scale=1 / 64, **SMALL),
    "enlarged": dict(side=28, crop=26, resize=224, channels=1, dropout=0, dtype=jnp.bfloat16, **SMALL),
    "shrunk": dict(side=100, crop=90, resize=67, pool_window=2, scale=0.02, **SMALL),
    "in a border": dict(side=29, crop=33, pad=3, stem=Stem(5, 2, 0), **SMALL),
}


@pytest.mark.parametrize("with_preprocessing", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_has_the_logits_of_the_network(network, with_preprocessing, tmp_path):
    weights = random_weights(**NETWORKS[network])
    pixels = pixels_of(weights, 3)
    expected = logits_of(weights, pixels)
    inputs = pixels
    if not with_preprocessing:
        inputs = np.asarray(weights.preprocess.center_crop(pixels)).transpose(0, 3, 1, 2)
    export(weights, tmp_path / "a.onnx", with_preprocessing=with_preprocessing)

    network = cv2.dnn.readNetFromONNX(str(tmp_path / "a.onnx"))
    network.setInput(np.ascontiguousarray(inputs))
    assert_close(network.forward(), expected)

    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        assert_close(session.run(["logits"], {"images": inputs[:batch]})[0], expected[:batch])


@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_has_the_bits_of_the_parameters(network):
    weights = random_weights(**NETWORKS[network])
    arrays = {x.name: numpy_helper.to_array(x) for x in onnx_model(weights).graph.initializer}
    first = next(layer for layer in ("fc6", "fc7", "fc8") if layer in weights.params)
    for layer, expected in weights.params.items():
        kernel = arrays[f"{layer}.kernel"]
        if kernel.ndim == 4:
            kernel = np.moveaxis(kernel, (0, 1), (3, 2))
        elif layer == first:
            channels = [width for width in weights.model.widths[:5] if width][-1]
            side = round((len(kernel) / channels) ** 0.5)
            kernel = np.moveaxis(kernel.reshape(channels, side, side, -1), 0, 2).reshape(kernel.shape)
        np.testing.assert_array_equal(kernel, expected["kernel"], layer)
        np.testing.assert_array_equal(arrays[f"{layer}.bias"], expected["bias"], layer)


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_onnx_has_the_operations_of_the_paper_as_such():
    nodes = onnx_model(random_weights(**NETWORKS["paper"])).graph.node
    convolutions = [attributes(node) for node in nodes if node.op_type == "Conv"]
    assert [node["group"] for node in convolutions] == [1, 2, 1, 2, 2]
    assert convolutions[0]["pads"] == [0, 0, 3, 3]  # 55×55 outputs of 224×224, section 3.5
    norms = [attributes(node) for node in nodes if node.op_type == "LRN"]
    assert len(norms) == 4  # of each tower, twice
    for norm in norms:
        assert norm == {"size": 5, "bias": 2, "alpha": pytest.approx(5e-4), "beta": 0.75}
    nodes = onnx_model(random_weights(**NETWORKS["caffe"])).graph.node
    norms = [attributes(node) for node in nodes if node.op_type == "LRN"]
    assert norms == [{"size": 5, "bias": 1, "alpha": pytest.approx(1e-4), "beta": 0.75}] * 2  # Caffe's own constants


def test_onnx_has_the_description_and_any_batch_size():
    weights = random_weights(**NETWORKS["paper"])
    model = onnx_model(weights, with_preprocessing=True)
    metadata = {x.key: x.value for x in model.metadata_props}
    assert json.loads(metadata["class_names"]) == list(weights.class_names)
    description = json.loads(metadata["alexnet_jax"])
    assert description["source"]["file"] == "a.pth" and description["network"]["variant"] == "paper"
    assert [(x.domain, x.version) for x in model.opset_import] == [("", 17)]
    (images,), (logits,) = model.graph.input, model.graph.output
    shapes = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in (images, logits)]
    assert shapes == [["batch", 227, 227, 3], ["batch", 3]]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8


FRESH = """
import sys
sys.modules["alexnet_jax"] = None  # importing it raises
import jax, numpy as np
from pathlib import Path
network = jax.export.deserialize(bytearray(Path("a.stablehlo").read_bytes()))
assert set(network.platforms) == {"cpu", "cuda", "tpu"}
images = np.load("images.npy")
for batch in (1, 7):
    np.save(f"logits{batch}.npy", network.call(images[:batch]))
"""


@pytest.mark.parametrize("network,with_preprocessing", [
    *((name, False) for name in VARIANTS), ("gray", True), ("shrunk", True), ("enlarged", False), ("single", True)
])  # fmt: skip
def test_stablehlo_runs_without_this_package(network, with_preprocessing, tmp_path):
    fields = {**NETWORKS[network], "dtype": jnp.float32}
    if network == "paper":  # the layers that a CPU computes by Winograd's convolution when it knows the batch size
        fields["widths"] = (96, 64, 64, 64, 64, 20, 24)
    weights = random_weights(**fields)
    pixels = pixels_of(weights, 7)
    export(weights, tmp_path / "a.stablehlo", with_preprocessing=with_preprocessing)
    np.save(tmp_path / "images.npy", pixels if with_preprocessing else weights.preprocess.center_crop(pixels))
    subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, check=True, timeout=300)
    expected = logits_of(weights, pixels)
    for batch in (1, 7):
        assert_close(np.load(tmp_path / f"logits{batch}.npy"), expected[:batch])


def torch_weights(**fields):
    """Return random weights of torchvision's shapes and mean."""
    mean = 255 * TORCH_MEAN
    fields = {"variant": "torchvision", "num_classes": 5, "crop": 224, "side": 224, "mean": mean, **fields}
    return random_weights(**fields)


def test_torch_keys_have_the_bits_in_the_layout_of_torchvision(tmp_path):
    weights = torch_weights()
    random = np.random.default_rng(2)
    theirs = random.normal(0, 0.1, (64, 3, 11, 11)).astype(np.float32)  # as if read from a file of torchvision
    kernel = theirs.transpose(2, 3, 1, 0) / (255 * TORCH_STD)[:, None]
    weights.params["conv1"]["kernel"] = kernel.astype(np.float32)
    export(weights, tmp_path / "a.safetensors", keys="torch")
    tensors = load_file(tmp_path / "a.safetensors")

    positions = {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10, "fc6": 1, "fc7": 4, "fc8": 6}
    keys = {layer: f"{'features' if layer[0] == 'c' else 'classifier'}.{i}" for layer, i in positions.items()}
    assert set(tensors) == {f"{key}.{name}" for key in keys.values() for name in ("weight", "bias")}
    for layer, key in keys.items():
        kernel = tensors[f"{key}.weight"]
        if layer == "conv1":
            np.testing.assert_allclose(kernel, theirs, rtol=1e-7)
            kernel = (kernel / (255 * TORCH_STD)[:, None, None]).astype(np.float32)
        if layer == "fc6":
            kernel = kernel.reshape(-1, 256, 6, 6).transpose(2, 3, 1, 0).reshape(9216, -1)
        else:
            kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        np.testing.assert_array_equal(kernel, weights.params[layer]["kernel"], layer)
        np.testing.assert_array_equal(tensors[f"{key}.bias"], weights.params[layer]["bias"], layer)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["class_names"]) == list(weights.class_names)
    np.testing.assert_allclose(json.loads(metadata["mean"]), TORCH_MEAN, atol=1e-6)


def test_torchvision_computes_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    from safetensors.torch import load_file

    weights = torch_weights(scale=0.02)
    export(weights, tmp_path / "a.safetensors", keys="torch")
    network = torchvision.models.alexnet(num_classes=5)
    network.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    pixels = pixels_of(weights, 2)
    images = (pixels / 255 - TORCH_MEAN) / TORCH_STD
    with torch.no_grad():
        logits = network.eval()(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32))
    assert_close(logits.numpy(), logits_of(weights, pixels))


@pytest.mark.parametrize("fields,words", [
    (dict(variant="caffe", stem=Stem(11, 4, 2)), "has variant='torchvision', and this network 'caffe'"),
    (dict(widths=WIDTHS), r"has widths=\(64, 192, 384, 256, 256, 4096, 4096\), and this network \(8, 12"),
    (dict(activation="tanh"), "has activation='relu', and this network 'tanh'"),
    (dict(channels=1, mean=None), r"has a kernel \[11, 11, 3, 64\] in conv1, and this network \[11, 11, 1, 64\]"),
    (dict(side=260, crop=260), r"has a kernel \[9216, 4096\] in fc6, and this network"),
])  # fmt: skip
def test_torch_keys_are_for_the_network_of_torchvision(fields, words, tmp_path):
    small = {"widths": (64, 192, 384, 256, 256, 4096, 4096), "num_classes": 2}
    with pytest.raises(WeightsError, match=words):
        export(torch_weights(**{**small, **fields}), tmp_path / "a.safetensors", keys="torch")
    assert not list(tmp_path.iterdir())


def run_export(*arguments):
    """Run the command: (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "alexnet_jax.export", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_run_is_exported_without_its_data_set(trained, tmp_path, monkeypatch):
    config = json.loads((trained / "config.json").read_text())
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "config.json").write_text(json.dumps({**config, "data_dir": str(tmp_path / "deleted")}))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "deleted"))
    trained, out = folder, tmp_path / "a.safetensors"
    code, output, error = run_export(trained, out)
    assert code == 0 and not error and output == f"Written to {out} ({out.stat().st_size / 1e6:.1f} MB)\n"
    weights = read_native(out)
    state = saved_state(trained, 40)
    for layer, arrays in weights.params.items():
        for name, x in arrays.items():
            (saved,) = (array for path, array in state.items() if path.endswith(f"params/{layer}/{name}"))
            np.testing.assert_array_equal(x, saved)

    code, output, error = run_export(out, tmp_path / "a.onnx", "--with_preprocessing")
    assert code == 0 and not error
    network = cv2.dnn.readNetFromONNX(str(tmp_path / "a.onnx"))
    pixels = pixels_of(weights, 2)
    network.setInput(pixels)
    assert_close(network.forward(), logits_of(weights, pixels))
    code, output, error = run_export(out, tmp_path / "a.stablehlo")
    assert code == 0 and not error


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "text.safetensors").write_text("not weights")
    weights = random_weights(**NETWORKS["gray"])
    good = tmp_path / "good.safetensors"
    export(weights, good)
    content = good.read_bytes()
    (tmp_path / "busy.onnx.tmp").mkdir()
    (tmp_path / "busy.safetensors.tmp").mkdir()
    cases = [
        ((good, tmp_path / "a.pth"), "expected a name that ends in .safetensors, .onnx, .stablehlo"),
        ((good, tmp_path / "folder.onnx"), "expected a file in an existing folder"),
        ((good, tmp_path / "missing" / "a.onnx"), "expected a file in an existing folder"),
        ((tmp_path / "missing.safetensors", tmp_path / "a.onnx"), "missing.safetensors: No such file"),
        ((tmp_path / "missing.safetensors", good), "missing.safetensors: No such file"),
        ((tmp_path / "text.safetensors", tmp_path / "a.onnx"), "text.safetensors"),
        ((good, good), "is the file that is read; name another"),
        ((good, ""), "OUT is empty"),
        ((good, tmp_path / "a.onnx", "--keys=torch"), "--keys=torch: .onnx has no keys"),
        ((good, tmp_path / "a.safetensors", "--with_preprocessing"), "arrays, not operations"),
        ((good, tmp_path / "a.safetensors", "--keys=torch"), "has variant='torchvision', and this network 'paper'"),
        ((good, tmp_path / "busy.onnx"), "cannot be written"),
        ((good, tmp_path / "busy.safetensors"), "cannot be written"),
        ((tmp_path, tmp_path / "a.onnx"), str(tmp_path)),
    ]
    for arguments, words in cases:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as error:
            main()
        message = error.value.code
        assert message.startswith("Error: ") and words in message and "\n" not in message, message
    assert capsys.readouterr() == ("", "")
    assert good.read_bytes() == content
    assert not list(tmp_path.glob("a.*"))
