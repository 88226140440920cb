"""Overlapping max pooling (section 3.4)."""

import functools
import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _taps(x: jax.Array, window: int, stride: int) -> Iterator[tuple[int, int, jax.Array]]:
    """Yield (i, j, the elements at position (i, j) of every window), row by row."""
    height, width = ((size - window) // stride + 1 for size in x.shape[1:3])
    for i in range(window):
        for j in range(window):
            limits = (x.shape[0], i + (height - 1) * stride + 1, j + (width - 1) * stride + 1, x.shape[3])
            yield i, j, lax.slice(x, (0, i, j, 0), limits, (1, stride, stride, 1))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x, window, stride):
    # On a CPU this is faster than `lax.reduce_window`.
    return functools.reduce(jnp.maximum, (tap for _, _, tap in _taps(x, window, stride)))


def _max_pool_forward(x, window, stride):
    y = _max_pool(x, window, stride)
    return y, (x, y)


def _max_pool_backward(window, stride, residuals, g):
    # Each window gives its gradient to the first position that holds its maximum. Input pixel (stride · m + r) lies in
    # the windows m − a, a = 0, 1, …, at their position r + stride · a; so dx, with an axis for each r, is a sum over
    # the pairs of a. On a CPU this is faster than XLA's select-and-scatter.
    x, y = residuals
    batch, height, width, channels = x.shape
    rows, columns = y.shape[1:3]
    extra = (window - 1) // stride
    argmax = jnp.full(y.shape, -1, jnp.int32)  # the position in the window, row by row
    for i, j, tap in reversed(list(_taps(x, window, stride))):
        argmax = jnp.where(tap == y, i * window + j, argmax)
    edges = ((0, 0, 0), (extra, extra, 0), (extra, extra, 0), (0, 0, 0))
    argmax, g = lax.pad(argmax, -1, edges), lax.pad(g, jnp.zeros((), g.dtype), edges)
    shape = (batch, rows + extra, stride, columns + extra, stride, channels)
    r, c = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 4))

    def at_pixels(windows, a, b):  # for each pixel, the value of window (m − a, n − b)
        first, end = (0, extra - a, extra - b, 0), (batch, rows + 2 * extra - a, columns + 2 * extra - b, channels)
        return lax.broadcast_in_dim(lax.slice(windows, first, end), shape, (0, 1, 3, 5))

    def by_iotas(argmax, a, b):
        i, j = r + stride * a, c + stride * b
        return (argmax == i * window + j) & (j < window)

    def by_table(argmax, a, b):  # for an iota each a GPU has operations of their own
        return argmax == _positions(window, stride, a, b)

    dx = jnp.zeros((), x.dtype)
    for a, b in itertools.product(range(extra + 1), repeat=2):
        implementations = dict(cuda=partial(by_table, a=a, b=b), default=partial(by_iotas, a=a, b=b))
        is_maximum = lax.platform_dependent(at_pixels(argmax, a, b), **implementations)
        dx += jnp.where(is_maximum, at_pixels(g, a, b), 0)
    dx = dx.reshape(batch, shape[1] * stride, shape[3] * stride, channels)[:, :height, :width]
    return (jnp.pad(dx, ((0, 0), (0, height - dx.shape[1]), (0, width - dx.shape[2]), (0, 0))),)


def _positions(window, stride, a, b):
    """Return the position in window (m − a, n − b) of pixel (stride · m + r, stride · n + c): [r, 1, c, 1], or −2."""
    i, j = np.ix_(np.arange(stride) + stride * a, np.arange(stride) + stride * b)
    table = np.where((i < window) & (j < window), i * window + j, -2)
    return table.astype(np.int32)[:, None, :, None]


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@partial(jax.jit, static_argnums=(1, 2), static_argnames=("window", "stride"))
def max_pool(x: jax.Array, window: int = 3, stride: int = 2) -> jax.Array:
    """Return the overlapping max pooling (section 3.4) with z = window, s = stride.

    The first of equal maxima gets the gradient, which is a `jax.custom_vjp` of reverse mode only.

    Args:
      x: activations [B, H, W, C].

    Returns:
      [B, (H − window) // stride + 1, (W − window) // stride + 1, C].

    Raises:
      ValueError: window or stride is not positive, or x is not 4-D, or smaller than one window.
    """
    check_arguments(x, window, stride)
    return _max_pool(x, window, stride)


def check_arguments(x: jax.Array, window: int, stride: int) -> None:
    """Raise ValueError as `max_pool`."""
    if window < 1 or stride < 1:
        raise ValueError(f"max_pool: window={window}, stride={stride}: expected both to be at least 1")
    if x.ndim != 4 or min(x.shape[1:3]) < window:
        raise ValueError(f"max_pool: shape {x.shape}: expected [B, H, W, C] with H and W at least {window}")
