"""The ONNX zoo's `bvlcalexnet`: Caffe's weights, by the names of the initializers.

The numbers of the fields are those of ONNX's onnx.proto.
"""

import re

import numpy as np

from alexnet_jax.weights.caffe_network import POOL, STEM, caffe_weights, check_lrn, check_order
from alexnet_jax.weights.description import Source, Weights, WeightsError
from alexnet_jax.weights.layouts import bgr_to_rgb, params_of
from alexnet_jax.weights.stored import Stored
from alexnet_jax.weights.wire import Message, read_message

GRAPH = 7  # of ModelProto
KINDS = {"Conv": "conv", "LRN": "lrn", "MaxPool": "pool", "Gemm": "dense"}
DTYPES: dict[int, np.dtype] = {1: np.dtype("<f4"), 11: np.dtype("<f8"), 10: np.dtype("<f2")}
PARTS = {"w": "kernel", "b": "bias"}


def is_onnx(model: Message) -> bool:
    """Return whether a message may be a ModelProto with a graph."""
    return bool(model.regions(GRAPH))


def read_onnx(model: Message, size: int, source: Source, mean: np.ndarray | None = None) -> Weights:
    """Return the network of a ModelProto of the zoo.

    Args:
      size: the bytes of the file.
      source: its name and SHA-256.
      mean: as in `caffe_weights`.

    Raises:
      WeightsError: another network, such as CaffeNet, or a corrupt file.
    """
    graph = read_message(model.regions(GRAPH)[-1], model.left)
    arrays = {}
    for tensor in graph.messages(5):
        name = tensor.text(8)
        if match := re.fullmatch(r"((?:conv|fc)\d)_([wb])_0", name):
            arrays[f"{match[1]}.{PARTS[match[2]]}"] = _array(tensor, name)
        elif tensor.number(2) in DTYPES:
            raise WeightsError(f"its initializer {name!r} is none of the ONNX zoo's bvlcalexnet, conv1_w_0 … fc8_b_0")
    kinds = []
    for node in graph.messages(1):
        kind = KINDS.get(node.text(4), "")
        attributes = {attribute.text(1): attribute for attribute in node.messages(5)}
        if kind == "conv" and "conv" not in kinds:
            strides, pads = (set(_integers(attributes, name)) for name in ("strides", "pads"))
            if (strides, pads | {STEM[1]}) != ({STEM[0]}, {STEM[1]}):
                raise WeightsError("not an AlexNet: conv1 has another stride or padding; expected 4 and 0")
        if kind == "lrn":
            constants = [attributes[n].float(2, x) if n in attributes else x for n, x in LRN_DEFAULTS]
            check_lrn(attributes["size"].number(3), *constants)
        if kind == "pool" and tuple(set(_integers(attributes, n)) for n in ("kernel_shape", "strides")) != POOLS:
            raise WeightsError("not an AlexNet: a pooling other than 3×3 of stride 2")
        if kind == "dense" and ("transB" not in attributes or attributes["transB"].number(3) != 1):
            raise WeightsError("its fully connected kernels are not [out, in]; expected the ONNX zoo's bvlcalexnet")
        kinds += [kind] if kind else []
    check_order(kinds)
    return caffe_weights(bgr_to_rgb(params_of(arrays, "OIHW", size)), source._replace(format="ONNX"), mean)


LRN_DEFAULTS = (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
POOLS = tuple({n} for n in POOL)


def _integers(attributes: dict[str, Message], name: str) -> list[int]:
    return attributes[name].numbers(8) if name in attributes else []


def _array(tensor: Message, name: str) -> Stored:
    dtype = DTYPES.get(tensor.number(2))
    if dtype is None or tensor.number(14):
        raise WeightsError(f"its initializer {name} is not of floats in the same file")
    shape = tuple(tensor.numbers(1))
    if tensor.regions(9):
        return tensor.array(9, dtype, shape)
    return tensor.array(10 if dtype.itemsize == 8 else 4, dtype, shape)
