"""Convolution by Winograd's minimal filtering, with fewer multiplications than its definition.

F(m, r) computes m × m outputs of an r × r kernel from (m + r − 1)² products of channel matrices; the definition needs
m² r². With d a tile of inputs and g the kernel, the outputs are Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A. The matrices follow from
m + r − 2 points and ∞ (Toom and Cook). Here m = (r + 1) // 2.
"""

from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from alexnet_jax.ops.space_to_depth import space_to_depth, zero_pad

# Chosen for the smallest rounding errors (docs/performance.md#convolution).
POINTS = (0, 1, -1, 2, 1 / 2, -3 / 2)

Grid = Sequence[Sequence[jax.Array]]  # [row][column]


@cache
def matrices(m: int, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A [m + r − 1, m], G [m + r − 1, r] and Bᵀ [m + r − 1, m + r − 1] of F(m, r), in float64."""
    points = np.array(POINTS[: m + r - 2])
    others = [np.delete(points, i) for i in range(len(points))]
    a = np.vander(points, m, increasing=True)
    g = np.vander(points, r, increasing=True) / [[np.prod(p - rest)] for p, rest in zip(points, others, strict=True)]
    b = [[*np.poly(rest)[::-1], 0] for rest in others]
    return np.vstack([a, np.eye(m)[-1]]), np.vstack([g, np.eye(r)[-1]]), np.array([*b, np.poly(points)[::-1]])


def _filtering(r):
    """Return m, A, G and Bᵀ of the F(m, r) for an r × r kernel."""
    m = (r + 1) // 2
    return m, *matrices(m, r)


def _transform(matrix: np.ndarray, grid: Grid) -> Grid:
    """Return matrix · grid · matrixᵀ, without the products by 0."""

    def times(vectors):
        return [sum(c * x for c, x in zip(row.tolist(), vectors, strict=True) if c) for row in matrix]

    columns = [times(column) for column in zip(*grid, strict=True)]
    return [times(row) for row in zip(*columns, strict=True)]


def _tiles(x: jax.Array, side: int, step: int) -> Grid:
    """Return the tiles side × side at every `step` pixels of images: at [i][j] pixel (i, j) of each, [tiles, C]."""
    rows, columns = ((size - side) // step + 1 for size in x.shape[1:3])

    def pixel(i, j):
        end = (x.shape[0], i + step * (rows - 1) + 1, j + step * (columns - 1) + 1, x.shape[3])
        return lax.slice(x, (0, i, j, 0), end, (1, step, step, 1)).reshape(-1, x.shape[3])

    return [[pixel(i, j) for j in range(side)] for i in range(side)]


def _pad_to_tiles(x, outputs, m, r, padding):
    """Return images padded so that tiles of m × m cover the outputs [H, W] exactly, and the [H, W] of these outputs."""
    outputs = [-(-size // m) * m for size in outputs]
    return zero_pad(x, [low for low, _ in padding], [size + r - 1 for size in outputs]), outputs


def _outputs(x, kernel, padding):
    batch, r, features = x.shape[0], kernel.shape[0], kernel.shape[3]
    m, a, g, b = _filtering(r)
    height, width = (size + sum(edges) - r + 1 for size, edges in zip(x.shape[1:3], padding, strict=True))
    x, sides = _pad_to_tiles(x, (height, width), m, r, padding)
    inputs, kernels = _transform(b, _tiles(x, m + r - 1, m)), _transform(g, [list(row) for row in kernel])
    products = [[d @ k for d, k in zip(*rows, strict=True)] for rows in zip(inputs, kernels, strict=True)]
    tiles = (batch, sides[0] // m, sides[1] // m, features)
    outputs = [jnp.stack([y.reshape(tiles) for y in row], 3) for row in _transform(a.T, products)]
    return jnp.stack(outputs, 2).reshape(batch, *sides, features)[:, :height, :width]


def _kernel_gradient(x, gradient, r, padding):
    m, a, g, b = _filtering(r)
    x, sides = _pad_to_tiles(x, gradient.shape[1:3], m, r, padding)
    inputs, outputs = (
        _transform(b, _tiles(x, m + r - 1, m)),
        _transform(a, _tiles(zero_pad(gradient, (0, 0), sides), m, m)),
    )
    products = [[d.T @ y for d, y in zip(*rows, strict=True)] for rows in zip(inputs, outputs, strict=True)]
    return jnp.stack([jnp.stack(row) for row in _transform(g.T, products)])


def _in_parts(function, count, *images):
    """Return function(*images) for `count` parts of the batch in turn, the results stacked."""
    return lax.map(lambda part: function(*part), tuple(x.reshape(count, -1, *x.shape[1:]) for x in images))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, padding, parts):
    y = _in_parts(lambda x: _outputs(x, kernel, padding), parts, x)
    return y.reshape(-1, *y.shape[2:])


def _convolve_forward(x, kernel, padding, parts):
    return _convolve(x, kernel, padding, parts), (x, kernel)


def _convolve_backward(padding, parts, residuals, gradient):
    x, kernel = residuals
    r = kernel.shape[0]
    edges = tuple((r - 1 - low, r - 1 - high) for low, high in padding)
    dx = _convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3), edges, parts)
    return dx, _in_parts(lambda x, gradient: _kernel_gradient(x, gradient, r, padding), parts, x, gradient).sum(0)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def pays(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    """Return whether the convolution of images [B, H, W, I] by an HWIO kernel is faster this way, on a CPU."""
    if export.is_symbolic_dim(x.shape[0]):
        return False  # conv1's batch is computed in parts, whose number is then unknown
    # It saves products in proportion to I · O and adds sums in proportion to I + O. Small convolutions gain nothing and
    # take longer to compile (docs/performance.md#convolution).
    size, _, channels, features = kernel.shape
    multiplications = x.size * size**2 * features / stride**2
    channels *= stride**2
    wide = channels * features >= 20 * (channels + features)
    return 3 <= -(-size // stride) <= 5 and wide and multiplications >= 100_000_000


def conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """Return the convolution as `ops.conv`, computed in float32 at least, for kernels of 3 to 5 strides."""
    dtype = x.dtype
    x, kernel = (a.astype(jnp.promote_types(dtype, jnp.float32)) for a in (x, kernel))
    parts = 1
    if stride > 1:
        x, kernel = space_to_depth(x, kernel, stride, padding)
        padding = ((0, 0), (0, 0))
        # The tiles of a few images of conv1 fit into the CPU's cache.
        parts = max(1, len(x) // next(n for n in (8, 6, 4, 3, 2, 1) if len(x) % n == 0))
    x, kernel = x + _zero_of(kernel), kernel + _zero_of(x)
    return _convolve(x, kernel, padding, parts).astype(dtype)


def _zero_of(x):
    """Return a 0 that varies over the same axes of `jax.shard_map` as x.

    Adding it to an array makes the array vary over these axes too, so that its gradient is summed over them.
    """
    return lax.stop_gradient(x[:0].sum())
