"""The operations of section 3 that a framework does not give in the paper's form, with their gradients.

Arrays are NHWC. Each function is pure and jittable; a gradient is written by hand where a measurement says that it pays
(two CPU cores, JAX 0.10.2; medians of alternating runs stand beside each).
"""

import functools
import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax import winograd


def _check_float(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: {x.dtype}: expected floats; the result has the dtype of x, and integers cut it off")


def _window_sum(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """Sum over a window, of odd sides for the last axes of x, centred on each element and clipped at the edges."""
    for axis, side in enumerate(window, x.ndim - len(window)):
        if side > 1:  # one axis after the other: 8 ms against 52 ms for 5×5 at once, normalizing 32×27×27×128
            reduced, shifted = (partial(form, axis=axis, side=side) for form in (_reduce_window_sum, _shifted_sum))
            x = lax.platform_dependent(x, cpu=shifted, default=reduced)
    return x


def _reduce_window_sum(x, axis, side):
    of_axis = [side if a == axis else 1 for a in range(x.ndim)]
    return lax.reduce_window(x, jnp.zeros((), x.dtype), lax.add, of_axis, (1,) * x.ndim, "SAME")


def _shifted_sum(x, axis, side):
    # LRN and pooling, forward and backward: 0.75 ms against 1.34 ms for reduce_window at 32×28×28×16 on one core.
    edges = [(side // 2 * (a == axis),) * 2 + (0,) for a in range(x.ndim)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), edges)
    return sum(lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(side))


def _negative_power(scale: jax.Array, beta: float) -> jax.Array:
    if beta == 0.75:  # two square roots are several times cheaper than a power
        root = lax.rsqrt(scale)
        return root * lax.sqrt(root)
    return scale**-beta


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _lrn(x, k, window, alpha, beta):
    return _lrn_forward(x, k, window, alpha, beta)[0]


def _lrn_forward(x, k, window, alpha, beta):
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = k + alpha * _window_sum(x32 * x32, window)
    return (x32 * _negative_power(scale, beta)).astype(x.dtype), x


def _lrn_backward(k, window, alpha, beta, x, g):
    # b_i = a_i s_i^-β, s_i = k + α Σ_j a_j²  ⇒  da_i = g_i s_i^-β − 2αβ a_i Σ_j g_j a_j s_j^(-β-1), same window.
    # 37 ms against 81 ms for autodiff of the power form at 32×55×55×48.
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = k + alpha * _window_sum(x32 * x32, window)
    g_power = g.astype(x32.dtype) * _negative_power(scale, beta)
    dx = g_power - (2 * alpha * beta) * x32 * _window_sum(g_power * x32 / scale, window)
    return (dx.astype(x.dtype),)


_lrn.defvjp(_lrn_forward, _lrn_backward)


@partial(jax.jit, static_argnums=(1, 2, 3, 4), static_argnames=("k", "n", "alpha", "beta"))
def local_response_norm(x: jax.Array, k: float = 2.0, n: int = 5, alpha: float = 1e-4, beta: float = 0.75) -> jax.Array:
    """Local response normalization (section 3.3): b_i = a_i / (k + α Σ_j a_j²)^β.

    The gradient is a `jax.custom_vjp`, so there is reverse mode only: `jax.jvp` raises TypeError.

    Args:
      x: float activations [..., C]. The sum runs over the n channels centred on each one, clipped at the axis' ends.
      k, n, alpha, beta: the paper's constants. Unlike some frameworks, α is not divided by n.

    Returns:
      The normalized activations, in the shape and dtype of x; computed in float32 at least.

    Raises:
      ValueError: x is not of floats, or n is not a positive odd number.
    """
    _check_float("local_response_norm", x)
    if n < 1 or n % 2 == 0:
        raise ValueError(f"local_response_norm: n={n}: the window is centred, so n must be a positive odd number")
    return _lrn(x, float(k), (n,), float(alpha), float(beta))


@partial(jax.jit, static_argnums=(1, 2, 3, 4), static_argnames=("size", "scale", "power", "min_div"))
def spatial_response_norm(
    x: jax.Array, size: int = 5, scale: float = 0.001, power: float = 0.75, min_div: float = 1.0
) -> jax.Array:
    """The original code's `rnorm`: b = a / (minDiv + scale / size² · Σ a²)^power, each map on its own.

    Its layer in the configuration is called contrast normalization, but no mean is subtracted. The gradient is, as in
    `local_response_norm`, of reverse mode only.

    Args:
      x: float activations [B, H, W, C]. The sum runs over size×size pixels centred on each one, clipped at the edges.

    Returns:
      The normalized activations, in the shape and dtype of x; computed in float32 at least.

    Raises:
      ValueError: x is not of floats, or size is not a positive odd number.
    """
    _check_float("spatial_response_norm", x)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"spatial_response_norm: size={size}: the window is centred; expected a positive odd number")
    return _lrn(x, float(min_div), (size, size, 1), float(scale) / size**2, float(power))


def _taps(x: jax.Array, window: int, stride: int) -> Iterator[tuple[int, int, jax.Array]]:
    """Yields (i, j, what position (i, j) of every window sees), row by row."""
    height, width = ((size - window) // stride + 1 for size in x.shape[1:3])
    for i in range(window):
        for j in range(window):
            limits = (x.shape[0], i + (height - 1) * stride + 1, j + (width - 1) * stride + 1, x.shape[3])
            yield i, j, lax.slice(x, (0, i, j, 0), limits, (1, stride, stride, 1))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x, window, stride):
    # 1.5 ms against 7.9 ms for lax.reduce_window at 32×55×55×48.
    return functools.reduce(jnp.maximum, (tap for _, _, tap in _taps(x, window, stride)))


def _max_pool_forward(x, window, stride):
    y = _max_pool(x, window, stride)
    return y, (x, y)


def _max_pool_backward(window, stride, residuals, g):
    # Each window gives its gradient to the first position that holds its maximum. Input pixel (stride · m + r) lies in
    # the windows m − a, a = 0, 1, …, at their position r + stride · a; so dx, with an axis for each r, is a sum over
    # the pairs of a. 12 ms against 112 ms for XLA's select-and-scatter at 64×55×55×48.
    x, y = residuals
    batch, height, width, channels = x.shape
    rows, columns = y.shape[1:3]
    extra = (window - 1) // stride
    winner = jnp.full(y.shape, -1, jnp.int32)
    for i, j, tap in reversed(list(_taps(x, window, stride))):
        winner = jnp.where(tap == y, i * window + j, winner)
    edges = ((0, 0, 0), (extra, extra, 0), (extra, extra, 0), (0, 0, 0))
    winner, g = lax.pad(winner, -1, edges), lax.pad(g, jnp.zeros((), g.dtype), edges)
    shape = (batch, rows + extra, stride, columns + extra, stride, channels)
    r, c = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 4))

    def windows(of, a, b):  # what window (m − a, n − b) says to each of its pixels
        first, end = (0, extra - a, extra - b, 0), (batch, rows + 2 * extra - a, columns + 2 * extra - b, channels)
        return lax.broadcast_in_dim(lax.slice(of, first, end), shape, (0, 1, 3, 5))

    dx = jnp.zeros((), x.dtype)
    for a, b in itertools.product(range(extra + 1), repeat=2):
        i, j = r + stride * a, c + stride * b
        hit = (windows(winner, a, b) == i * window + j) & (j < window)
        dx += jnp.where(hit, windows(g, a, b), 0)
    dx = dx.reshape(batch, shape[1] * stride, shape[3] * stride, channels)[:, :height, :width]
    return (jnp.pad(dx, ((0, 0), (0, height - dx.shape[1]), (0, width - dx.shape[2]), (0, 0))),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@partial(jax.jit, static_argnums=(1, 2), static_argnames=("window", "stride"))
def max_pool(x: jax.Array, window: int = 3, stride: int = 2) -> jax.Array:
    """Overlapping max pooling (section 3.4): z = window, s = stride.

    The gradient is, as in `local_response_norm`, of reverse mode only.

    Args:
      x: activations [B, H, W, C].

    Returns:
      [B, (H − window) // stride + 1, (W − window) // stride + 1, C].

    Raises:
      ValueError: window or stride is not positive, or x is not 4-D, or smaller than one window.
    """
    if window < 1 or stride < 1:
        raise ValueError(f"max_pool: window={window}, stride={stride}: expected both to be at least 1")
    if x.ndim != 4 or min(x.shape[1:3]) < window:
        raise ValueError(f"max_pool: shape {x.shape}: expected [B, H, W, C] with H and W at least {window}")
    return _max_pool(x, window, stride)


def convolve(x, kernel, stride, padding):
    """`conv` by XLA's own form, everywhere."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _on_each_platform(x, kernel, stride, of):
    """What `of` makes of the convolution's forms, for `lax.platform_dependent`."""
    return {"cpu": of(winograd.convolve if winograd.pays(x, kernel, stride) else convolve), "default": of(convolve)}


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, stride, padding):
    forms = _on_each_platform(x, kernel, stride, lambda form: partial(form, stride=stride, padding=padding))
    return lax.platform_dependent(x, kernel, **forms)


def _conv_forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, residuals, g):
    def gradients(form):
        return lambda x, kernel, g: jax.vjp(partial(form, stride=stride, padding=padding), x, kernel)[1](g)

    return lax.platform_dependent(*residuals, g, **_on_each_platform(*residuals, stride, gradients))


_conv.defvjp(_conv_forward, _conv_backward)


@partial(jax.jit, static_argnums=(2, 3), static_argnames=("stride", "padding"))
def conv(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    """Two-dimensional convolution, ungrouped: [B, H, W, I] with a square HWIO kernel gives [B, H', W', O].

    On a CPU it is Winograd's where that pays. The gradient is, as in `local_response_norm`, of reverse mode only.

    A layer that is confined to its tower calls this once per tower: XLA's grouped convolution
    (`feature_group_count=2`) ran at 19 GFLOP/s forward on the CPU, one per tower at 113. Where XLA's partitioner is to
    split the batch (`jax.jit` of sharded arrays, no `jax.shard_map`), `convolve` is the form that it can split.

    Args:
      padding: zeros before and after, of the height and of the width.

    Raises:
      ValueError: shapes that do not belong together, a kernel that is not square or larger than the images with their
        padding, or a stride below 1.
    """
    side = kernel.shape[0] if kernel.ndim == 4 else 0
    if x.ndim != 4 or kernel.shape != (side, side, x.shape[3], kernel.shape[-1]) or side < 1 or stride < 1:
        raise ValueError(
            f"conv: images {x.shape}, kernel {kernel.shape}, stride={stride}: expected [B, H, W, I], a square "
            "[side, side, I, O] and a stride of at least 1"
        )
    if min(size + sum(edges) for size, edges in zip(x.shape[1:3], padding, strict=True)) < side:
        raise ValueError(f"conv: images {x.shape}, padding {padding}: smaller than the kernel, {side}×{side}")
    return _conv(x, kernel, stride, padding)


def dropout(
    key: jax.Array,
    x: jax.Array,
    rate: float = 0.5,
    towers: int = 2,
    first_example: jax.Array | int = 0,
    first_tower: jax.Array | int = 0,
) -> jax.Array:
    """Dropout as in section 4.2: each unit is zeroed with probability `rate`, and nothing is rescaled in training.

    The mask depends on the key, the example's place in the batch and the tower alone, so that it does not change with
    the layout of the devices.

    Args:
      key: one key a layer and step.
      x: activations [B, N] of `towers` towers; N divisible by `towers`.
      rate: from 0 to 1.
      first_example, first_tower: the place of x[0] in the whole batch, and its first tower's number.

    Returns:
      [B, N], in the dtype of x.

    Raises:
      ValueError: a rate outside 0 to 1, or an x that is not 2-D or whose units do not divide among the towers.
    """
    if not isinstance(rate, jax.core.Tracer) and not 0 <= rate <= 1:
        raise ValueError(f"dropout: rate={rate}: expected a probability, from 0 to 1")
    if x.ndim != 2 or towers < 1 or x.shape[1] % towers:
        raise ValueError(f"dropout: shape {x.shape}: expected [B, N] with N divisible by towers={towers}")
    batch, units = x.shape

    def mask(example, tower):
        tower_key = jax.random.fold_in(jax.random.fold_in(key, example), tower)
        return jax.random.bernoulli(tower_key, 1 - rate, (units // towers,))

    examples, numbers = first_example + jnp.arange(batch), first_tower + jnp.arange(towers)
    kept = jax.vmap(jax.vmap(mask, (None, 0)), (0, None))(examples, numbers)
    return jnp.where(kept.reshape(batch, units), x, jnp.zeros((), x.dtype))
