"""From stored uint8 images to the network's inputs: mean subtraction, augmentation in training, crops in testing."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from alexnet_jax import augment

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Preprocess:
    """The preprocessing of images: from uint8 [B, H, W, C] to float32, (pixel − mean) × scale.

    A pytree whose leaves are `mean` and `lighting`; all other fields are static.

    Attributes:
      mean: the training set's mean image [H, W, C] (section 2).
      pad: rows and columns of mean color added on every side before cropping.
      crop: the side of the square crop.
      resize: the side to which a crop is enlarged (bilinear); 0 leaves it as it is.
      flip: whether training flips images horizontally at random.
      lighting: for PCA lighting, the factors of α [3], for pixels in 0 to 255, and eigenvectors [3, 3]; or None.
      scale: the factor of the centered pixels; 1 is the paper's 0 to 255.
      random_crop: whether training takes a random crop, or the center crop.
      crop_group: how many consecutive images of a batch share the position of their crop and their flip.
      crop_last_position: whether a random crop may end at the last row and column, as in `augment.random_crop`.
      lighting_divisor: by which all pixels are divided after PCA lighting.
    """

    mean: Array
    pad: int = flax.struct.field(pytree_node=False)
    crop: int = flax.struct.field(pytree_node=False)
    resize: int = flax.struct.field(pytree_node=False)
    flip: bool = flax.struct.field(pytree_node=False)
    lighting: tuple[Array, Array] | None
    scale: float = flax.struct.field(pytree_node=False)
    random_crop: bool = flax.struct.field(pytree_node=False, default=True)
    crop_group: int = flax.struct.field(pytree_node=False, default=1)
    crop_last_position: bool = flax.struct.field(pytree_node=False, default=False)
    lighting_divisor: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The [H, W, C] of the network's inputs."""
        side = self.resize or self.crop
        return side, side, self.mean.shape[-1]

    def train(
        self, key: jax.Array, images: jax.Array, first: jax.Array | int = 0, dtype: DTypeLike | None = None
    ) -> jax.Array:
        """Return images with random crops, flips and PCA lighting (section 4.1): [B, *image_shape].

        Args:
          first: the index of the first image in the whole batch.
          dtype: that the network computes in, as in `augment.random_crop`.
        """
        groups = (self.crop_group, self.crop_group, 1)
        keys = zip(jax.random.split(key, 3), groups, strict=True)
        crop_key, flip_key, lighting_key = (augment.example_keys(k, images.shape[0], first, n) for k, n in keys)
        x = self._center_pixels(images)
        if self.random_crop:
            flips = flip_key if self.flip else None
            x = augment.random_crop(crop_key, x, self.crop, self.crop_last_position, flips, dtype)
        else:
            x = augment.center_crop(x, self.crop)
            x = augment.random_flip(flip_key, x) if self.flip else x
        if self.lighting is not None:
            x = augment.pca_lighting(lighting_key, x, *self.lighting) / self.lighting_divisor
        return self._resize_and_scale(x)

    def center_crop(self, images: jax.Array) -> jax.Array:
        """Return the center crops: [B, *image_shape]."""
        return self._resize_and_scale(augment.center_crop(self._center_pixels(images), self.crop))

    @property
    def crops(self) -> int:
        """The crops of `ten_crop`: 10, or 5 without flips."""
        return 10 if self.flip else 5

    def ten_crop(self, images: jax.Array) -> jax.Array:
        """Return the ten-crops of section 4.1: [B, crops, *image_shape], without flips if training has none."""
        crops = augment.ten_crop(self._center_pixels(images), self.crop)[:, : self.crops]
        x = self._resize_and_scale(crops.reshape(-1, *crops.shape[2:]))
        return x.reshape(*crops.shape[:2], *self.image_shape)

    def _center_pixels(self, images):
        margin = ((0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0))
        return jnp.pad(images.astype(jnp.float32) - self.mean, margin)

    def _resize_and_scale(self, x):
        if self.resize:
            x = jax.image.resize(x, (x.shape[0], *self.image_shape), "bilinear")
        return x * self.scale


class Statistics(NamedTuple):
    """The statistics of a training set, in float64 and for pixels in 0 to 255."""

    mean_image: np.ndarray  # [H, W, C] (section 2)
    eigenvalues: np.ndarray | None  # [3], largest first, of the RGB covariance (section 4.1); None: not computed
    eigenvectors: np.ndarray | None  # [3, 3], a column each


def measure(
    images: Iterable[np.ndarray], colors: bool, total_of: Callable[[tuple], tuple] = lambda sums: sums
) -> Statistics:
    """Return the statistics of images, an iterable of arrays uint8 [N, H, W, C] that is read once.

    The sums are exact, so that the order of the images changes nothing.

    Args:
      colors: whether to compute the RGB covariance.
      total_of: adds the sums of other images to those of these; `distributed.total`, if each process has some.

    Raises:
      ValueError: `colors` of images without three channels.
    """
    images, count = iter(images), 0
    total: Any = 0

    def summed():
        nonlocal count, total
        for array in images:
            count, total = count + len(array), total + array.sum(axis=0, dtype=np.int64)
            yield array

    color: Sequence[Any] = augment.color_sums(summed()) if colors else ()
    for _ in summed():  # reads the images if no covariance was computed
        pass
    count, total, *color = total_of((count, total, *color))
    principal = augment.principal_components(*color)[1:] if colors else (None, None)
    return Statistics(total / count, *principal)


def read_statistics(path: Path) -> Statistics:
    """Return the statistics that `prepare` stored; raises OSError, ValueError or KeyError if they cannot be read."""
    with np.load(path) as arrays:
        return Statistics(*(arrays[name] for name in Statistics._fields))


def fit(
    images: np.ndarray | Iterable[np.ndarray] | Statistics,
    pad: int,
    crop: int,
    resize: int,
    flip: bool,
    lighting: bool,
    scale: float = 1.0,
    random_crop: bool = True,
    crop_group: int = 1,
    crop_last_position: bool = False,
    lighting_exponent: float = 1.0,
    lighting_divisor: float = 1.0,
) -> Preprocess:
    """Return the preprocessing of a training set: its mean image and, for `lighting`, its RGB covariance.

    Args:
      images: the training set, uint8 [N, H, W, C], or arrays of it, read once, or its statistics.
      lighting: whether training applies PCA lighting.
      lighting_exponent: PCA lighting adds α times λ to this power, of pixels in [0, 1]; 1 is the paper's formula, and
        one half gives the standard deviation.
      pad, crop, resize, flip, scale, random_crop, crop_group, crop_last_position, lighting_divisor: as in
        `Preprocess`.

    Raises:
      ValueError: lighting of images without three channels.
    """
    if isinstance(images, np.ndarray):
        statistics = measure(np.array_split(images, -(-len(images) // 10_000)), lighting)
    else:
        statistics = images if isinstance(images, Statistics) else measure(images, lighting)
    mean, eigenvalues, eigenvectors = statistics
    factors_and_directions = None
    if lighting:
        eigenvalues = np.maximum(eigenvalues, 0)  # stored ones may be negative by rounding
        factors = 255 * (eigenvalues / 255**2) ** lighting_exponent
        factors_and_directions = factors.astype(np.float32), eigenvectors.astype(np.float32)
    return Preprocess(
        mean=mean.astype(np.float32),
        pad=pad,
        crop=crop,
        resize=resize,
        flip=flip,
        lighting=factors_and_directions,
        scale=scale,
        random_crop=random_crop,
        crop_group=crop_group,
        crop_last_position=crop_last_position,
        lighting_divisor=lighting_divisor,
    )
