"""Data augmentation (section 4.1) and the ten-crop: pure, jittable functions of (key, images).

Images are [B, H, W, C]. Every random choice is drawn once per image. The key is one for the batch, folded with each
image's index, or one per image [B], as `example_keys` gives them; keys of `jax.random.key` and of `PRNGKey` draw
the same.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike


def example_keys(key: jax.Array, count: int, first: jax.Array | int = 0, group: int = 1) -> jax.Array:
    """Return a key for each of `count` images [count], the same for `group` consecutive ones.

    Args:
      first: the index of the first image in the whole batch.
    """
    return jax.vmap(partial(jax.random.fold_in, key))((first + jnp.arange(count)) // group)


def _each(key: jax.Array, images: jax.Array) -> jax.Array:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # from `jax.random.PRNGKey`
        key = jax.random.wrap_key_data(key)
    return key if key.ndim else example_keys(key, images.shape[0])


def _check_images(name: str, images: jax.Array) -> None:
    if images.ndim != 4:
        raise ValueError(f"{name}: images of shape {images.shape}: expected [B, H, W, C]")


def _check_size(name: str, images: jax.Array, size: int) -> None:
    _check_images(name, images)
    if not 0 < size <= min(images.shape[1:3]):
        raise ValueError(f"{name}: size={size} from images of shape {images.shape}: expected 1 ≤ size ≤ H, W")


def random_crop(
    key: jax.Array,
    images: jax.Array,
    size: int,
    last_position: bool = True,
    flip_key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Return a random size×size crop of each image (section 4.1), in the images' dtype: [B, size, size, C].

    Args:
      last_position: whether a crop may end at the last row and column. Of 224×224 in 256×256 that makes 33² positions;
        the paper counts 32².
      flip_key: of `random_flip`, which then follows; None: no crop is flipped.
      dtype: to which a TPU may round the pixels; None: the images' own.

    Raises:
      ValueError: images that are not 4-D, or smaller than the crop.
    """
    _check_size("random_crop", images, size)
    limits = jnp.maximum(jnp.array(images.shape[1:3]) - size + last_position, 1)
    corners = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, limits))(_each(key, images))
    flip = None if flip_key is None else _flips(flip_key, images)
    by_products = partial(_crop_by_products, size=size, dtype=dtype or images.dtype)
    by_slices = partial(_crop_by_slices, size=size)
    return lax.platform_dependent(corners, flip, images, tpu=by_products, default=by_slices)


def _crop_by_slices(corners, flip, images, size):
    def crop(corner, image):
        return lax.dynamic_slice(image, (*corner, 0), (size, size, image.shape[-1]))

    crops = jax.vmap(crop)(corners, images)
    return crops if flip is None else _flipped(flip, crops)


def _crop_by_products(corners, flip, images, size, dtype):
    # A TPU takes slices at places of their own in a loop, one image after the other; products with ones and zeros
    # select the rows and columns of all images. A sum with one term that is not zero is exact.
    def selection(first, length, backward=None):
        place = jnp.arange(size)[:, None]
        place = place if backward is None else jnp.where(backward[:, None, None], size - 1 - place, place)
        return (jnp.arange(length) == first[:, None, None] + place).astype(dtype)

    precision = None if dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=dtype)
    top, left = corners.T
    rows = dot("bih,bhwc->biwc", selection(top, images.shape[1]), images.astype(dtype))
    return dot("bjw,biwc->bijc", selection(left, images.shape[2], flip), rows).astype(images.dtype)


def _flips(key, images):
    return jax.vmap(jax.random.bernoulli)(_each(key, images))


def _flipped(flip, images):
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Return each image, flipped horizontally with probability one half (section 4.1), in the same shape and dtype.

    Raises:
      ValueError: images that are not 4-D.
    """
    _check_images("random_flip", images)
    return _flipped(_flips(key, images), images)


def pca_lighting(
    key: jax.Array,
    images: jax.Array,
    eigenvalues: jax.Array | np.ndarray,
    eigenvectors: jax.Array | np.ndarray,
    stddev: float = 0.1,
) -> jax.Array:
    """Return the images with PCA lighting (section 4.1).

    It adds [p1 p2 p3][α1 λ1, α2 λ2, α3 λ3]ᵀ to every pixel of an image, with αi ~ N(0, stddev²).

    Args:
      images: float [B, H, W, 3].
      eigenvalues, eigenvectors: λ [3] and p [3, 3], a column each, as `rgb_pca` gives them. The formula adds λ, the
        square of a pixel's scale, to a pixel; the usual reading (λ = 0.2175, 0.0188, 0.0045 on ImageNet) has pixels
        in [0, 1]. For images in 0 to 255 with λ computed from such images, pass λ / 255.

    Raises:
      ValueError: images that are not 4-D, of integers, which would truncate the shift, or without three channels.
    """
    _check_images("pca_lighting", images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"pca_lighting: images of {images.dtype}: expected floats; integers would truncate the shift")
    if images.shape[-1] != 3:
        raise ValueError(f"pca_lighting: {images.shape[-1]} channel(s): expected 3; gray images have no color to vary")
    alpha = stddev * jax.vmap(lambda k: jax.random.normal(k, (3,)))(_each(key, images))
    shift = (alpha * eigenvalues) @ eigenvectors.T
    return images + shift[:, None, None, :].astype(images.dtype)


def ten_crop(images: jax.Array, size: int) -> jax.Array:
    """Return the paper's ten crops for testing (section 4.1): four corners and the center, then their horizontal flips.

    Returns:
      [B, 10, size, size, C].

    Raises:
      ValueError: images that are not 4-D, or smaller than the crop.
    """
    _check_size("ten_crop", images, size)
    bottom, right = images.shape[1] - size, images.shape[2] - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    crops = jnp.stack([images[:, top : top + size, left : left + size] for top, left in corners], axis=1)
    return jnp.concatenate([crops, crops[:, :, :, ::-1]], axis=1)


def center_crop(images: jax.Array, size: int) -> jax.Array:
    """Return the center size×size crop, the fifth of the ten in section 4.1: [B, size, size, C].

    Raises:
      ValueError: images that are not 4-D, or smaller than the crop.
    """
    _check_size("center_crop", images, size)
    top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
    return images[:, top : top + size, left : left + size]


def rgb_pca(images: np.ndarray | Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues and eigenvectors of the RGB covariance over all pixels of a data set (section 4.1).

    Args:
      images: one array [N, H, W, 3] or an iterable of arrays [..., 3], read once; integer or float.

    Returns:
      Eigenvalues [3], largest first, and eigenvectors [3, 3], a column each, in float64. The eigenvalues are in the
      pixels' scale squared.

    Raises:
      ValueError: an array without three channels, or fewer than two pixels in all.
    """
    count, total, products = 0, np.zeros(3), np.zeros((3, 3))
    for array in [images] if isinstance(images, np.ndarray | jax.Array) else images:
        array = np.asarray(array)
        if array.shape[-1:] != (3,):
            raise ValueError(f"rgb_pca: shape {array.shape}: expected [..., 3]")
        pixels = array.reshape(-1, 3)
        for start in range(0, len(pixels), 1 << 20):  # 24 MB of float64 at a time
            block = pixels[start : start + (1 << 20)].astype(np.float64)
            count += len(block)
            total += block.sum(axis=0)
            products += block.T @ block
    if count < 2:
        raise ValueError("rgb_pca: a covariance needs at least two pixels")
    return principal_components(count, total, products)[1:]


def principal_components(
    count: int, total: np.ndarray, products: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the RGB covariance [3, 3], its eigenvalues [3], largest first, and eigenvectors [3, 3].

    Args:
      count, total, products: the number of pixels p, Σ p and Σ p pᵀ.
    """
    mean = total / count
    covariance = products / count - np.outer(mean, mean)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    eigenvalues = np.maximum(eigenvalues, 0)  # of gray images, rounding makes some of them negative
    return covariance, eigenvalues[::-1].copy(), eigenvectors[:, ::-1].copy()
