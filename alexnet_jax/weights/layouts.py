"""Every format's arrays as this project's parameters: kernels HWIO, fc6's rows in (H, W, C) order, images in RGB."""

import math
from collections.abc import Iterable

import numpy as np

from alexnet_jax.variants import LAYERS
from alexnet_jax.weights.description import Params, WeightsError
from alexnet_jax.weights.stored import Stored

NAMES = tuple(f"{layer}.{name}" for layer in LAYERS for name in ("kernel", "bias"))
SMALL = 1 << 20  # bytes; MATLAB stores a bias of whole numbers as integers
BLOCK = 64  # output channels at a time: a block of fc6's kernel, of 2 MB, stays in the cache while it is transposed
OIHW_TO_HWIO = (2, 3, 1, 0)
# Caffe's mean of ImageNet, in RGB; its networks take BGR.
CAFFE_MEAN = (122.67891, 116.66877, 104.00699)


def check_names(found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise WeightsError unless the names are those expected."""
    found, expected = set(found), list(expected)
    if missing := [name for name in expected if name not in found]:
        raise WeightsError(f"not an AlexNet: {missing[0]} is missing; expected {', '.join(expected)}")
    if extra := sorted(found.difference(expected)):
        raise WeightsError(f"not an AlexNet: it has {extra[0][:80]!r}; expected {', '.join(expected)} alone")


def params_of(arrays: dict[str, Stored], axes: str, size: int) -> Params:
    """Return a network's parameters, float32, from arrays of another layout.

    Args:
      arrays: `{"conv1.kernel": …}`; emptied, so that each can be freed when it is converted.
      axes: "OIHW", with fully connected kernels [out, in] and fc6's inputs in (C, H, W) order; or "HWIO", with fully
        connected kernels [in, out] in (H, W, C) order, or [H, W, in, out].
      size: the bytes of the file, of which the arrays can have no more.

    Raises:
      WeightsError: other arrays than an AlexNet's, or other numbers of axes.
    """
    check_names(arrays, NAMES)
    if sum(x.region.size for x in arrays.values()) > size:
        raise WeightsError("its arrays overlap: it is corrupt")
    for name, x in arrays.items():
        if x.dtype.kind in "biu" and x.region.size > SMALL:  # as floats they would take four times as much
            raise WeightsError(f"{name} is of type {x.dtype}; expected floats")
        expected = 1 if name.endswith("bias") else 4 if name.startswith("conv") else 2
        if len(x.shape) != expected and not (axes == "HWIO" and name.startswith("fc")):
            raise WeightsError(f"{name} is {'×'.join(map(str, x.shape))}; expected {expected} axes")
    channels = arrays["conv5.bias"].shape[0]
    params: Params = {}
    for name in NAMES:
        layer, kind = name.split(".")
        x = arrays.pop(name)
        y: np.ndarray
        if kind == "bias":
            y = x.read().astype(np.float32, copy=False).reshape(-1)
        elif axes == "HWIO":
            y = _permuted(x, tuple(range(len(x.shape)))[::-1]) if x.fortran else x.read().astype(np.float32, copy=False)
        else:
            if layer == "fc6":
                side = math.isqrt(x.shape[1] // max(1, channels))
                x = x.reshaped(x.shape[0], channels, side, side)
            y = _permuted(x, OIHW_TO_HWIO if len(x.shape) == 4 else (1, 0))
        if kind == "kernel" and layer.startswith("fc"):
            y = y.reshape(-1, y.shape[-1])
        params.setdefault(layer, {})[kind] = y
    return params


def _permuted(x: Stored, axes: tuple[int, ...]) -> np.ndarray:
    """Return an array with its axes permuted, the first one to the last place."""
    y = np.empty([x.shape[axis] for axis in axes], np.float32)
    for start in range(0, x.shape[0], BLOCK):
        y[..., start : start + BLOCK] = x.read(start, start + BLOCK).transpose(axes)
    return y


def bgr_to_rgb(params: Params) -> Params:
    """Return the parameters of a network that took BGR images for one that takes RGB."""
    conv1 = params["conv1"]
    return params | {"conv1": conv1 | {"kernel": np.ascontiguousarray(conv1["kernel"][:, :, ::-1])}}


def widths(params: Params) -> tuple[int, ...]:
    """Return the widths of conv1 … fc7."""
    return tuple(params[layer]["bias"].size for layer in LAYERS[:7])


def constant_mean(color: tuple[float, ...], side: int = 256) -> np.ndarray:
    """Return a mean image [side, side, C] of one color."""
    return np.full((side, side, len(color)), color, np.float32)
