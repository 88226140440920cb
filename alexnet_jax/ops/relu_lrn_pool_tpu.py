"""ReLU, local response normalization and overlapping max pooling (sections 3.1, 3.3, 3.4) in one pass, on TPUs.

The forward pass reads x once and writes y; the backward pass reads x and dy once, computes the rest again, and writes
dx. Nothing else is kept between them.

The arrays are [H, W, C, B] here, the layout in which XLA computes conv1: the batch lies in the lanes and the channels
in the sublanes, so that LRN's sums are shifts of sublanes, and the pixels of a window are whole tiles. A program has a
block of images, a tower, and a pair of rows; the pairs of an image come one after the other, and what the next pair
needs of the last one stays in the vector memory.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from alexnet_jax.ops.lrn import local_response_norm
from alexnet_jax.ops.plain import max_pool

LANES = 128
SUBLANES = 16  # of a tile in bfloat16
WINDOW, STRIDE = 3, 2
MEMORY = 64 << 20  # bytes of vector memory that a kernel may use; a chip has 95 MiB at least


class _Layer(NamedTuple):
    """The static arguments of a call."""

    batch: int
    height: int
    width: int
    channels: int
    towers: int
    k: float
    half: int  # channels on each side of the center
    alpha: float
    beta: float
    interpret: bool

    @property
    def rows(self):
        return (self.height - WINDOW) // STRIDE + 1

    @property
    def columns(self):
        return (self.width - WINDOW) // STRIDE + 1

    @property
    def pairs(self):  # of rows
        return pl.cdiv(self.height, STRIDE)

    @property
    def tower(self):  # channels
        return self.channels // self.towers

    @property
    def lanes(self):
        return min(self.batch, LANES)


def _window_sum(x, half):
    """Return the sums of [C, L] over 2 · half + 1 channels, clipped at the edges."""
    channels = x.shape[0]
    place = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    total = x
    for step in range(1, half + 1):
        total += jnp.where(place >= step, pltpu.roll(x, step, 0), 0.0)
        total += jnp.where(place < channels - step, pltpu.roll(x, channels - step, 0), 0.0)
    return total


def _activate(x, bias, layer):
    """Return a = relu(x + bias), s^−β and 1 / s, where s = k + α Σ a², of a pixel [C, L]."""
    a = jnp.maximum(x.astype(jnp.float32) + bias, 0.0)
    s = layer.k + layer.alpha * _window_sum(a * a, layer.half)
    root = lax.rsqrt(s)
    power = root * jnp.sqrt(root) if layer.beta == 0.75 else jnp.exp(-layer.beta * jnp.log(s))
    return a, power, root * root


def _forward_kernel(x_ref, bias_ref, y_ref, carry_ref, *, layer):
    pair, bias = pl.program_id(2), bias_ref[...]

    def normalized(row, column):
        a, power, _ = _activate(x_ref[row, column], bias, layer)
        return a * power

    def column_of_windows(j, left):
        pixels = [[normalized(row, STRIDE * j + i) for i in (1, 2)] for row in range(STRIDE)]
        top, bottom = (jnp.maximum(first, jnp.maximum(*p)) for first, p in zip(left, pixels, strict=True))
        y_ref[0, j] = jnp.maximum(carry_ref[j], top).astype(y_ref.dtype)  # of the windows that end in this pair
        carry_ref[j] = jnp.maximum(top, bottom)
        return tuple(p[-1] for p in pixels)

    @pl.when(pair == 0)
    def _():
        carry_ref[...] = jnp.zeros_like(carry_ref)

    lax.fori_loop(0, layer.columns, column_of_windows, (normalized(0, 0), normalized(1, 0)))


def _backward_kernel(x_ref, bias_ref, dy_ref, dx_ref, dbias_ref, rows_ref, b_ref, d_ref, *, layer):
    # With d = dy at the window's maximum: dx_i = d_i s_i^−β − 2αβ a_i Σ_j a_j d_j s_j^(−β−1). A step reads the pair
    # of rows after the one whose dx it writes: a window of that pair reaches one row into it.
    step, bias = pl.program_id(2), bias_ref[...]
    new, old = step % 2, (step + 1) % 2
    lane = pl.program_id(0) * layer.lanes + lax.broadcasted_iota(jnp.int32, bias.shape, 1)

    def normalize(column, _):
        for row in range(STRIDE):
            x = x_ref[row, column]
            a, power, _ = _activate(x, bias, layer)
            rows_ref[new, row, column], b_ref[new, row, column] = x, a * power
        return 0

    def route(j, _):  # dy to the first maximum of its window
        pixels = [(row, column) for row in range(WINDOW) for column in range(WINDOW)]
        slots = [(old, 0), (old, 1), (new, 0)]
        best = place = None
        for number, (row, column) in enumerate(pixels):
            slot, inner = slots[row]
            value = b_ref[slot, inner, STRIDE * j + column]
            wins = None if best is None else value > best
            place = jnp.zeros(value.shape, jnp.int32) if best is None else jnp.where(wins, number, place)
            best = value if best is None else jnp.maximum(best, value)
        dy = dy_ref[0, j].astype(jnp.float32)
        for number, (row, column) in enumerate(pixels):
            d_ref[row, STRIDE * j + column] += jnp.where(place == number, dy, 0.0)
        return 0

    def write(column, total):
        for row in range(STRIDE):
            d = d_ref[row, column]
            a, power, reciprocal = _activate(rows_ref[old, row, column], bias, layer)
            direct = d * power
            spread = _window_sum(a * direct * reciprocal, layer.half)
            dx = jnp.where(a > 0, direct - 2 * layer.alpha * layer.beta * a * spread, 0.0)
            dx_ref[row, column] = dx.astype(dx_ref.dtype)
            inside = (lane < layer.batch) & (STRIDE * (step - 1) + row < layer.height)
            total += jnp.where(inside, dx, 0.0)
        return total

    @pl.when(step == 0)
    def _():
        d_ref[...] = jnp.zeros_like(d_ref)
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    lax.fori_loop(0, layer.width, normalize, 0)

    @pl.when((step > 0) & (step <= layer.rows))
    def _():
        lax.fori_loop(0, layer.columns, route, 0)

    @pl.when(step > 0)
    def _():
        dbias_ref[0] += lax.fori_loop(0, layer.width, write, jnp.zeros(bias.shape, jnp.float32))
        d_ref[0] = d_ref[2]
        d_ref[1] = jnp.zeros_like(d_ref[1])
        d_ref[2] = jnp.zeros_like(d_ref[2])


def _call(kernel, layer, steps, inputs, outputs, scratch, out_shape, name):
    return pl.pallas_call(
        partial(kernel, layer=layer),
        grid=(pl.cdiv(layer.batch, layer.lanes), layer.towers, steps),
        in_specs=inputs,
        out_specs=outputs,
        scratch_shapes=scratch,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        interpret=layer.interpret,
        name=name,
    )


def _like(x, shape, dtype):
    """Return the type of an output that varies over the mesh axes that x varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _rows(layer, count, index):
    """Return the blocks of `count` rows at a time: `index` is a function of the step."""
    width = layer.width if count == STRIDE else layer.columns
    shape = (count, width, layer.tower, layer.lanes)
    return pl.BlockSpec(shape, lambda block, tower, step: (index(step), 0, tower, block))


def _bias(layer, bias):
    """Return the bias as the kernels read it, a number in every lane, and its blocks."""
    spec = pl.BlockSpec((layer.tower, layer.lanes), lambda block, tower, step: (tower, 0))
    return jnp.broadcast_to(bias.astype(jnp.float32)[:, None], (layer.channels, layer.lanes)), spec


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _relu_lrn_pool(x, bias, layer):
    bias, bias_spec = _bias(layer, bias)
    shape = (layer.rows, layer.columns, layer.channels, layer.batch)
    scratch = [pltpu.VMEM((layer.columns, layer.tower, layer.lanes), jnp.float32)]
    call = _call(
        _forward_kernel, layer, layer.pairs, [_rows(layer, STRIDE, lambda step: step), bias_spec],
        _rows(layer, 1, lambda step: jnp.maximum(step - 1, 0)), scratch, _like(x, shape, x.dtype), "relu_lrn_pool",
    )  # fmt: skip
    return call(x.transpose(1, 2, 3, 0), bias).transpose(3, 0, 1, 2)


def _vjp_forward(x, bias, layer):
    return _relu_lrn_pool(x, bias, layer), (x, bias)


def _vjp_backward(layer, residuals, dy):
    x, bias = residuals
    wide, bias_spec = _bias(layer, bias)
    tile = (layer.tower, layer.lanes)
    scratch = [
        pltpu.VMEM((2, STRIDE, layer.width, *tile), x.dtype),
        pltpu.VMEM((2, STRIDE, layer.width, *tile), jnp.float32),
        pltpu.VMEM((WINDOW, layer.width, *tile), jnp.float32),
    ]
    x = x.transpose(1, 2, 3, 0)
    blocks = pl.cdiv(layer.batch, layer.lanes)
    sums_spec = pl.BlockSpec((1, *tile), lambda block, tower, step: (block, tower, 0))
    out_shape = [_like(x, x.shape, x.dtype), _like(x, (blocks, layer.channels, layer.lanes), jnp.float32)]
    previous = _rows(layer, STRIDE, lambda step: jnp.maximum(step - 1, 0))
    call = _call(
        _backward_kernel, layer, layer.pairs + 1,
        [
            _rows(layer, STRIDE, lambda step: jnp.minimum(step, layer.pairs - 1)), bias_spec,
            _rows(layer, 1, lambda step: jnp.clip(step - 1, 0, layer.rows - 1)),
        ],
        [previous, sums_spec], scratch, out_shape, "relu_lrn_pool_backward",
    )  # fmt: skip
    dx, sums = call(x, wide, dy.transpose(1, 2, 3, 0))
    return dx.transpose(3, 0, 1, 2), sums.sum((0, 2)).astype(bias.dtype)


_relu_lrn_pool.defvjp(_vjp_forward, _vjp_backward)


def unsupported(x: jax.Array, towers: int, n: int, window: int = 3, stride: int = 2) -> str:
    """Return why the kernels do not take these arguments of `relu_lrn_pool`, or ""."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{x.dtype}: expected float32 or bfloat16"
    if (window, stride) != (WINDOW, STRIDE):
        return f"window={window}, stride={stride}: expected {WINDOW} and {STRIDE}"
    if x.ndim != 4 or min(x.shape[1:3]) < WINDOW or towers < 1 or x.shape[3] % (SUBLANES * towers) or n % 2 == 0:
        return (
            f"shape {x.shape}, towers={towers}, n={n}: expected [B, H, W, C] with H and W from {WINDOW}, a multiple of "
            f"{SUBLANES} channels in each tower, and an odd n"
        )
    if 22 * x.shape[2] * (x.shape[3] // towers) * min(x.shape[0], LANES) * 2 > MEMORY:
        return f"shape {x.shape}: the rows do not fit the vector memory"
    return ""


def fused_relu_lrn_pool(
    x: jax.Array, bias: jax.Array, towers: int, k: float, n: int, alpha: float, beta: float, window: int = 3,
    stride: int = 2, *, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Return `relu_lrn_pool` by the kernels, for windows of 3×3 at a stride of 2.

    Args:
      x, bias, towers, k, n, alpha, beta: as in `relu_lrn_pool`.
      interpret: run without a TPU, slowly, as tests do.

    Returns:
      [B, (H − 3) // 2 + 1, (W − 3) // 2 + 1, C], in the dtype of x; computed in float32.

    Raises:
      ValueError: a shape, dtype or window that the kernels do not take (`unsupported`).
    """
    if reason := unsupported(x, towers, n, window, stride):
        raise ValueError(f"fused_relu_lrn_pool: {reason}")
    if bias.shape != x.shape[3:]:
        raise ValueError(
            f"fused_relu_lrn_pool: bias of shape {bias.shape}: expected one number a channel, {x.shape[3:]}"
        )
    axes = jax.typeof(x).manual_axis_type.varying - jax.typeof(bias).manual_axis_type.varying
    bias = lax.pcast(bias, tuple(axes), to="varying") if axes else bias
    batch, height, width, channels = x.shape
    layer = _Layer(batch, height, width, channels, towers, float(k), n // 2, float(alpha), float(beta), interpret)
    return _relu_lrn_pool(x, bias, layer)


def relu_lrn_pool(
    inputs: Sequence[jax.Array], bias: jax.Array, towers: int, k: float, n: int, alpha: float, beta: float,
    window: int = 3, stride: int = 2, outputs: int = 1,
) -> list[jax.Array]:  # fmt: skip
    """Return max_pool(local_response_norm(relu(x + bias))) (sections 3.1, 3.3, 3.4), on a TPU.

    The arguments, the results and the gradient are those of the GPU's `relu_lrn_pool_gpu.relu_lrn_pool`.
    """
    towers //= len(inputs)

    def maxima(x, bias):
        if not unsupported(x, towers, n, window, stride):
            return fused_relu_lrn_pool(x, bias, towers, k, n, alpha, beta, window, stride)
        normalized = [
            local_response_norm(jax.nn.relu(tower), k, n, alpha, beta)
            for tower in jnp.split(x + bias.astype(x.dtype), towers, axis=-1)
        ]
        return max_pool(jnp.concatenate(normalized, axis=-1), window, stride)

    biases = jnp.split(bias, len(inputs))
    y = jnp.concatenate([maxima(x, b) for x, b in zip(inputs, biases, strict=True)], axis=-1)
    return jnp.split(y, outputs, axis=-1)
