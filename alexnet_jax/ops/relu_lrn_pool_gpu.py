"""ReLU, local response normalization and overlapping max pooling (sections 3.1, 3.3, 3.4) in one pass, on NVIDIA GPUs.

One after the other, these operations read and write arrays of the size of conv1's and conv2's outputs several times,
which limits their speed on a GPU. Here the forward pass reads x once and writes y; the backward pass reads x once and
writes dx. The residuals have the size of y: for each window the position of its maximum, and s^(−1/4) there, where
s = k + α Σ a². The convolution's bias is added here, so that its gradient needs no pass of its own.

A thread reads the channels on both sides of its own (`pooling_gpu`), so that sums over channels need neither other
threads nor padding.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from alexnet_jax.ops import pooling_gpu
from alexnet_jax.ops.lrn import local_response_norm
from alexnet_jax.ops.pooling import max_pool
from alexnet_jax.ops.pooling_gpu import STRIDE, WINDOW, Blocks, Items

FORWARD = Blocks(128, 9, 4)
BACKWARD = Blocks(128, 7, 4)
_add = partial(jax.tree.map, jnp.add)


class _Lrn(NamedTuple):
    """The constants of section 3.3."""

    k: float
    half: int  # channels on each side of the center
    alpha: float
    beta: float

    @property
    def reach(self):  # channels loaded on each side of a group: a power of two
        return pl.next_power_of_2(self.half)


def _lanes(x):
    """Return the 2^m columns [items, 1] of [items, 2^m]."""
    return lax.split(x, (1,) * x.shape[1], axis=1)


def _stack(parts):
    """Return the columns side by side, by joins of two: [items, 1, 2, …, 2]."""
    return parts[0] if len(parts) == 1 else jnp.stack([_stack(parts[::2]), _stack(parts[1::2])], axis=-1)


def _consecutive_sums(lanes, size):
    """Return the sums of each `size` consecutive arrays."""
    if size == 1:
        return lanes
    halves = _consecutive_sums(lanes, size // 2)
    sums = [a + b for a, b in zip(halves, halves[size // 2 :], strict=False)]
    return sums if size % 2 == 0 else [a + b for a, b in zip(sums, lanes[size - 1 :], strict=False)]


def _window_sums(parts, half):
    """Return the sums [items, lanes] over 2 · half + 1 channels, from `load_with_neighbors`' three arrays."""
    beyond = parts[0].shape[1] - half
    lanes = [lane for part in parts for lane in _lanes(part)]
    sums = _consecutive_sums(lanes[beyond : len(lanes) - beyond], 2 * half + 1)
    return _stack(sums).reshape(parts[1].shape)


def _reciprocal_root(s, interpret):
    if interpret:
        return lax.rsqrt(s)
    # Triton's own handles subnormal numbers first, which takes time; s, at least k, is none.
    shape = jax.ShapeDtypeStruct(s.shape, s.dtype)
    return plgpu.elementwise_inline_asm(
        "rsqrt.approx.ftz.f32 $0, $1;", args=[s], constraints="=f,f", pack=1, result_shape_dtypes=[shape]
    )[0]


def _power(root, beta):
    """Return s^−β from s^(−1/4), or s^(−2β) from s^(−1/2)."""
    return root * root * root if beta == 0.75 else jnp.exp2(jnp.log2(root) * (4 * beta))


def _forward_kernel(x_refs, bias_ref, y_refs, *residual_refs, layer, lrn, blocks):
    # Squares are compared: b² = a² s^(−2β) takes one reciprocal root, and the root of b² is taken once a window.
    # s / α stands for s: α Σ a² would be a product for each pixel, and a constant factor of b² changes no comparison.
    at = Items.of_program(layer, layer.columns, blocks.items)
    first_row = pl.program_id(1) * blocks.rows
    bias = at.load_with_neighbors([bias_ref], 0, at.inside, lrn.reach)

    def row_maxima(row):  # of the window's three pixels in a row: b², s^(−1/2), column, but for powers of α
        maxima = None
        for column in range(WINDOW):
            pixel = (at.image * layer.height + row) * layer.width + STRIDE * at.column + column
            x = at.load_with_neighbors(x_refs, pixel, at.inside & (row < layer.height), lrn.reach)
            squares = jax.tree.map(lambda x, b: lax.square(jnp.maximum(x + b, 0)), x, bias)
            root = _reciprocal_root(lrn.k / lrn.alpha + _window_sums(squares, lrn.half), layer.interpret)
            found = squares[1] * _power(root, lrn.beta), root, jnp.full(root.shape, column, jnp.int32)
            maxima = found if maxima is None else later_maxima(maxima, found, 0)
        return maxima

    def later_maxima(maxima, others, offset):  # the first of equal ones wins
        (value, root, place), (other, other_root, other_place) = maxima, others
        wins = other > value
        place = jnp.where(wins, other_place + offset, place)
        return jnp.maximum(value, other), jnp.where(wins, other_root, root), place

    def body(i, top):
        row = first_row + i
        maxima = later_maxima(top, row_maxima(STRIDE * row + 1), WINDOW)
        bottom = row_maxima(STRIDE * row + 2)
        value, root, place = later_maxima(maxima, bottom, 2 * WINDOW)
        mask = at.inside & (row < layer.rows)
        window = at.window(layer, row, at.column)
        at.store(y_refs, window, mask, jnp.sqrt(value) * lrn.alpha**-lrn.beta)
        if residual_refs:
            quarter_ref, place_ref = residual_refs
            at.store([quarter_ref], window, mask, jnp.sqrt(root) * lrn.alpha**-0.25)
            at.store_places(place_ref, window, mask, place)
        return bottom

    lax.fori_loop(0, blocks.rows, body, row_maxima(STRIDE * first_row))


def _backward_kernel(x_refs, bias_ref, dy_refs, quarter_ref, place_ref, dx_refs, dbias_ref, *, layer, lrn, blocks):
    # With d = dy at the window's maximum: dx_i = d_i s_i^−β − 2αβ a_i Σ_j a_j d_j s_j^(−β−1). An item is a column of
    # pairs of pixels (2m, 2m + 1) × (2n, 2n + 1): they lie in the windows (m, n), (m, n − 1), (m − 1, n), …
    at = Items.of_program(layer, layer.pairs[0], blocks.items)
    first_row = pl.program_id(1) * blocks.rows
    bias = at.load_with_neighbors([bias_ref], 0, at.inside, lrn.reach)

    def window(row, column):
        index, mask = at.window(layer, row, column), at.has_window(layer, row, column)
        dy = at.load_with_neighbors(dy_refs, index, mask, lrn.reach)
        quarters = at.load_with_neighbors([quarter_ref], index, mask, lrn.reach, other=1)
        places = [
            at.load_places(place_ref, index, mask & at.left, -1, layer.lanes - lrn.reach, lrn.reach),
            at.load_places(place_ref, index, mask, 0, 0, layer.lanes),
            at.load_places(place_ref, index, mask & at.right, 1, 0, lrn.reach),
        ]
        direct = [g * _power(quarter, lrn.beta) for g, quarter in zip(dy, quarters, strict=True)]
        spread = [g * lax.square(lax.square(quarter)) for g, quarter in zip(direct, quarters, strict=True)]

        def gradients(i, j):  # for the pixel at position (i, j) of the window
            hits = [place == WINDOW * i + j for place in places]
            return jax.tree.map(lambda hit, g: jnp.where(hit, g, 0.0), [hits[1], *hits], [direct[1], *spread])

        return gradients

    def windows(row):  # the gradients for position i of a row of windows, for both columns of pixels
        here, before = window(row, at.column), window(row, at.column - 1)
        return lambda i: (_add(here(i, 0), before(i, 2)), here(i, 1))

    def write(row, column, gradients):
        pixel = (at.image * layer.height + row) * layer.width + column
        mask = at.inside & (row < layer.height) & (column < layer.width)
        x = _add(at.load_with_neighbors(x_refs, pixel, mask, lrn.reach), bias)
        direct, *spread = gradients
        totals = _window_sums([jnp.maximum(a, 0) * g for a, g in zip(x, spread, strict=True)], lrn.half)
        dx = jnp.where(x[1] > 0, direct - 2 * lrn.alpha * lrn.beta * x[1] * totals, 0.0)
        at.store(dx_refs, pixel, mask, dx)
        return jnp.where(mask[:, None], dx, 0.0)

    def body(i, carry):
        top, dbias = carry
        m = first_row + i
        gradients = windows(m)
        for column, (above, below) in enumerate(zip(top, gradients(0), strict=True)):
            dbias += write(STRIDE * m, STRIDE * at.column + column, _add(above, below))
        for column, own in enumerate(gradients(1)):
            dbias += write(STRIDE * m + 1, STRIDE * at.column + column, own)
        return gradients(2), dbias

    dbias = jnp.zeros((blocks.items, layer.lanes), jnp.float32)
    _, dbias = lax.fori_loop(0, blocks.rows, body, (windows(first_row - 1)(2), dbias))
    at.store_bias_gradient(dbias_ref, layer, dbias)


def _forward(inputs, bias, layer, lrn, blocks, residuals):
    out_shape = [pooling_gpu.outputs(layer, inputs[0])]
    if residuals:  # float16 has three bits more than bfloat16, and the range that a fourth root takes
        dtype = jnp.float32 if inputs[0].dtype == jnp.float32 else jnp.float16
        size = prod(layer.maxima)
        out_shape += [pooling_gpu.like(inputs[0], size, dtype), pooling_gpu.places(layer, inputs[0])]
    kernel = partial(_forward_kernel, layer=layer, lrn=lrn, blocks=blocks)
    call = pooling_gpu.kernel_call(kernel, layer, blocks, layer.columns, layer.rows, out_shape, "relu_lrn_pool")
    outputs, *rest = call(pooling_gpu.flat(inputs), bias)
    return pooling_gpu.in_shape(outputs, layer.output), rest


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _relu_lrn_pool(inputs, bias, layer, lrn, blocks):
    return _forward(inputs, bias, layer, lrn, blocks[0], residuals=False)[0]


def _vjp_forward(inputs, bias, layer, lrn, blocks):
    outputs, rest = _forward(inputs, bias, layer, lrn, blocks[0], residuals=True)
    return outputs, (inputs, bias, *rest)


def _vjp_backward(layer, lrn, blocks, residuals, dy):
    inputs, bias, quarters, places = residuals
    (columns, rows), out_shape = layer.pairs, pooling_gpu.gradients(layer, inputs, blocks[1])
    kernel = partial(_backward_kernel, layer=layer, lrn=lrn, blocks=blocks[1])
    call = pooling_gpu.kernel_call(kernel, layer, blocks[1], columns, rows, out_shape, "relu_lrn_pool_backward")
    dx, sums = call(pooling_gpu.flat(inputs), bias, pooling_gpu.flat(dy), quarters, places)
    return pooling_gpu.in_shape(dx, inputs[0].shape), pooling_gpu.bias_gradient(layer, sums, bias)


_relu_lrn_pool.defvjp(_vjp_forward, _vjp_backward)


def unsupported(
    inputs: Sequence[jax.Array], towers: int, k: float, n: int, alpha: float, window: int = 3, stride: int = 2
) -> str:
    """Return why the kernels do not take these arguments of `relu_lrn_pool`, or ""."""
    if n not in (3, 5, 7, 9):
        return f"n={n}: expected 3, 5, 7 or 9"
    if k <= 0 or alpha <= 0:
        return f"k={k}, alpha={alpha}: expected both to be above 0"
    return pooling_gpu.unsupported(inputs, towers, window, stride)


def fused_relu_lrn_pool(
    inputs: Sequence[jax.Array], bias: jax.Array, towers: int, k: float, n: int, alpha: float, beta: float,
    window: int = 3, stride: int = 2, outputs: int = 1, *, blocks: tuple[Blocks, Blocks] = (FORWARD, BACKWARD),
    interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """Return `relu_lrn_pool` by the kernels, for windows of 3×3 at a stride of 2.

    Args:
      inputs, bias, towers, k, n, alpha, beta, outputs: as in `relu_lrn_pool`; the inputs are float32 or bfloat16, k and
        alpha are above 0.
      blocks: the layout of the forward and of the backward kernel.
      interpret: run without a GPU, slowly, as tests do.

    Returns:
      `outputs` arrays [B, (H − 3) // 2 + 1, (W − 3) // 2 + 1, C / outputs], in the dtype of the inputs; computed in
      float32.

    Raises:
      ValueError: a shape, dtype or window that the kernels do not take (`unsupported`).
    """
    if reason := unsupported(inputs, towers, k, n, alpha, window, stride):
        raise ValueError(f"fused_relu_lrn_pool: {reason}")
    bias, layer = pooling_gpu.prepare("fused_relu_lrn_pool", inputs, bias, towers, outputs, interpret)
    return _relu_lrn_pool(list(inputs), bias, layer, _Lrn(float(k), n // 2, float(alpha), float(beta)), blocks)


def relu_lrn_pool(
    inputs: Sequence[jax.Array], bias: jax.Array, towers: int, k: float, n: int, alpha: float, beta: float,
    window: int = 3, stride: int = 2, outputs: int = 1,
) -> list[jax.Array]:  # fmt: skip
    """Return max_pool(local_response_norm(relu(x + bias))) (sections 3.1, 3.3, 3.4), on an NVIDIA GPU.

    The gradient is of reverse mode only, as in `ops.local_response_norm`.

    Args:
      inputs: a convolution's outputs, float [B, H, W, C / len(inputs)], each of equally many towers. The channels of
        tower 0 come first; LRN's sums end at the borders of a tower.
      bias: [C].
      k, n, alpha, beta: the constants of section 3.3.
      window, stride: z and s of section 3.4.
      outputs: how many arrays hold the maxima, each of equally many towers.

    Returns:
      `outputs` arrays [B, (H − window) // stride + 1, (W − window) // stride + 1, C / outputs], in the inputs' dtype.
    """
    if not unsupported(inputs, towers, k, n, alpha, window, stride):
        return fused_relu_lrn_pool(inputs, bias, towers, k, n, alpha, beta, window, stride, outputs)
    x = jnp.concatenate(inputs, axis=-1)
    normalized = [
        local_response_norm(jax.nn.relu(tower), k, n, alpha, beta)
        for tower in jnp.split(x + bias.astype(x.dtype), towers, axis=-1)
    ]
    return jnp.split(max_pool(jnp.concatenate(normalized, axis=-1), window, stride), outputs, axis=-1)
