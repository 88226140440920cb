"""From stored uint8 images to what the network sees: the mean, augmentation in training, patches in testing."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import augment
from alexnet_jax.variants import VARIANTS


class Preprocess(NamedTuple):
    """How images reach the network: from uint8 [B, H, W, C] to float32, (pixel − mean) × scale.

    Attributes:
      mean: the training set's mean image [H, W, C] (section 2).
      pad: rows and columns of mean colour added on every side before cropping.
      crop: the side of the square patch that is cut out.
      resize: the side to which a patch is enlarged (bilinear); 0 leaves it as it is.
      flip: whether training mirrors images at random.
      lighting: what multiplies α [3], for pixels in 0 to 255, and eigenvectors [3, 3]; or None.
      scale: what the centred pixels are multiplied by at the end; 1 is the paper's 0 to 255.
      variant: a name in `VARIANTS`.
      random_crop: whether training sees a random patch, or the central one.
    """

    mean: np.ndarray
    pad: int
    crop: int
    resize: int
    flip: bool
    lighting: tuple[np.ndarray, np.ndarray] | None
    scale: float
    variant: str = "paper"
    random_crop: bool = True

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of what the network sees."""
        side = self.resize or self.crop
        return side, side, self.mean.shape[-1]

    def train(self, key: jax.Array, images: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        """A random patch, its mirror image, its lighting (section 4.1): [B, *image_shape].

        Args:
          first: the place of the first image in the whole batch.
        """
        variant = VARIANTS[self.variant]
        chunks = (variant.chunk, variant.chunk, 1)
        keys = zip(jax.random.split(key, 3), chunks, strict=True)
        crop_key, flip_key, lighting_key = (augment.example_keys(k, images.shape[0], first, c) for k, c in keys)
        x = self._centred(images)
        if self.random_crop:
            x = augment.random_crop(crop_key, x, self.crop, variant.last_place)
        else:
            x = augment.center_crop(x, self.crop)
        if self.flip:
            x = augment.random_flip(flip_key, x)
        if self.lighting is not None:
            x = augment.pca_lighting(lighting_key, x, *self.lighting) / variant.lighting_divisor
        return self._finish(x)

    def center(self, images: jax.Array) -> jax.Array:
        """The central patch: [B, *image_shape]."""
        return self._finish(augment.center_crop(self._centred(images), self.crop))

    def ten(self, images: jax.Array) -> jax.Array:
        """The ten test patches of section 4.1: [B, 10, *image_shape]."""
        patches = augment.ten_crop(self._centred(images), self.crop)
        return self._finish(patches.reshape(-1, *patches.shape[2:])).reshape(*patches.shape[:2], *self.image_shape)

    def _centred(self, images):
        margin = ((0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0))
        return jnp.pad(images.astype(jnp.float32) - self.mean, margin)

    def _finish(self, x):
        if self.resize:
            x = jax.image.resize(x, (x.shape[0], *self.image_shape), "bilinear")
        return x * self.scale


class Statistics(NamedTuple):
    """Of a training set, in float64 and for pixels in 0 to 255."""

    mean_image: np.ndarray  # [H, W, C] (section 2)
    eigenvalues: np.ndarray | None  # [3], largest first, of the covariance of RGB (section 4.1); None: not asked for
    eigenvectors: np.ndarray | None  # [3, 3], a column each


def measure(images: Iterable[np.ndarray], colours: bool) -> Statistics:
    """The statistics of images that come as arrays uint8 [some, H, W, C], read once.

    Args:
      colours: whether to compute the covariance of RGB.

    Raises:
      ValueError: `colours` of images without three channels.
    """
    images, count, total = iter(images), 0, 0

    def summed():
        nonlocal count, total
        for some in images:
            count, total = count + len(some), total + some.sum(axis=0, dtype=np.int64)
            yield some

    principal = augment.rgb_pca(summed()) if colours else (None, None)
    for _ in summed():  # what is left
        pass
    return Statistics(total / count, *principal)


def read_statistics(path: Path) -> Statistics:
    """Those that `prepare` computed and stored; raises OSError, ValueError or KeyError if they cannot be read."""
    with np.load(path) as found:
        return Statistics(*(found[name] for name in Statistics._fields))


def fit(
    images: np.ndarray | Iterable[np.ndarray] | Statistics,
    pad: int,
    crop: int,
    resize: int,
    flip: bool,
    lighting: bool,
    scale: float = 1.0,
    variant: str = "paper",
    random_crop: bool = True,
) -> Preprocess:
    """The preprocessing of a training set: its mean image and, for `lighting`, the covariance of its colours.

    Args:
      images: the training set, uint8 [N, H, W, C], or arrays of it, read once, or its statistics.
      pad, crop, resize, flip, scale, variant, random_crop: as in `Preprocess`.
      lighting: whether to vary the colours.

    Raises:
      ValueError: lighting of images without three channels.
    """
    if isinstance(images, np.ndarray):
        statistics = measure(np.array_split(images, -(-len(images) // 10_000)), lighting)
    else:
        statistics = images if isinstance(images, Statistics) else measure(images, lighting)
    mean, eigenvalues, eigenvectors = statistics
    principal = None
    if lighting:
        spread = 255 * (eigenvalues / 255**2) ** VARIANTS[variant].lighting_power  # λ is of pixels in 0 to 1
        principal = spread.astype(np.float32), eigenvectors.astype(np.float32)
    mean = mean.astype(np.float32)
    return Preprocess(mean, pad, crop, resize, flip, principal, scale, variant, random_crop)
