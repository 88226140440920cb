"""A network as an ONNX graph: convolutions, LRN and pooling as ONNX has them, the parameters bit for bit."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from alexnet_jax.model import AlexNet
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.runtime.files import replaced
from alexnet_jax.variants import LAYERS, VARIANTS
from alexnet_jax.weights.description import Weights
from alexnet_jax.weights.native import KEY, describe

OPSET, IR_VERSION = 17, 8  # of 2022, and the file version that belongs to it: older runtimes read it too
ACTIVATION = {"relu": "Relu", "tanh": "Tanh"}


def write_onnx(weights: Weights, path: Path, with_preprocessing: bool = False) -> None:
    """Write `onnx_model` to a file, the complete file or nothing; raises OSError."""
    content = onnx_model(weights, with_preprocessing).SerializeToString()
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def onnx_model(weights: Weights, with_preprocessing: bool = False) -> onnx.ModelProto:
    """Return a network without dropout as an ONNX model of opset 17, in float32 whatever its dtype.

    Its input `images` has any batch size, its output `logits` is float32 [batch, num_classes]. The metadata has the
    description of `write_native` as `alexnet_jax`, and the `class_names` as a JSON list if there are any.

    Args:
      with_preprocessing: whether `images` is uint8 [batch, H, W, C], RGB in 0 to 255, of which the graph takes the
        center crop; or the network's inputs, float32 [batch, C, H, W], (pixel − mean) × scale.
    """
    graph, preprocess = _Graph(), weights.preprocess
    if with_preprocessing:
        pixels, element = ["batch", *preprocess.mean.shape], TensorProto.UINT8
        x = _center_crop(graph, preprocess, "images")
    else:
        height, width, channels = preprocess.image_shape
        pixels, element = ["batch", channels, height, width], TensorProto.FLOAT
        x = "images"
    x = _convolutions(graph, weights, x)
    _fully_connected(graph, weights, x)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "alexnet",
            [helper.make_tensor_value_info("images", element, pixels)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weights.model.num_classes])],
            graph.initializers,
        ),
        producer_name="alexnet-jax",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    names = {} if weights.class_names is None else {"class_names": json.dumps(weights.class_names)}
    helper.set_model_props(model, {KEY: json.dumps(describe(weights)), **names})
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """The nodes and the constants so far. A node's one output has the node's name."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def add(self, operator: str, inputs: Sequence[str], name: str, **attributes) -> str:
        """Add a node and return the name of its output."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an array and return its name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def scalar(self, name: str, value: float) -> str:
        """Add a float32 and return its name."""
        return self.constant(name, np.asarray(value, np.float32))


def _center_crop(graph: _Graph, preprocess: Preprocess, x: str) -> str:
    """Add `Preprocess.center_crop`, from uint8 NHWC to float32 NCHW."""
    # The crop, from the image with its border of mean color, in rows and columns of the image without it.
    sizes = preprocess.mean.shape[:2]
    low = [(size + 2 * preprocess.pad - preprocess.crop) // 2 - preprocess.pad for size in sizes]
    high = [start + preprocess.crop for start in low]
    kept = [(max(start, 0), min(end, size)) for start, end, size in zip(low, high, sizes, strict=True)]
    (top, bottom), (left, right) = kept

    x = graph.add("Cast", [x], "pixels", to=TensorProto.FLOAT)
    if kept != [(0, size) for size in sizes]:
        limits = {"starts": [top, left], "ends": [bottom, right], "axes": [1, 2]}
        constants = [graph.constant(f"crop.{name}", np.array(values)) for name, values in limits.items()]
        x = graph.add("Slice", [x, *constants], "crop")
    mean = np.asarray(preprocess.mean, np.float32)[top:bottom, left:right]
    x = graph.add("Sub", [x, graph.constant("mean", mean)], "centered")
    x = graph.add("Transpose", [x], "nchw", perm=[0, 3, 1, 2])
    before = [first - start for (first, _), start in zip(kept, low, strict=True)]
    after = [end - last for (_, last), end in zip(kept, high, strict=True)]
    if any(before + after):
        x = graph.add("Pad", [x, graph.constant("border.pads", np.array([0, 0, *before, 0, 0, *after]))], "border")
    if preprocess.resize:
        # As two products of matrices: the weights are those of `jax.image.resize`, antialiased where it shrinks.
        shape = (preprocess.resize, preprocess.crop)
        rows = np.asarray(jax.image.resize(np.eye(preprocess.crop, dtype=np.float32), shape, "bilinear"))
        x = graph.add("MatMul", [graph.constant("resize.rows", rows), x], "resized_rows")
        x = graph.add("MatMul", [x, graph.constant("resize.columns", rows.T)], "resized")
    if preprocess.scale != 1:
        x = graph.add("Mul", [x, graph.scalar("scale", preprocess.scale)], "scaled")
    return x


def _convolutions(graph: _Graph, weights: Weights, x: str) -> str:
    """Add conv1 to conv5 with what follows each, and return the output [batch, C, H, W]."""
    model, variant = weights.model, VARIANTS[weights.model.variant]
    for number, layer in enumerate(LAYERS[:5], 1):
        if layer in weights.params:
            # The kernels of conv1 and conv3 take the channels of both towers.
            towers = 1 if layer in ("conv1", "conv3") else model.towers
            x = _conv(graph, weights, layer, x, towers)
        for operation in variant.operations(layer, omitted=layer not in weights.params):
            if operation == "relu":
                x = graph.add(ACTIVATION[model.activation], [x], f"{model.activation}{number}")
            elif operation == "lrn" and model.lrn:
                x = _lrn(graph, model, x, f"norm{number}")
            elif operation == "contrast_norm":
                x = _contrast_norm(graph, *variant.contrast_norm, x, f"contrast_norm{number}")
            elif operation == "pool":
                window = [model.pool_window] * 2
                x = graph.add("MaxPool", [x], f"pool{number}", kernel_shape=window, strides=[2, 2])
    return x


def _conv(graph: _Graph, weights: Weights, layer: str, x: str, towers: int) -> str:
    kernel, bias = (weights.params[layer][name] for name in ("kernel", "bias"))
    side, stride, padding = weights.model.stem if layer == "conv1" else (len(kernel), 1, len(kernel) // 2)
    ceil_mode = VARIANTS[weights.model.variant].ceil_mode
    size = weights.preprocess.image_shape[0]  # with a stride of 1 there is nothing to round
    high = padding + -(size + 2 * padding - side) % stride * ceil_mode
    inputs = [
        x, graph.constant(f"{layer}.kernel", kernel.transpose(3, 2, 0, 1)), graph.constant(f"{layer}.bias", bias)
    ]  # fmt: skip
    return graph.add(
        "Conv", inputs, layer, kernel_shape=[side, side], strides=[stride, stride], group=towers,
        pads=[padding, padding, high, high],
    )  # fmt: skip


def _lrn(graph: _Graph, model: AlexNet, x: str, name: str) -> str:
    """Add the LRN of section 3.3, in each tower or across them."""
    variant = VARIANTS[model.variant]
    k, n, alpha, beta = variant.lrn
    alpha = n * (alpha if model.lrn_alpha is None else model.lrn_alpha)  # ONNX divides α by n
    constants = dict(size=n, bias=float(k), alpha=float(alpha), beta=float(beta))
    if model.towers == 1 or variant.lrn_across_towers:
        return graph.add("LRN", [x], name, **constants)
    towers = [f"{name}.tower{i}" for i in range(model.towers)]
    graph.nodes.append(helper.make_node("Split", [x], [f"{tower}.input" for tower in towers], f"{name}.split", axis=1))
    towers = [graph.add("LRN", [f"{tower}.input"], tower, **constants) for tower in towers]
    return graph.add("Concat", towers, name, axis=1)


def _contrast_norm(graph: _Graph, size: int, scale: float, power: float, min_div: float, x: str, name: str) -> str:
    """Add b = a / (minDiv + scale · mean(a²))^power, the mean over size×size pixels with zeros past the edges."""
    square = graph.add("Mul", [x, x], f"{name}.square")
    # The zeros are not those of AveragePool, which OpenCV 4 leaves out of the mean.
    pads = graph.constant(f"{name}.pads", np.array([0, 0, size // 2, size // 2] * 2))
    square = graph.add("Pad", [square, pads], f"{name}.padded")
    mean = graph.add("AveragePool", [square], f"{name}.mean", kernel_shape=[size] * 2)
    scaled = graph.add("Mul", [mean, graph.scalar(f"{name}.scale", scale)], f"{name}.scaled")
    base = graph.add("Add", [scaled, graph.scalar(f"{name}.min_div", min_div)], f"{name}.base")
    divisor = graph.add("Pow", [base, graph.scalar(f"{name}.power", power)], f"{name}.divisor")
    return graph.add("Div", [x, divisor], name)


def _fully_connected(graph: _Graph, weights: Weights, x: str) -> None:
    """Add fc6 to fc8 and the output `logits`."""
    model, variant = weights.model, VARIANTS[weights.model.variant]
    channels = next(width for width in reversed(model.widths[:5]) if width)
    test_scale = 1.0 if variant.inverted_dropout else 1 - model.dropout  # section 4.2
    x = graph.add("Flatten", [x], "flat")
    layers = [layer for layer in LAYERS[5:] if layer in weights.params]
    for layer in layers:
        kernel, bias = (weights.params[layer][name] for name in ("kernel", "bias"))
        if layer == layers[0]:  # its rows are in the order (H, W, C), and here the features in (C, H, W)
            side = math.isqrt(len(kernel) // channels)
            kernel = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
        last = layer == "fc8"
        scaled = test_scale != 1 and not last
        number = layer.removeprefix("fc")
        if scaled and variant.dropout_on_inputs:
            x = graph.add("Mul", [x, graph.scalar(f"{layer}.keep_rate", test_scale)], f"dropout{number}")
        inputs = [x, graph.constant(f"{layer}.kernel", kernel), graph.constant(f"{layer}.bias", bias)]
        x = graph.add("Gemm", inputs, "logits" if last else layer)
        if not last:
            x = graph.add(ACTIVATION[model.activation], [x], f"{model.activation}{number}")
        if scaled and not variant.dropout_on_inputs:
            x = graph.add("Mul", [x, graph.scalar(f"{layer}.keep_rate", test_scale)], f"dropout{number}")
