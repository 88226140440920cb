"""MatConvNet's `imagenet-caffe-alex.mat`: Caffe's weights with HWIO kernels that take RGB, and class names."""

from typing import Any

import numpy as np

from alexnet_jax.variants import LAYERS
from alexnet_jax.weights.caffe_network import POOL, STEM, caffe_weights, check_lrn, check_order
from alexnet_jax.weights.description import Source, Weights, WeightsError
from alexnet_jax.weights.layouts import check_names, constant_mean, params_of
from alexnet_jax.weights.mat_file import decompressed_limit, read_mat
from alexnet_jax.weights.stored import Region, Stored

SIDE, MAX_SIDE = 256, 1024
KINDS = {"conv": "conv", "normalize": "lrn", "lrn": "lrn", "pool": "pool"}


def read_matconvnet(file: Region, source: Source) -> Weights:
    """Return the network of a MAT-file; `source` is its name and SHA-256.

    Raises:
      WeightsError: another network, or another file.
      Exception: of several types, for a corrupt file.
    """
    variables = read_mat(file)
    layers = variables.pop("layers", None)
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise WeightsError("a MAT-file without the cell array `layers` of MatConvNet")
    kinds: list[str] = []
    arrays: dict[str, Stored] = {}
    for layer in layers:
        name, kind = str(layer.get("name")), KINDS.get(str(layer.get("type")), "")
        if kind == "conv" and name.startswith("fc"):
            kind = "dense"
        kinds += [kind] if kind else []
        _check_constants(name, kind, layer)
        if kind in ("conv", "dense"):
            pair = layer.pop("weights", None) or [layer.pop("filters", None), layer.pop("biases", None)]
            if len(pair) != 2 or not all(isinstance(x, Stored) for x in pair):
                raise WeightsError(f"{name} is not a pair of arrays, kernel and bias")
            kernel, bias = pair
            arrays[f"{name}.kernel"] = kernel
            arrays[f"{name}.bias"] = bias.reshaped(bias.region.size // bias.dtype.itemsize)
            del pair[:], kernel, bias  # `arrays` alone holds them, until they are converted
    check_order(kinds)
    check_names({name.split(".")[0] for name in arrays}, LAYERS)
    params = params_of(arrays, "HWIO", decompressed_limit(file))
    meta = variables.get("meta") if isinstance(variables.get("meta"), dict) else variables
    mean, names = _mean(meta.get("normalization")), _class_names(meta.get("classes"))
    return caffe_weights(params, source._replace(format="MatConvNet"), mean, names)


def _numbers(value: Any) -> list[float]:
    """Return the elements of a small array."""
    if not isinstance(value, Stored) or value.region.size > 1000:
        return []
    return [float(x) for x in value.read().reshape(-1)]


def _check_constants(name: str, kind: str, layer: dict[str, Any]) -> None:
    numbers = {field: set(_numbers(layer.get(field))) for field in ("stride", "pad", "pool")}
    if name == "conv1" and (numbers["stride"] != {STEM[0]} or numbers["pad"] - {STEM[1]}):
        raise WeightsError("not an AlexNet: conv1 has another stride or padding; expected 4 and 0")
    if kind == "pool" and (numbers["pool"], numbers["stride"]) != tuple({n} for n in POOL):
        raise WeightsError(f"not an AlexNet: {name!r} is not a 3×3 pooling of stride 2")
    if kind == "lrn":
        size, k, alpha, beta = _numbers(layer.get("param"))
        check_lrn(size, alpha * size, beta, k)


def _mean(normalization: Any) -> np.ndarray | None:
    """Return the mean image [256, 256, 3]: MatConvNet keeps the part that the crop sees, or a color."""
    if not isinstance(normalization, dict):
        raise WeightsError("it has no `normalization`: it is truncated, or not MatConvNet's")
    average = normalization.get("averageImage")
    if not isinstance(average, Stored):
        return None
    if len(color := _numbers(average)) == 3:
        return constant_mean(tuple(color))
    if len(average.shape) < 3:  # [0 0] if there is none
        return None
    if max(average.shape) > MAX_SIDE:
        raise WeightsError(f"its average image is {'×'.join(map(str, average.shape[::-1]))}; expected 227×227×3")
    image = average.read().T  # from Fortran order
    height, width = (max(0, SIDE - side) for side in image.shape[:2])
    border = [(n // 2, n - n // 2) for n in (height, width)]
    return np.pad(image.astype(np.float32), (*border, (0, 0)), mode="edge")


def _class_names(classes: Any) -> tuple[str, ...] | None:
    """Return the classes' descriptions, or else their names."""
    names = classes.get("description") or classes.get("name") if isinstance(classes, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None
