"""ReLU and overlapping max pooling (sections 3.1, 3.4) in one pass, on NVIDIA GPUs: `relu_lrn_pool` without LRN.

The only residual is the position of each window's maximum, in four bits. The backward pass reads neither x nor y.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from alexnet_jax.ops import pooling_gpu
from alexnet_jax.ops.pooling import max_pool
from alexnet_jax.ops.pooling_gpu import STRIDE, WINDOW, Blocks, Items

FORWARD = Blocks(128, 3, 4)
BACKWARD = Blocks(128, 7, 4)
NOWHERE = 15  # the position of a maximum of 0, which ReLU gives no gradient


def _forward_kernel(x_refs, bias_ref, y_refs, *place_refs, layer):
    at = Items.of_program(layer, layer.columns, FORWARD.items)
    bias, first_row = at.load([bias_ref], 0, at.inside), pl.program_id(1) * FORWARD.rows

    def body(i, _):
        row = first_row + i
        mask = at.inside & (row < layer.rows)
        maximum, place = jnp.zeros(bias.shape, jnp.float32), jnp.full(bias.shape, NOWHERE, jnp.int32)
        for number in range(WINDOW**2):  # the first of equal maxima wins
            pixel = at.pixel(layer, STRIDE * row + number // WINDOW, STRIDE * at.column + number % WINDOW)
            x = at.load(x_refs, pixel, mask) + bias
            place = jnp.where(x > maximum, number, place)
            maximum = jnp.maximum(x, maximum)
        window = at.window(layer, row, at.column)
        at.store(y_refs, window, mask, maximum)
        if place_refs:
            at.store_places(*place_refs, window, mask, place)
        return 0

    lax.fori_loop(0, FORWARD.rows, body, 0)


def _backward_kernel(dy_refs, place_ref, dx_refs, dbias_ref, *, layer):
    # An item is a column of pairs of pixels (2m, 2m + 1) × (2n, 2n + 1), which lie in the windows from (m − 1, n − 1)
    # to (m, n).
    at = Items.of_program(layer, layer.pairs[0], BACKWARD.items)
    first_row = pl.program_id(1) * BACKWARD.rows

    def body(i, dbias):
        m, n = first_row + i, at.column
        windows = {}
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            index, mask = at.window(layer, m - a, n - b), at.has_window(layer, m - a, n - b)
            windows[a, b] = at.load(dy_refs, index, mask), at.load_places(place_ref, index, mask)
        for r, c in windows:
            dx = jnp.zeros(dbias.shape, jnp.float32)
            for (a, b), (dy, places) in windows.items():
                i, j = r + STRIDE * a, c + STRIDE * b  # the pixel's position in the window
                if i < WINDOW and j < WINDOW:
                    dx += jnp.where(places == WINDOW * i + j, dy, 0.0)
            row, column = STRIDE * m + r, STRIDE * n + c
            mask = at.inside & (row < layer.height) & (column < layer.width)
            at.store(dx_refs, at.pixel(layer, row, column), mask, dx)
            dbias += jnp.where(mask[:, None], dx, 0.0)
        return dbias

    sums = lax.fori_loop(0, BACKWARD.rows, body, jnp.zeros((BACKWARD.items, layer.lanes), jnp.float32))
    at.store_bias_gradient(dbias_ref, layer, sums)


def _forward(inputs, bias, layer, residuals):
    out_shape = [pooling_gpu.outputs(layer, inputs[0])] + [pooling_gpu.places(layer, inputs[0])] * residuals
    kernel = partial(_forward_kernel, layer=layer)
    pool = pooling_gpu.kernel_call(kernel, layer, FORWARD, layer.columns, layer.rows, out_shape, "relu_pool")
    outputs, *places = pool(pooling_gpu.flat(inputs), bias)
    return pooling_gpu.in_shape(outputs, layer.output), *places


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _relu_pool(inputs, bias, layer):
    return _forward(inputs, bias, layer, residuals=False)[0]


def _vjp_forward(inputs, bias, layer):
    outputs, places = _forward(inputs, bias, layer, residuals=True)
    # Of the inputs and the bias the backward pass needs the types alone: XLA drops arrays that nothing reads.
    return outputs, (inputs, bias, places)


def _vjp_backward(layer, residuals, dy):
    inputs, bias, places = residuals
    (columns, rows), out_shape = layer.pairs, pooling_gpu.gradients(layer, inputs, BACKWARD)
    kernel = partial(_backward_kernel, layer=layer)
    call = pooling_gpu.kernel_call(kernel, layer, BACKWARD, columns, rows, out_shape, "relu_pool_backward")
    dx, sums = call(pooling_gpu.flat(dy), places)
    return pooling_gpu.in_shape(dx, inputs[0].shape), pooling_gpu.bias_gradient(layer, sums, bias)


_relu_pool.defvjp(_vjp_forward, _vjp_backward)


def fused_relu_pool(
    inputs: Sequence[jax.Array], bias: jax.Array, towers: int, window: int = 3, stride: int = 2, outputs: int = 1, *,
    interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """Return `relu_pool` by the kernels, for windows of 3×3 at a stride of 2 over float32 or bfloat16.

    `interpret` runs without a GPU, slowly, as tests do.

    Raises:
      ValueError: a shape, dtype or window that the kernels do not take (`pooling_gpu.unsupported`).
    """
    if reason := pooling_gpu.unsupported(inputs, towers, window, stride):
        raise ValueError(f"fused_relu_pool: {reason}")
    bias, layer = pooling_gpu.prepare("fused_relu_pool", inputs, bias, towers, outputs, interpret)
    return _relu_pool(list(inputs), bias, layer)


def relu_pool(
    inputs: Sequence[jax.Array], bias: jax.Array, towers: int, window: int = 3, stride: int = 2, outputs: int = 1
) -> list[jax.Array]:
    """Return max_pool(relu(x + bias)) (sections 3.1, 3.4), on an NVIDIA GPU.

    The arguments, the results and the gradient are those of `relu_lrn_pool_gpu.relu_lrn_pool`, without LRN.
    """
    if not pooling_gpu.unsupported(inputs, towers, window, stride):
        return fused_relu_pool(inputs, bias, towers, window, stride, outputs)
    x = jnp.concatenate(inputs, axis=-1)
    return jnp.split(max_pool(jax.nn.relu(x + bias.astype(x.dtype)), window, stride), outputs, axis=-1)
