"""ReLU, local response normalization and overlapping max pooling (sections 3.1, 3.3, 3.4) in one pass, on NVIDIA GPUs.

One by one these operations read and write arrays of conv1's and conv2's size several times, and a GPU spends the time
of its step on that. Here the forward pass reads x once and writes y; the backward pass reads x once and writes dx. What
lies between them has the size of y: for each window the place of its maximum, and s = k + α Σ a² there.

A thread holds `LANES` channels of a pixel, each in a variable of its own, and reads the channels beside them, so that
sums over channels need neither other threads nor padding. Its neighbours in memory are its neighbours in the warp.
"""

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LANES = 8  # channels a thread: 16 bytes of bfloat16, and eight places of four bits in an int32
WINDOW, STRIDE = 3, 2


class Blocks(NamedTuple):
    """How a kernel is laid out: threads' work items a program, rows of windows a program, warps a program."""

    items: int = 128
    rows: int = 9
    warps: int = 4


FORWARD = Blocks(128, 9, 4)
BACKWARD = Blocks(128, 7, 4)


class _Layer(NamedTuple):
    """The static facts of one call."""

    batch: int
    height: int
    width: int
    channels: int
    towers: int
    k: float
    half: int  # channels on each side of the centre
    alpha: float
    beta: float

    @property
    def rows(self):
        return (self.height - WINDOW) // STRIDE + 1

    @property
    def columns(self):
        return (self.width - WINDOW) // STRIDE + 1

    @property
    def groups(self):
        return self.channels // LANES


def _unstack(x):
    """The columns of [items, 2^m], as 2^m arrays [items]."""
    if x.ndim == 1:
        return [x]
    items, parts = x.shape
    return [x[:, 0]] if parts == 1 else [p.reshape(items) for p in lax.split(x, (1,) * parts, axis=1)]


def _stack(parts):
    """The inverse of `_unstack`, by joins of two."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack([_stack(parts[::2]), _stack(parts[1::2])], axis=-1)


def _load(ref, first, mask, lanes=LANES, other=0):
    """`lanes` float32 arrays [items]: what lies at first, first + 1, … where mask; lanes is a power of two."""
    if lanes == 1:
        return [plgpu.load(ref.at[first], mask=mask, other=other).astype(jnp.float32)]
    places = first[:, None] + lax.broadcasted_iota(jnp.int32, (first.shape[0], lanes), 1)
    wide = jnp.broadcast_to(mask[:, None], places.shape)
    return _unstack(plgpu.load(ref.at[places], mask=wide, other=other).astype(jnp.float32))


def _store(ref, first, mask, parts):
    values = _stack(parts).reshape(first.shape[0], len(parts)).astype(ref.dtype)
    places = first[:, None] + lax.broadcasted_iota(jnp.int32, values.shape, 1)
    plgpu.store(ref.at[places], values, mask=jnp.broadcast_to(mask[:, None], values.shape))


class _Items(NamedTuple):
    """The work items [items] of a program: image, column (of windows or of pairs of pixels) and group of channels."""

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
        return cls(inside, pixel // columns, pixel % columns, group, place > 0, place < in_tower - 1)

    def load_with_neighbours(self, ref, first, mask, half, other=0):
        """LANES + 2 · half arrays: this group's channels and `half` on each side, `other` beyond the tower."""
        if not half:
            return _load(ref, first, mask, other=other)
        reach = pl.next_power_of_2(half)
        before = _load(ref, first - reach, mask & self.left, reach, other)
        after = _load(ref, first + LANES, mask & self.right, reach, other)
        return before[reach - half :] + _load(ref, first, mask, other=other) + after[:half]


def _window_sums(parts, half):
    """From LANES + 2 · half arrays the LANES sums over 2 · half + 1."""
    return [functools.reduce(jnp.add, parts[i : i + 2 * half + 1]) for i in range(len(parts) - 2 * half)]


def _squared_power(s, beta):
    """s^(−2β)."""
    if beta == 0.75:
        root = lax.rsqrt(s)
        return root * root * root
    return jnp.exp2(jnp.log2(s) * (-2 * beta))


def _power_and_quotient(s, beta):
    """s^−β and s^(−β − 1)."""
    if beta == 0.75:
        root = lax.rsqrt(s)
        power = root * jnp.sqrt(root)
        return power, power * root * root
    power = jnp.exp2(jnp.log2(s) * -beta)
    return power, power / s


def _forward_kernel(x_ref, y_ref, *residual_refs, layer, blocks):
    # Squares are compared: b² = a² s^(−2β) takes one reciprocal root, and the root of b² is taken once a window.
    at = _Items.of_program(layer, layer.columns, blocks.items)
    first_row = pl.program_id(1) * blocks.rows

    def row_maxima(row):  # of the window's three pixels in a row: b², s, column
        maxima = None
        for column in range(WINDOW):
            pixel = (at.image * layer.height + row) * layer.width + STRIDE * at.column + column
            first = pixel * layer.channels + at.group * LANES
            parts = at.load_with_neighbours(x_ref, first, at.inside & (row < layer.height), layer.half)
            squares = [lax.square(jnp.maximum(x, 0)) for x in parts]
            scales = [layer.k + layer.alpha * total for total in _window_sums(squares, layer.half)]
            centre = squares[layer.half : layer.half + LANES]
            found = [
                (a2 * _squared_power(s, layer.beta), s, jnp.full(s.shape, column, jnp.int32))
                for a2, s in zip(centre, scales, strict=True)
            ]
            maxima = found if maxima is None else later_maxima(maxima, found, 0)
        return maxima

    def later_maxima(maxima, others, offset):  # the first of equal ones wins
        results = []
        for (value, s, place), (other, other_s, other_place) in zip(maxima, others, strict=True):
            wins = other > value
            results.append(
                (jnp.maximum(value, other), jnp.where(wins, other_s, s), jnp.where(wins, other_place + offset, place))
            )
        return results

    def body(i, top):
        row = first_row + i
        maxima = later_maxima(top, row_maxima(STRIDE * row + 1), WINDOW)
        bottom = row_maxima(STRIDE * row + 2)
        maxima = later_maxima(maxima, bottom, 2 * WINDOW)
        mask = at.inside & (row < layer.rows)
        group = ((at.image * layer.rows + row) * layer.columns + at.column) * layer.groups + at.group
        _store(y_ref, group * LANES, mask, [jnp.sqrt(value) for value, _, _ in maxima])
        if residual_refs:
            s_ref, place_ref = residual_refs
            _store(s_ref, group * LANES, mask, [s for _, s, _ in maxima])
            word = functools.reduce(jnp.bitwise_or, (place << 4 * i for i, (_, _, place) in enumerate(maxima)))
            plgpu.store(place_ref.at[group], word, mask=mask)
        return bottom

    lax.fori_loop(0, blocks.rows, body, row_maxima(STRIDE * first_row))


def _backward_kernel(x_ref, dy_ref, s_ref, place_ref, dx_ref, *, layer, blocks):
    # With d = dy at the window's maximum: dx_i = d_i s_i^−β − 2αβ a_i Σ_j a_j d_j s_j^(−β−1). An item is a column of
    # pairs of pixels (2m, 2m + 1) × (2n, 2n + 1): they lie in the windows (m, n), (m, n − 1), (m − 1, n), …
    at = _Items.of_program(layer, -(-layer.width // STRIDE), blocks.items)
    first_row = pl.program_id(1) * blocks.rows
    half, lanes = layer.half, range(-layer.half, LANES + layer.half)

    def window(row, column):
        mask = at.inside & (row >= 0) & (row < layer.rows) & (column >= 0) & (column < layer.columns)
        group = ((at.image * layer.rows + row) * layer.columns + column) * layer.groups + at.group
        dy = at.load_with_neighbours(dy_ref, group * LANES, mask, half)
        s = at.load_with_neighbours(s_ref, group * LANES, mask, half, other=1)
        words = [plgpu.load(place_ref.at[group], mask=mask, other=-1)]
        if half:
            before = plgpu.load(place_ref.at[group - 1], mask=mask & at.left, other=-1)
            words = [before, *words, plgpu.load(place_ref.at[group + 1], mask=mask & at.right, other=-1)]
        powers = [_power_and_quotient(part, layer.beta) for part in s]
        direct = [g * power for g, (power, _) in zip(dy, powers, strict=True)][half : half + LANES]
        spread = [g * quotient for g, (_, quotient) in zip(dy, powers, strict=True)]

        def given(i, j):  # to the pixel at position (i, j) of the window
            place = WINDOW * i + j
            hits = []
            for lane in lanes:
                word, bits = words[lane // LANES + bool(half)], 4 * (lane % LANES)
                hits.append(((word >> bits) & 15) == place)
            of_direct = zip(hits[half : half + LANES], direct, strict=True)
            return [jnp.where(hit, g, 0.0) for hit, g in [*of_direct, *zip(hits, spread, strict=True)]]

        return given

    def windows(row):  # what the windows of a row give to position i of their columns, for both columns of pixels
        here, before = window(row, at.column), window(row, at.column - 1)
        return lambda i: ([a + b for a, b in zip(here(i, 0), before(i, 2), strict=True)], here(i, 1))

    def write(row, column, given):
        pixel = (at.image * layer.height + row) * layer.width + column
        first = pixel * layer.channels + at.group * LANES
        mask = at.inside & (row < layer.height) & (column < layer.width)
        x = at.load_with_neighbours(x_ref, first, mask, half)
        direct, spread = given[:LANES], given[LANES:]
        sums = _window_sums([jnp.maximum(a, 0) * g for a, g in zip(x, spread, strict=True)], half)
        factor = 2 * layer.alpha * layer.beta
        of_lane = zip(x[half : half + LANES], direct, sums, strict=True)
        _store(dx_ref, first, mask, [jnp.where(a > 0, g - factor * a * total, 0.0) for a, g, total in of_lane])

    def body(i, top):
        m = first_row + i
        given = windows(m)
        for column, (above, below) in enumerate(zip(top, given(0), strict=True)):
            write(STRIDE * m, STRIDE * at.column + column, [a + b for a, b in zip(above, below, strict=True)])
        for column, own in enumerate(given(1)):
            write(STRIDE * m + 1, STRIDE * at.column + column, own)
        return given(2)

    lax.fori_loop(0, blocks.rows, body, windows(first_row - 1)(2))


def _call(kernel, layer, blocks, columns, rows, out_shape, interpret, name):
    grid = (pl.cdiv(layer.batch * columns * layer.groups, blocks.items), pl.cdiv(rows, blocks.rows))
    return pl.pallas_call(
        partial(kernel, layer=layer, blocks=blocks),
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
        name=name,
    )


def _forward(x, layer, blocks, interpret, residuals):
    windows = (layer.batch, layer.rows, layer.columns)
    size = layer.batch * layer.rows * layer.columns * layer.channels
    out_shape = [jax.ShapeDtypeStruct((size,), x.dtype)]
    if residuals:
        out_shape += [jax.ShapeDtypeStruct((size,), x.dtype), jax.ShapeDtypeStruct((size // LANES,), jnp.int32)]
    call = _call(_forward_kernel, layer, blocks, layer.columns, layer.rows, out_shape, interpret, "relu_lrn_pool")
    y, *rest = call(x.reshape(-1))
    return y.reshape(*windows, layer.channels), rest


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _relu_lrn_pool(x, layer, blocks, interpret):
    return _forward(x, layer, blocks[0], interpret, residuals=False)[0]


def _vjp_forward(x, layer, blocks, interpret):
    y, rest = _forward(x, layer, blocks[0], interpret, residuals=True)
    return y, (x, *rest)


def _vjp_backward(layer, blocks, interpret, residuals, dy):
    x, s, places = residuals
    pairs = [-(-size // STRIDE) for size in (layer.width, layer.height)]
    out_shape = jax.ShapeDtypeStruct((x.size,), x.dtype)
    call = _call(_backward_kernel, layer, blocks[1], *pairs, out_shape, interpret, "relu_lrn_pool_backward")
    return (call(x.reshape(-1), dy.reshape(-1), s, places).reshape(x.shape),)


_relu_lrn_pool.defvjp(_vjp_forward, _vjp_backward)


def relu_lrn_pool(
    x: jax.Array, towers: int, k: float, n: int, alpha: float, beta: float, window: int = 3, stride: int = 2,
    *, blocks: tuple[Blocks, Blocks] = (FORWARD, BACKWARD), interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Return max_pool(local_response_norm(relu(x))), for windows of 3×3 at a stride of 2.

    The gradient is a `jax.custom_vjp`, so there is reverse mode only. Of equal maxima in a window the first, row by
    row, gets the gradient.

    Args:
      x: float32 or bfloat16 [B, H, W, C], the convolution's output with its bias. Tower t has the channels from
        t · C / towers; sums over channels end at the tower's borders.
      k, n, alpha, beta: the constants of section 3.3.
      blocks: the layout of the forward and of the backward kernel.
      interpret: run without a GPU, slowly, as tests do.

    Returns:
      [B, (H − 3) // 2 + 1, (W − 3) // 2 + 1, C], in the dtype of x; computed in float32.

    Raises:
      ValueError: a shape, dtype or window that the kernels do not take.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"relu_lrn_pool: {x.dtype}: expected float32 or bfloat16")
    if (window, stride) != (WINDOW, STRIDE):
        raise ValueError(f"relu_lrn_pool: window={window}, stride={stride}: expected {WINDOW} and {STRIDE}")
    if n < 1 or n % 2 == 0 or n // 2 > LANES:
        raise ValueError(f"relu_lrn_pool: n={n}: expected a positive odd number up to {2 * LANES + 1}")
    if x.ndim != 4 or min(x.shape[1:3]) < WINDOW or towers < 1 or x.shape[3] % (LANES * towers) or x.size >= 2**31:
        raise ValueError(
            f"relu_lrn_pool: shape {x.shape}, towers={towers}: expected [B, H, W, C] with H and W of at least {WINDOW}, "
            f"a multiple of {LANES} channels in each tower, and fewer than 2^31 elements"
        )
    layer = _Layer(*x.shape, towers, float(k), n // 2, float(alpha), float(beta))
    return _relu_lrn_pool(x, layer, blocks, interpret)
