"""Toronto's `bvlc_alexnet.npy`: a pickled dict `{"conv1": [kernel, bias], …}` of Caffe's weights, HWIO."""

from collections.abc import Callable
from typing import Any

import numpy as np

from alexnet_jax.variants import LAYERS
from alexnet_jax.weights.caffe_network import caffe_weights
from alexnet_jax.weights.description import Source, Weights, WeightsError
from alexnet_jax.weights.layouts import bgr_to_rgb, check_names, params_of
from alexnet_jax.weights.pickles import as_region, as_text, read_pickle
from alexnet_jax.weights.stored import Region, Stored, stored

DTYPES = ("f2", "f4", "f8", "O8")


class PickledDtype:
    """NumPy's dtype of a pickle."""

    def __init__(self, name: Any, *_: Any):
        self.name, self.order = as_text(name), "="
        if self.name not in DTYPES:
            raise WeightsError(f"it has an array of another type than {', '.join(DTYPES[:3])}")

    def set_state(self, state: tuple) -> None:
        self.order = "<" if as_text(state[1]) != ">" else ">"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.name)


class PickledArray:
    """NumPy's array of a pickle: `content` is bytes, a region, or a list of objects."""

    def __init__(self, *_: Any):
        self.shape, self.dtype, self.fortran, self.content = (), PickledDtype("f4"), False, b""

    def set_state(self, state: tuple) -> None:
        self.shape, self.dtype, self.fortran, self.content = state[-4:]

    def stored(self) -> Stored:
        """Return the array."""
        shape = self.shape[::-1] if self.fortran else self.shape
        return stored(as_region(self.content), self.dtype.dtype, shape, bool(self.fortran) and len(shape) > 1)


def read_arrays(region: Region) -> Any:
    """Return the object of a pickle whose only unusual objects are NumPy's arrays, as `PickledArray`."""
    return read_pickle(region, _names(region.size))[0]


def _names(limit: int) -> dict[str, Callable]:
    encoded = 0

    def encode(text: Any, encoding: str) -> Any:  # how Python 3 writes bytes in protocol 2
        nonlocal encoded
        region = as_region(text.encode() if isinstance(text, str) else text)
        encoded += region.size
        if encoded > limit or encoding != "latin1":
            raise WeightsError("its pickle encodes more bytes than the file has, or not in latin1: it is corrupt")
        return region.bytes(0, region.size).decode().encode("latin1")

    def from_buffer(content: Any, dtype: PickledDtype, shape: tuple, order: str) -> PickledArray:
        array = PickledArray()
        array.set_state((shape, dtype, order == "F", content))
        return array

    names: dict[str, Callable] = {"numpy.ndarray": PickledArray, "numpy.dtype": PickledDtype, "_codecs.encode": encode}
    for core in ("numpy.core", "numpy._core"):
        names |= {f"{core}.multiarray._reconstruct": PickledArray, f"{core}.numeric._frombuffer": from_buffer}
    return names


def read_toronto(file: Region, source: Source, mean: np.ndarray | None = None) -> Weights:
    """Return the network of a .npy file with a pickled dict, or of the pickle alone.

    Args:
      source: its name and SHA-256.
      mean: as in `caffe_weights`.

    Raises:
      WeightsError: another file.
      Exception: of several types, for a corrupt pickle.
    """
    start = 0
    if file.bytes(0, 6) == b"\x93NUMPY":
        wide = file.bytes(6, 1) != b"\1"  # the header's length has four bytes since version 2
        start = (12 if wide else 10) + int.from_bytes(file.bytes(8, 4 if wide else 2), "little")
        if b"'|O" not in file.bytes(0, min(start, 1024)):
            raise WeightsError("a .npy file of one array; expected Toronto's bvlc_alexnet.npy, a pickled dict")
    layers = read_arrays(file.part(start, file.size - start))
    if isinstance(layers, PickledArray) and isinstance(layers.content, list) and len(layers.content) == 1:
        layers = layers.content[0]
    if not isinstance(layers, dict):
        raise WeightsError("its pickle is no dict of layers; expected Toronto's bvlc_alexnet.npy")
    check_names(map(str, layers), LAYERS)
    arrays: dict[str, Stored] = {}
    for layer in LAYERS:
        pair = list(layers[layer])
        if len(pair) != 2 or not all(isinstance(x, PickledArray) for x in pair):
            raise WeightsError(f"{layer} is not a pair of arrays, kernel and bias")
        arrays |= {f"{layer}.kernel": pair[0].stored(), f"{layer}.bias": pair[1].stored()}
    return caffe_weights(bgr_to_rgb(params_of(arrays, "HWIO", file.size)), source._replace(format="Toronto"), mean)
