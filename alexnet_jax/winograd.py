"""Convolution by Winograd's minimal filtering, with several times fewer multiplications than its definition has.

F(m, r) makes m × m outputs of an r × r kernel from (m + r − 1)² products of channel matrices where the definition takes
m² r²: 2.25 times fewer with F(2, 3), 4.6 times with F(3, 5). With d a tile of inputs and g the kernel, the outputs are
Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A; the matrices follow from m + r − 2 points and ∞ (Toom and Cook). Here m = (r + 1) // 2.

On two CPU cores a training step of the paper's network at batch 64 takes 0.89 s with it and 1.36 s with XLA's
convolutions (AMD EPYC, JAX 0.10.2, 25 November 2026).
"""

from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The most accurate of a dozen choices: with F(3, 5) and conv2's sizes outputs are off by 5e-6 of the largest, kernel
# gradients by 7e-6, where the definition has 6e-7 and 3e-6; F(2, 3) is as good as the definition.
POINTS = (0, 1, -1, 2, 1 / 2, -3 / 2)

Grid = Sequence[Sequence[jax.Array]]  # [row][column]


@cache
def matrices(m: int, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [m + r − 1, m], G [m + r − 1, r] and Bᵀ [m + r − 1, m + r − 1] of F(m, r), in float64."""
    points = np.array(POINTS[: m + r - 2])
    others = [np.delete(points, i) for i in range(len(points))]
    a = np.vander(points, m, increasing=True)
    g = np.vander(points, r, increasing=True) / [[np.prod(p - rest)] for p, rest in zip(points, others, strict=True)]
    b = [[*np.poly(rest)[::-1], 0] for rest in others]
    return np.vstack([a, np.eye(m)[-1]]), np.vstack([g, np.eye(r)[-1]]), np.array([*b, np.poly(points)[::-1]])


def _form(r):
    """m, A, G and Bᵀ of the F(m, r) that stands for an r × r kernel."""
    m = (r + 1) // 2
    return m, *matrices(m, r)


def _between(matrix: np.ndarray, grid: Grid) -> Grid:
    """matrix · grid · matrixᵀ, without the products by 0."""

    def times(vectors):
        return [sum(c * x for c, x in zip(row.tolist(), vectors, strict=True) if c) for row in matrix]

    columns = [times(column) for column in zip(*grid, strict=True)]
    return [times(row) for row in zip(*columns, strict=True)]


def _tiles(x: jax.Array, side: int, step: int) -> Grid:
    """The tiles side × side that begin every `step` pixels of images: at [i][j] pixel (i, j) of each, [tiles, C]."""
    rows, columns = ((size - side) // step + 1 for size in x.shape[1:3])

    def pixel(i, j):
        end = (x.shape[0], i + step * (rows - 1) + 1, j + step * (columns - 1) + 1, x.shape[3])
        return lax.slice(x, (0, i, j, 0), end, (1, step, step, 1)).reshape(-1, x.shape[3])

    return [[pixel(i, j) for j in range(side)] for i in range(side)]


def _pad(x: jax.Array, low: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """Images with so many zeros before, and after up to those sizes, [B, *sizes, C]."""
    edges = [(before, size - before - here, 0) for before, size, here in zip(low, sizes, x.shape[1:3], strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def _whole_tiles(x, outputs, m, r, padding):
    """Images with their padding, filled up until the outputs [H, W] are whole tiles, and these outputs' [H, W]."""
    outputs = [-(-size // m) * m for size in outputs]
    return _pad(x, [low for low, _ in padding], [size + r - 1 for size in outputs]), outputs


def _outputs(x, kernel, padding):
    batch, r, features = x.shape[0], kernel.shape[0], kernel.shape[3]
    m, a, g, b = _form(r)
    height, width = (size + sum(edges) - r + 1 for size, edges in zip(x.shape[1:3], padding, strict=True))
    x, sides = _whole_tiles(x, (height, width), m, r, padding)
    inputs, kernels = _between(b, _tiles(x, m + r - 1, m)), _between(g, [list(row) for row in kernel])
    products = [[d @ k for d, k in zip(*rows, strict=True)] for rows in zip(inputs, kernels, strict=True)]
    tiles = (batch, sides[0] // m, sides[1] // m, features)
    outputs = [jnp.stack([y.reshape(tiles) for y in row], 3) for row in _between(a.T, products)]
    return jnp.stack(outputs, 2).reshape(batch, *sides, features)[:, :height, :width]


def _kernel_gradient(x, gradient, r, padding):
    m, a, g, b = _form(r)
    x, sides = _whole_tiles(x, gradient.shape[1:3], m, r, padding)
    inputs, outputs = _between(b, _tiles(x, m + r - 1, m)), _between(a, _tiles(_pad(gradient, (0, 0), sides), m, m))
    products = [[d.T @ y for d, y in zip(*rows, strict=True)] for rows in zip(inputs, outputs, strict=True)]
    return jnp.stack([jnp.stack(row) for row in _between(g.T, products)])


def _in_parts(function, count, *images):
    """function(*images) for a part of the batch after the other, their results stacked."""
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
    """Whether the convolution of images [B, H, W, I] by an HWIO kernel is faster this way, on a CPU."""
    # Products saved, I · O, by the sums that this adds, I + O: 32 and 35 for conv1 and conv2 of the paper, 11 for conv2
    # of the compact network, with which a step takes twice as long. Its conv3 to conv5 are small: 26.9 and 23.8 ms a
    # step without and with them in one pair of runs, 24.8 and 27.2 in another, for twice the time to compile.
    size, _, channels, features = kernel.shape
    multiplications = x.size * size**2 * features / stride**2
    channels *= stride**2
    wide = channels * features >= 20 * (channels + features)
    return 3 <= -(-size // stride) <= 5 and wide and multiplications >= 100_000_000


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """`ops.conv`, computed in float32 at least, for kernels of 3 to 5 strides."""
    dtype = x.dtype
    x, kernel = (a.astype(jnp.promote_types(dtype, jnp.float32)) for a in (x, kernel))
    parts = 1
    if stride > 1:
        x, kernel = _blocks(x, kernel, stride, padding)
        padding = ((0, 0), (0, 0))
        # The tiles of a few of conv1's images stay in the cache: inference 264 images/s for 249.
        parts = max(1, len(x) // next(few for few in (8, 6, 4, 3, 2, 1) if len(x) % few == 0))
    x, kernel = x + _zero_of(kernel), kernel + _zero_of(x)
    return _convolve(x, kernel, padding, parts).astype(dtype)


def _zero_of(x):
    """0, which varies on the axes of a `jax.shard_map` that x varies on: added to an array, it makes its gradient the
    sum over these."""
    return lax.stop_gradient(x[:0].sum())


def _blocks(x, kernel, stride, padding):
    """A convolution of that stride as one of stride 1 over blocks of stride × stride pixels: its images and kernel."""
    size, _, channels, features = kernel.shape
    side = -(-size // stride)
    rows, columns = ((n + sum(edges) - size) // stride + side for n, edges in zip(x.shape[1:3], padding, strict=True))
    x = _pad(x, [low for low, _ in padding], (rows * stride, columns * stride))
    x = x.reshape(-1, rows, stride, columns, stride * channels).swapaxes(2, 3)
    kernel = jnp.pad(kernel, ((0, side * stride - size),) * 2 + ((0, 0),) * 2)
    kernel = kernel.reshape(side, stride, side, stride * channels, features).swapaxes(1, 2)
    inputs = stride * stride * channels
    return x.reshape(*x.shape[:3], inputs), kernel.reshape(side, side, inputs, features)
