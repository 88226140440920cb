"""A convolution with a stride as one of stride 1: blocks of pixels become channels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def zero_pad(x: jax.Array, low: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """Return images with `low` zeros before, and zeros after up to `sizes`: [B, *sizes, C]."""
    edges = [(before, size - before - n, 0) for before, size, n in zip(low, sizes, x.shape[1:3], strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def space_to_depth(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Sequence[tuple[int, int]]
) -> tuple[jax.Array, jax.Array]:
    """Return images and kernel of an equal convolution of stride 1, over blocks of stride × stride pixels.

    conv1 of section 3.5, 11×11×3 with a stride of 4, becomes 3×3×48: 3 channels use only a part of hardware that
    multiplies small matrices.

    Args:
      x, kernel: images [B, H, W, I] and the square HWIO kernel of a convolution with this stride and these zeros
        before and after the height and the width.

    Returns:
      [B, H / stride, W / stride, stride² · I], with the zeros, and the kernel for it, to be used without padding.
    """
    size, _, channels, features = kernel.shape
    side = -(-size // stride)
    rows, columns = ((n + sum(edges) - size) // stride + side for n, edges in zip(x.shape[1:3], padding, strict=True))
    x = zero_pad(x, [low for low, _ in padding], (rows * stride, columns * stride))
    x = x.reshape(-1, rows, stride, columns, stride * channels).swapaxes(2, 3)
    kernel = jnp.pad(kernel, ((0, side * stride - size),) * 2 + ((0, 0),) * 2)
    kernel = kernel.reshape(side, stride, side, stride * channels, features).swapaxes(1, 2)
    inputs = stride * stride * channels
    return x.reshape(*x.shape[:3], inputs), kernel.reshape(side, side, inputs, features)
