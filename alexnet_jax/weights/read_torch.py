"""torchvision's `alexnet`: torch's .pth, zip or legacy, and .safetensors with torch's keys."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alexnet_jax.model import AlexNet, Stem
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.variants import IMAGENET_MEAN
from alexnet_jax.weights.description import Source, Weights, WeightsError
from alexnet_jax.weights.layouts import NAMES, check_names, constant_mean, params_of, widths
from alexnet_jax.weights.pickles import as_text, read_pickle
from alexnet_jax.weights.stored import Region, Stored, stored
from alexnet_jax.weights.zip_file import read_zip

MODULES = ("features.0", "features.3", "features.6", "features.8", "features.10") + tuple(
    f"classifier.{i}" for i in (1, 4, 6)
)
KEYS = tuple(f"{module}.{name}" for module in MODULES for name in ("weight", "bias"))
DEVIATION = (58.395, 57.12, 57.375)  # of 0 to 255, in RGB
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
FLOATS = {"Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": jnp.bfloat16}
OTHERS = {"Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
STORAGES = {
    f"torch.{place}{name}Storage": np.dtype(dtype)
    for place in ("", "cuda.") for name, dtype in (FLOATS | OTHERS).items()
}  # fmt: skip


@dataclass
class Storage:
    """The elements that tensors are views of; `region` is None until it is known where in the file they are."""

    dtype: np.dtype
    count: int
    region: Region | None = None


class View(NamedTuple):
    """What a persistent id names: `size` elements of a storage from `start`."""

    storage: Storage
    start: int
    size: int


class Tensor(NamedTuple):
    """A tensor; offset and stride are in elements."""

    view: View
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def stored(self) -> Stored:
        """Return the array; raises WeightsError for one that is not contiguous or that exceeds its storage."""
        contiguous = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        if any(n != 1 and s != c for n, s, c in zip(self.shape, self.stride, contiguous, strict=True)):
            raise WeightsError("a tensor is not contiguous; save it with .contiguous()")
        storage, itemsize = self.view.storage, self.view.storage.dtype.itemsize
        region = storage.region.part(self.view.start * itemsize, self.view.size * itemsize)
        region = region.part(self.offset * itemsize, math.prod(self.shape) * itemsize)
        return stored(region, storage.dtype, self.shape)


def read_torch_zip(file: Region, source: Source) -> Weights:
    """Return the network of a file of torch 1.6 or later; raises as `read_pickle` does."""
    return _network(_load_zip(file), file.size, source._replace(format="torch (zip)"))


def read_torch_legacy(file: Region, source: Source) -> Weights:
    """Return the network of a file of torch before 1.6; raises as `read_pickle` does."""
    return _network(_load_legacy(file), file.size, source._replace(format="torch (legacy)"))


def load_state_dict(file: Region) -> dict[str, Any]:
    """Return the state dict of a file of torch, by name; raises as `read_pickle` does."""
    if is_torch_legacy(file):
        return _load_legacy(file)
    if file.bytes(0, min(4, file.size)) != b"PK\3\4":
        raise WeightsError("not a file of torch.save, or a truncated one")
    return _load_zip(file)


def _load_zip(file: Region) -> dict[str, Any]:
    entries = read_zip(file)
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise WeightsError("a zip file without the data.pkl of torch.save; expected a .pth file")
    order = entries.get(f"{roots[0]}byteorder")
    if order is not None and order.bytes(0, min(6, order.size)) != b"little":
        raise WeightsError("it is big-endian; save it on a little-endian machine")
    storages: dict[str, Storage] = {}

    def persistent(value: Any) -> View:
        _, dtype, key, _, count = value
        region = entries.get(f"{roots[0]}data/{key}")
        if region is None or region.size != count * dtype.itemsize:
            raise WeightsError(f"its storage {str(key)[:80]} is missing, or has another size: it is corrupt")
        return View(storages.setdefault(key, Storage(dtype, count, region)), 0, count)

    value, _ = read_pickle(entries[f"{roots[0]}data.pkl"], NAMES_IN_PICKLES, persistent)
    return _state_dict(value)


def is_torch_legacy(file: Region) -> bool:
    """Return whether a file starts with the pickled magic number of torch's legacy format."""
    return LEGACY_MAGIC.to_bytes(10, "little") in file.bytes(0, min(20, file.size))


def _load_legacy(file: Region) -> dict[str, Any]:
    position, objects = 0, []
    storages: dict[str, Storage] = {}

    def persistent(value: Any) -> View:
        _, dtype, key, _, count, view = value
        _, start, size = (key, 0, count) if view is None else view
        return View(storages.setdefault(key, Storage(dtype, count)), start, size)

    for _ in range(5):  # the magic number, the protocol's version, the system, the object, the storages' keys
        value, size = read_pickle(file.part(position, file.size - position), NAMES_IN_PICKLES, persistent)
        objects.append(value)
        position += size
    if objects[0] != LEGACY_MAGIC or objects[1] != 1001 or objects[2]["little_endian"] is not True:
        raise WeightsError("not torch's legacy format 1001, little-endian")
    for key in objects[4]:
        (count,) = struct.unpack("<q", file.bytes(position, 8))
        storage = storages[key]
        if count != storage.count:
            raise WeightsError("a storage has another size than its tensors name: it is corrupt")
        storage.region = file.part(position + 8, count * storage.dtype.itemsize)
        position += 8 + storage.region.size
    if any(storage.region is None for storage in storages.values()):
        raise WeightsError("a storage is missing: it is truncated or corrupt")
    return _state_dict(objects[3])


def read_torch_safetensors(
    metadata: Mapping[str, str], arrays: Mapping[str, Stored], size: int, source: Source
) -> Weights:
    """Return the network of a .safetensors file with torch's keys.

    Args:
      metadata: may have `mean`, three numbers for pixels in 0 to 1, and `class_names`, each as JSON.
      arrays, size, source: as in `from_torch`.

    Raises:
      WeightsError: another network.
      Exception: of several types, for corrupt metadata.
    """
    mean = tuple(255 * float(x) for x in json.loads(metadata["mean"])) if "mean" in metadata else IMAGENET_MEAN
    names = tuple(map(str, json.loads(metadata["class_names"]))) if "class_names" in metadata else None
    return from_torch(arrays, size, source._replace(format="torch (safetensors)"), mean, names)


def _tensor(view: View, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return Tensor(view, offset, tuple(shape), tuple(stride))


NAMES_IN_PICKLES = STORAGES | {
    "collections.OrderedDict": lambda pairs=(): {as_text(key): value for key, value in pairs},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}


def _state_dict(value: Any) -> dict[str, Any]:
    """Return a state dict, or that in a dict's `state_dict`, by names without `module.`."""
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise WeightsError("it holds no dict; expected a state dict, as torch.save(model.state_dict(), …) writes it")
    return {str(key).replace("module.", ""): x for key, x in value.items()}


def arrays_of(state_dict: Mapping[str, Any]) -> dict[str, Stored]:
    """Return the arrays of a state dict; raises WeightsError if it has other values."""
    if not all(isinstance(x, Tensor) for x in state_dict.values()):
        raise WeightsError("its state dict has other values than tensors")
    return {key: x.stored() for key, x in state_dict.items()}


def check_floats(arrays: Mapping[str, Stored]) -> None:
    """Raise WeightsError unless all arrays have one of torch's types of floats."""
    if not all(x.dtype in [np.dtype(dtype) for dtype in FLOATS.values()] for x in arrays.values()):
        raise WeightsError(f"its tensors are not floats; expected {', '.join(FLOATS)}")


def _network(state_dict: Mapping[str, Any], size: int, source: Source) -> Weights:
    check_names(state_dict, KEYS)
    return from_torch(arrays_of(state_dict), size, source)


def from_torch(
    arrays: Mapping[str, Stored],
    size: int,
    source: Source,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    class_names: tuple[str, ...] | None = None,
) -> Weights:
    """Return torchvision's network from arrays with torch's keys, in a file of `size` bytes; raises WeightsError.

    The images' deviations go into conv1: with padding after normalization this changes nothing but the rounding.
    """
    check_names(arrays, KEYS)
    check_floats(arrays)
    params = params_of(dict(zip(NAMES, map(arrays.get, KEYS), strict=True)), "OIHW", size)
    kernel = params["conv1"]["kernel"]
    if kernel.shape[:3] != (11, 11, 3):
        raise WeightsError(f"conv1's kernel is {'×'.join(map(str, kernel.shape[:3]))}; expected 11×11×3")
    kernel[:] = kernel / np.array(DEVIATION)[:, None]
    return Weights(
        model=AlexNet(
            num_classes=params["fc8"]["bias"].size, variant="torchvision", towers=1, stem=Stem(11, 4, 2),
            widths=widths(params),
        ),
        params=params,
        preprocess=Preprocess(
            mean=constant_mean(mean), pad=0, crop=224, resize=0, flip=True, lighting=None, scale=1.0
        ),
        resizing="torchvision",
        class_names=class_names,
        source=source,
    )  # fmt: skip
