"""Statistics of a training set (sections 2 and 4.1), from the sums of its shards."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from alexnet_jax.augment import principal_components
from alexnet_jax.data.images import SIDE
from alexnet_jax.preparation.sources import PrepareError


def statistics(files: Iterable[Path]) -> dict[str, np.ndarray]:
    """Return the mean image, the RGB covariance and its principal components, in float64, for pixels in 0 to 255.

    Args:
      files: the sums that `shards.make_shard` wrote next to the shards.

    Returns:
      `mean_image` [256, 256, 3], `covariance` [3, 3], `eigenvalues` [3], largest first, and `eigenvectors` [3, 3], one
      per column.

    Raises:
      PrepareError: there is no image.
    """
    images, pixel_sum, products = 0, np.zeros((SIDE, SIDE, 3), np.int64), np.zeros((3, 3), np.int64)
    for file in files:
        with np.load(file) as sums:
            images += int(sums["examples"])
            pixel_sum += sums["pixel_sum"]
            products += sums["products"]
    if not images:
        raise PrepareError("no image of the split `train` could be decoded")
    principal = principal_components(images * SIDE**2, pixel_sum.sum((0, 1)), products)
    names = ("mean_image", "covariance", "eigenvalues", "eigenvectors")
    return dict(zip(names, (pixel_sum / images, *principal), strict=True))
