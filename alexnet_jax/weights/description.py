"""A network with its parameters, and what its images go through: what every file of weights becomes."""

import struct
import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.data.images import RESIZINGS
from alexnet_jax.errors import UserError
from alexnet_jax.model import AlexNet
from alexnet_jax.ops import PLAIN
from alexnet_jax.preprocess import Preprocess

Params = dict[str, dict[str, np.ndarray]]


# What reading a corrupt file raises, apart from WeightsError.
CORRUPT = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError,
           StopIteration, struct.error, zlib.error)  # fmt: skip


class WeightsError(UserError):
    """A file of weights that cannot be read: corrupt, of an unknown format, or not an AlexNet's."""


class Source(NamedTuple):
    """Where weights came from.

    Attributes:
      format, file, sha256: the format, the file's name, and its SHA-256 in hex ("" for a run).
      init, init_sha256: what a run was started from, and its SHA-256; "" for random kernels.
    """

    format: str = ""
    file: str = ""
    sha256: str = ""
    init: str = ""
    init_sha256: str = ""


@dataclass(frozen=True)
class Weights:
    """A network, its parameters and the preparation of its images.

    Attributes:
      model: the network, without mesh axes and operations.
      params: float32 arrays, `{layer: {"kernel", "bias"}}`, as `model.init` has them.
      preprocess: from uint8 [B, H, W, C] to the network's inputs; its mean gives H, W and C.
      resizing: how an image file becomes uint8 [H, W, C]; a name in `data.images.RESIZINGS`.
      ten_crop: whether predictions average ten crops.
      class_names: one for each class, or None if the file has none.
      dataset, test_split: the data set whose classes these are, as TFDS names it, and a split to test on; "" if the
        file does not say.
      source: where the parameters came from.

    Raises:
      WeightsError: parameters with other names or shapes than the network's, or that are not finite; another number
        of class names than of classes; a mean image smaller than the crop.
    """

    model: AlexNet
    params: Params
    preprocess: Preprocess
    resizing: str = "fit"
    ten_crop: bool = False
    class_names: tuple[str, ...] | None = None
    dataset: str = ""
    test_split: str = ""
    source: Source = field(default=Source())

    def __post_init__(self):
        height, width, _ = self.preprocess.mean.shape if self.preprocess.mean.ndim == 3 else (0, 0, 0)
        if min(height, width) + 2 * self.preprocess.pad < self.preprocess.crop:
            shape = "×".join(map(str, self.preprocess.mean.shape))
            raise WeightsError(
                f"a mean image of {shape}; expected [H, W, C] of at least {self.preprocess.crop}, the crop"
            )
        expected = parameter_shapes(self.model, self.preprocess.image_shape)
        shapes = {f"{layer}.{name}": x.shape for layer, arrays in self.params.items() for name, x in arrays.items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if name not in shapes:
                raise WeightsError(f"{name} is missing; expected {list(expected[name])}")
            if name not in expected:
                raise WeightsError(f"{name}: this network has no such array; expected {', '.join(expected)}")
            if shapes[name] != expected[name]:
                raise WeightsError(f"{name} is {list(shapes[name])}; expected {list(expected[name])}")
        arrays = {f"{layer}.{name}": x for layer, arrays in self.params.items() for name, x in arrays.items()}
        for name, x in (arrays | {"the mean image": self.preprocess.mean}).items():
            if x.dtype != np.float32:
                raise WeightsError(f"{name} is {x.dtype}; expected float32")
            if not np.isfinite(x).all():
                raise WeightsError(f"{name} holds values that are not finite; the file cannot be used")
        if self.class_names is not None and len(self.class_names) != self.model.num_classes:
            raise WeightsError(f"{len(self.class_names)} class names; expected {self.model.num_classes}, one a class")
        if self.resizing not in RESIZINGS:
            raise WeightsError(f"resizing={self.resizing!r}: expected one of {', '.join(RESIZINGS)}")


@lru_cache(maxsize=16)
def parameter_shapes(model: AlexNet, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of a network's parameters, `{"conv1.kernel": …}`, for images [H, W, C].

    Raises:
      WeightsError: the network cannot take such images, or its fields have values that it does not take.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        key = jax.eval_shape(partial(jax.random.key, 0))  # abstract, and XLA's own operations: no device is started
        params = jax.eval_shape(model.clone(ops=PLAIN).init, key, image)["params"]
    except ValueError as error:
        raise WeightsError(f"not a network of this program: {error}") from None
    return {f"{layer}.{name}": x.shape for layer, arrays in params.items() for name, x in arrays.items()}
