"""ReLU, local response normalization and overlapping max pooling (sections 3.1, 3.3, 3.4) in one pass, on NVIDIA GPUs.

One after the other, these operations read and write arrays of the size of conv1's and conv2's outputs several times,
which limits their speed on a GPU. Here the forward pass reads x once and writes y; the backward pass reads x once and
writes dx. The residuals have the size of y: for each window the position of its maximum, and s^(−1/4) there, where
s = k + α Σ a². The convolution's bias is added here, so that its gradient needs no pass of its own.

A thread holds a group of channels of a pixel, its lanes, and reads the channels on both sides of it, so that sums over
channels need neither other threads nor padding. Neighboring threads of a warp read neighboring memory. Arrays are
[items, lanes]; only the sums split them into lanes, because Triton's compile time grows with the square of the number
of operations.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from alexnet_jax.ops.lrn import local_response_norm
from alexnet_jax.ops.pooling import max_pool

LANES = {jnp.dtype(jnp.bfloat16): 8, jnp.dtype(jnp.float32): 4}  # channels a thread: loads and stores of 16 bytes
WINDOW, STRIDE = 3, 2
_add = partial(jax.tree.map, jnp.add)


class Blocks(NamedTuple):
    """The work items, rows of windows and warps of a program; a thread has one item where items = 32 · warps."""

    items: int = 128
    rows: int = 9
    warps: int = 4


FORWARD = Blocks(128, 9, 4)
BACKWARD = Blocks(128, 7, 4)


class _Layer(NamedTuple):
    """The static arguments of a call."""

    batch: int
    height: int
    width: int
    channels: int  # of all towers
    lanes: int
    towers: int
    outputs: int  # arrays that the maxima are written to
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
    def groups(self):
        return self.channels // self.lanes

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


class _Items(NamedTuple):
    """The work items [items] of a program: an image, a column (of windows or of pairs of pixels), a channel group.

    A list of arrays [pixels, channels] holds the channels of equally many towers in each.
    """

    lanes: int
    groups: int
    inside: jax.Array
    image: jax.Array
    column: jax.Array
    group: jax.Array
    left: jax.Array  # whether the group before is of the same tower
    right: jax.Array

    @classmethod
    def of_program(cls, layer, columns, items):
        item = pl.program_id(0) * items + lax.iota(jnp.int32, items)
        group, pixel = item % layer.groups, item // layer.groups
        in_tower = layer.groups // layer.towers
        place = group % in_tower
        inside = item < layer.batch * columns * layer.groups
        columns = pixel // columns, pixel % columns
        return cls(layer.lanes, layer.groups, inside, *columns, group, place > 0, place < in_tower - 1)

    def _places(self, arrays, pixel, mask, step, size):
        """Yield each array, the elements of the group from `step` on in it, and whether it holds them: [items, size]."""
        groups = self.groups // len(arrays)  # of an array
        for i, ref in enumerate(arrays):
            group, inside = pixel * groups + self.group % groups, mask
            if len(arrays) > 1:  # in Pallas' interpreter, a store without effect writes what was there
                holds = self.group // groups == i
                group, inside = jnp.where(holds, group, ref.shape[0] // self.lanes), mask & holds
            places = (group * self.lanes + step)[:, None] + lax.broadcasted_iota(jnp.int32, (len(group), size), 1)
            yield ref, places, jnp.broadcast_to(inside[:, None], places.shape)

    def load(self, arrays, pixel, mask, step=0, size=None, other=0):
        """Return float32 [items, size], by default the group's lanes; `other` where mask [items] is false."""
        for ref, places, inside in self._places(arrays, pixel, mask, step, size or self.lanes):
            other = plgpu.load(ref.at[places], mask=inside, other=other)
        return other.astype(jnp.float32)

    def load_with_neighbors(self, arrays, pixel, mask, reach, other=0):
        """Return the `reach` channels before the group, the group's, and as many after; `other` beyond the tower."""
        before = self.load(arrays, pixel, mask & self.left, -reach, reach, other)
        after = self.load(arrays, pixel, mask & self.right, self.lanes, reach, other)
        return before, self.load(arrays, pixel, mask, other=other), after

    def store(self, arrays, pixel, mask, values):
        for ref, places, inside in self._places(arrays, pixel, mask, 0, self.lanes):
            plgpu.store(ref.at[places], values.astype(ref.dtype), mask=inside)


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


def _bits(first, size):
    """Return int32 [1, size]: where in a word the four bits of each lane from `first` on start."""
    return 4 * (first + lax.broadcasted_iota(jnp.int32, (1, size), 1))


def _forward_kernel(x_refs, bias_ref, y_refs, *residual_refs, layer, blocks):
    # Squares are compared: b² = a² s^(−2β) takes one reciprocal root, and the root of b² is taken once a window.
    # s / α stands for s: α Σ a² would be a product for each pixel, and a constant factor of b² changes no comparison.
    at = _Items.of_program(layer, layer.columns, blocks.items)
    first_row = pl.program_id(1) * blocks.rows
    bias = at.load_with_neighbors([bias_ref], 0, at.inside, layer.reach)

    def row_maxima(row):  # of the window's three pixels in a row: b², s^(−1/2), column, but for powers of α
        maxima = None
        for column in range(WINDOW):
            pixel = (at.image * layer.height + row) * layer.width + STRIDE * at.column + column
            x = at.load_with_neighbors(x_refs, pixel, at.inside & (row < layer.height), layer.reach)
            squares = jax.tree.map(lambda x, b: lax.square(jnp.maximum(x + b, 0)), x, bias)
            root = _reciprocal_root(layer.k / layer.alpha + _window_sums(squares, layer.half), layer.interpret)
            found = squares[1] * _power(root, layer.beta), root, jnp.full(root.shape, column, jnp.int32)
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
        window = (at.image * layer.rows + row) * layer.columns + at.column
        at.store(y_refs, window, mask, jnp.sqrt(value) * layer.alpha**-layer.beta)
        if residual_refs:
            quarter_ref, place_ref = residual_refs
            at.store([quarter_ref], window, mask, jnp.sqrt(root) * layer.alpha**-0.25)
            word = (place << _bits(0, layer.lanes)).sum(1)
            plgpu.store(place_ref.at[window * layer.groups + at.group], word.astype(place_ref.dtype), mask=mask)
        return bottom

    lax.fori_loop(0, blocks.rows, body, row_maxima(STRIDE * first_row))


def _backward_kernel(x_refs, bias_ref, dy_refs, quarter_ref, place_ref, dx_refs, dbias_ref, *, layer, blocks):
    # With d = dy at the window's maximum: dx_i = d_i s_i^−β − 2αβ a_i Σ_j a_j d_j s_j^(−β−1). An item is a column of
    # pairs of pixels (2m, 2m + 1) × (2n, 2n + 1): they lie in the windows (m, n), (m, n − 1), (m − 1, n), …
    at = _Items.of_program(layer, -(-layer.width // STRIDE), blocks.items)
    first_row = pl.program_id(1) * blocks.rows
    bias = at.load_with_neighbors([bias_ref], 0, at.inside, layer.reach)

    def window(row, column):
        mask = at.inside & (row >= 0) & (row < layer.rows) & (column >= 0) & (column < layer.columns)
        index = (at.image * layer.rows + row) * layer.columns + column
        dy = at.load_with_neighbors(dy_refs, index, mask, layer.reach)
        quarters = at.load_with_neighbors([quarter_ref], index, mask, layer.reach, other=1)
        word = index * layer.groups + at.group
        words = [
            plgpu.load(place_ref.at[word + step], mask=mask & in_tower, other=-1).astype(jnp.int32)[:, None]
            for step, in_tower in ((-1, at.left), (0, at.inside), (1, at.right))
        ]
        bits = _bits(layer.lanes - layer.reach, layer.reach), _bits(0, layer.lanes), _bits(0, layer.reach)
        places = [(word >> bit) & 15 for word, bit in zip(words, bits, strict=True)]
        direct = [g * _power(quarter, layer.beta) for g, quarter in zip(dy, quarters, strict=True)]
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
        x = _add(at.load_with_neighbors(x_refs, pixel, mask, layer.reach), bias)
        direct, *spread = gradients
        totals = _window_sums([jnp.maximum(a, 0) * g for a, g in zip(x, spread, strict=True)], layer.half)
        dx = jnp.where(x[1] > 0, direct - 2 * layer.alpha * layer.beta * x[1] * totals, 0.0)
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
    columns = -(-layer.width // STRIDE)
    part = (pl.program_id(1) * layer.batch + at.image) * columns + at.column
    at.store([dbias_ref], part, at.inside, dbias)


def _call(kernel, layer, blocks, columns, rows, out_shape, name):
    grid = (pl.cdiv(layer.batch * columns * layer.groups, blocks.items), pl.cdiv(rows, blocks.rows))
    return pl.pallas_call(
        partial(kernel, layer=layer, blocks=blocks),
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=layer.interpret,
        name=name,
    )


def _like(x, size, dtype):
    """Return the type of an output [size] that varies over the mesh axes that x varies over."""
    return jax.ShapeDtypeStruct((size,), dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _flat(arrays):
    return [x.reshape(-1) for x in arrays]


def _forward(inputs, bias, layer, blocks, residuals):
    x, shape = inputs[0], (layer.batch, layer.rows, layer.columns, layer.channels // layer.outputs)
    size = layer.batch * layer.rows * layer.columns * layer.channels
    out_shape = [[_like(x, size // layer.outputs, x.dtype)] * layer.outputs]
    if residuals:  # float16 has three bits more than bfloat16, and the range that a fourth root takes
        dtype = jnp.float32 if x.dtype == jnp.float32 else jnp.float16
        out_shape += [_like(x, size, dtype), _like(x, size // layer.lanes, f"int{4 * layer.lanes}")]
    call = _call(_forward_kernel, layer, blocks, layer.columns, layer.rows, out_shape, "relu_lrn_pool")
    outputs, *rest = call(_flat(inputs), bias)
    return [y.reshape(shape) for y in outputs], rest


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _relu_lrn_pool(inputs, bias, layer, blocks):
    return _forward(inputs, bias, layer, blocks[0], residuals=False)[0]


def _vjp_forward(inputs, bias, layer, blocks):
    outputs, rest = _forward(inputs, bias, layer, blocks[0], residuals=True)
    return outputs, (inputs, bias, *rest)


def _vjp_backward(layer, blocks, residuals, dy):
    inputs, bias, quarters, places = residuals
    columns, rows = (-(-size // STRIDE) for size in (layer.width, layer.height))
    parts = pl.cdiv(rows, blocks[1].rows) * layer.batch * columns
    out_shape = [[_like(x, x.size, x.dtype) for x in inputs], _like(bias, parts * layer.channels, jnp.float32)]
    call = _call(_backward_kernel, layer, blocks[1], columns, rows, out_shape, "relu_lrn_pool_backward")
    dx, sums = call(_flat(inputs), bias, _flat(dy), quarters, places)
    dx = [part.reshape(x.shape) for part, x in zip(dx, inputs, strict=True)]
    return dx, sums.reshape(-1, layer.channels).sum(0).astype(bias.dtype)


_relu_lrn_pool.defvjp(_vjp_forward, _vjp_backward)


def unsupported(
    inputs: Sequence[jax.Array], towers: int, k: float, n: int, alpha: float, window: int = 3, stride: int = 2
) -> str:
    """Return why the kernels do not take these arguments of `relu_lrn_pool`, or ""."""
    x, part = inputs[0], towers // len(inputs)
    if x.dtype not in LANES:
        return f"{x.dtype}: expected float32 or bfloat16"
    if (window, stride) != (WINDOW, STRIDE):
        return f"window={window}, stride={stride}: expected {WINDOW} and {STRIDE}"
    if n not in (3, 5, 7, 9):
        return f"n={n}: expected 3, 5, 7 or 9"
    if x.ndim != 4 or min(x.shape[1:3]) < WINDOW or part < 1 or x.shape[3] % (8 * part) or x.size >= 2**31:
        return (
            f"shape {x.shape}, towers={part}: expected [B, H, W, C] with H and W from {WINDOW}, a multiple of "
            f"8 channels in each tower, and fewer than 2^31 elements"
        )
    if k <= 0 or alpha <= 0:
        return f"k={k}, alpha={alpha}: expected both to be above 0"
    return ""


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
    batch, height, width, channels = inputs[0].shape
    channels *= len(inputs)
    if bias.shape != (channels,):
        raise ValueError(
            f"fused_relu_lrn_pool: bias of shape {bias.shape}: expected one number a channel, {(channels,)}"
        )
    axes = jax.typeof(inputs[0]).manual_axis_type.varying - jax.typeof(bias).manual_axis_type.varying
    bias = lax.pcast(bias, tuple(axes), to="varying") if axes else bias
    layer = _Layer(
        batch, height, width, channels, LANES[inputs[0].dtype], towers, outputs, float(k), n // 2, float(alpha),
        float(beta), interpret,
    )  # fmt: skip
    return _relu_lrn_pool(list(inputs), bias, layer, blocks)


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
