"""Caffe's `bvlc_alexnet.caffemodel`, of each of its three generations of layers, and `imagenet_mean.binaryproto`.

The numbers of the fields are those of Caffe's caffe.proto.
"""

import numpy as np

from alexnet_jax.variants import LAYERS
from alexnet_jax.weights.caffe_network import POOL, STEM, caffe_weights, check_lrn, check_order
from alexnet_jax.weights.description import Source, Weights, WeightsError
from alexnet_jax.weights.layouts import bgr_to_rgb, check_names, params_of
from alexnet_jax.weights.stored import Region, Stored
from alexnet_jax.weights.wire import Message, read_message

NAME, LAYER_V1, LAYER = 1, 2, 100  # of NetParameter
KINDS = {
    "Convolution": "conv", "LRN": "lrn", "Pooling": "pool", "InnerProduct": "dense",
    4: "conv", 15: "lrn", 17: "pool", 14: "dense",
    "conv": "conv", "lrn": "lrn", "pool": "pool", "innerproduct": "dense",
}  # fmt: skip


def is_caffe(net: Message) -> bool:
    """Return whether a message may be a NetParameter with layers."""
    return bool(net.regions(LAYER) or net.regions(LAYER_V1))


def read_caffe(net: Message, size: int, source: Source, mean: np.ndarray | None = None) -> Weights:
    """Return the network of a NetParameter.

    Args:
      size: the bytes of the file.
      source: its name and SHA-256.
      mean: as in `caffe_weights`.

    Raises:
      WeightsError: another network, such as CaffeNet, or a corrupt file.
    """
    kinds, arrays = [], {}
    for region in net.regions(LAYER) or net.regions(LAYER_V1):
        name, kind, blobs = _layer(read_message(region, net.left), modern=bool(net.regions(LAYER)))
        if kind in KINDS.values():
            kinds.append(kind)
        if blobs:
            if name in arrays or len(blobs) != 2:
                raise WeightsError(f"layer {name!r} is there twice, or has not two arrays, its kernel and its bias")
            arrays[name] = [_blob(read_message(blob, net.left)) for blob in blobs]
    if "lrn" in kinds or "pool" in kinds or net.text(NAME) != "AlexNet":  # some tools keep the layers with arrays alone
        check_order(kinds)
    check_names(arrays, LAYERS)
    stored = {}
    for name, (kernel, bias) in arrays.items():
        dense = not name.startswith("conv")
        stored[f"{name}.kernel"] = kernel.reshaped(*kernel.shape[-2:]) if dense else kernel
        stored[f"{name}.bias"] = bias.reshaped(*bias.shape[-1:])
    return caffe_weights(bgr_to_rgb(params_of(stored, "OIHW", size)), source._replace(format="Caffe"), mean)


def _layer(layer: Message, modern: bool) -> tuple[str, str, list[Region]]:
    """Return a layer's name, its kind, and its blobs, after a check of its constants."""
    old = layer.messages(1)[0] if not modern and layer.regions(1) else None
    if old:
        name, kind, blobs = old.text(1), KINDS.get(old.text(2), ""), old.regions(50)
        convolution, pooling, lrn = (old, 7, 10), (old, 8, 10), (old, 13, 14, 15, 22)
    else:
        name, blobs = layer.text(1 if modern else 4), layer.regions(7 if modern else 6)
        kind = KINDS.get(layer.text(2) if modern else layer.number(5), "")
        fields = (106, 121, 118) if modern else (10, 19, 18)
        params = [next(iter(layer.messages(field)), None) for field in fields]
        convolution, pooling, lrn = (params[0], 3, 6), (params[1], 2, 3), (params[2], 1, 2, 3, 5)
    if kind == "conv" and convolution[0] and name == "conv1":
        message, pad, stride = convolution
        found = (message.numbers(stride) or [1])[0], (message.numbers(pad) or [0])[0]
        if found != STEM:
            raise WeightsError(f"not an AlexNet: conv1 has stride {found[0]} and padding {found[1]}; expected 4 and 0")
    if kind == "pool" and pooling[0]:
        message, window, stride = pooling
        if (message.number(window), message.number(stride, 1)) != POOL:
            raise WeightsError(f"not an AlexNet: {name!r} is not a 3×3 pooling of stride 2")
    if kind == "lrn" and lrn[0]:
        message, size, alpha, beta, k = lrn
        check_lrn(message.number(size, 5), message.float(alpha, 1.0), message.float(beta, 0.75), message.float(k, 1.0))
    return name, kind, blobs


def _blob(blob: Message) -> Stored:
    """Return the array of a BlobProto, in float32 or float64."""
    legacy = any(field in blob.fields for field in (1, 2, 3, 4))
    shape = [blob.number(field) for field in (1, 2, 3, 4)] if legacy else _shape(blob)
    field, dtype = (8, "<f8") if blob.regions(8) else (5, "<f4")
    return blob.array(field, np.dtype(dtype), tuple(shape))


def _shape(blob: Message) -> list[int]:
    shapes = blob.messages(7)
    return shapes[-1].numbers(1) if shapes else []


def read_mean(file: Region) -> np.ndarray:
    """Return the mean image of a .binaryproto in RGB, [H, W, 3]; raises WeightsError for another file."""
    mean = _blob(read_message(file))
    if len(mean.shape) == 4 and mean.shape[0] == 1:
        mean = mean.reshaped(*mean.shape[1:])
    if len(mean.shape) != 3 or mean.shape[0] != 3:
        raise WeightsError(f"a mean image of {'×'.join(map(str, mean.shape))}; expected 3×256×256")
    return mean.read().transpose(1, 2, 0)[:, :, ::-1]
