"""Local response normalization (section 3.3) and the spatial normalization of the original code."""

from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
from jax import lax


def check_arguments(name: str, x: jax.Array, **window: int) -> None:
    """Raise ValueError if x is not of floats, or if the one number of `window` is not a positive odd number."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: {x.dtype}: expected floats; integers would truncate the result")
    ((argument, size),) = window.items()
    if not isinstance(size, Integral) or size < 1 or size % 2 == 0:
        raise ValueError(f"{name}: {argument}={size}: the window is centered; expected a positive odd number")


def _window_sum(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """Return the sum over a window, of odd sides for the last axes of x, centered and clipped at the edges."""
    for axis, side in enumerate(window, x.ndim - len(window)):
        if side > 1:  # one axis after the other: a square at once is slower on a CPU
            reduced, shifted = (partial(f, axis=axis, side=side) for f in (_reduce_window_sum, _shifted_sum))
            x = lax.platform_dependent(x, cpu=shifted, default=reduced)
    return x


def _reduce_window_sum(x, axis, side):
    window = [side if a == axis else 1 for a in range(x.ndim)]
    return lax.reduce_window(x, jnp.zeros((), x.dtype), lax.add, window, (1,) * x.ndim, "SAME")


def _shifted_sum(x, axis, side):
    # The same sum from shifted slices, which is faster on a CPU.
    edges = [(side // 2 * (a == axis),) * 2 + (0,) for a in range(x.ndim)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), edges)
    return sum(lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(side))


def _negative_power(scale: jax.Array, beta: float) -> jax.Array:
    if beta == 0.75:  # two square roots are cheaper than a power
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
    # Autodiff keeps and reads more arrays.
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = k + alpha * _window_sum(x32 * x32, window)
    g_power = g.astype(x32.dtype) * _negative_power(scale, beta)
    dx = g_power - (2 * alpha * beta) * x32 * _window_sum(g_power * x32 / scale, window)
    return (dx.astype(x.dtype),)


_lrn.defvjp(_lrn_forward, _lrn_backward)


@partial(jax.jit, static_argnums=(1, 2, 3, 4), static_argnames=("k", "n", "alpha", "beta"))
def local_response_norm(x: jax.Array, k: float = 2.0, n: int = 5, alpha: float = 1e-4, beta: float = 0.75) -> jax.Array:
    """Return the local response normalization (LRN, section 3.3): b_i = a_i / (k + α Σ_j a_j²)^β.

    The gradient is a `jax.custom_vjp` of reverse mode only; `PLAIN.local_response_norm` also supports `jax.jvp`.

    Args:
      x: float activations [..., C]. The sum runs over the n channels centered on each one, clipped at the ends.
      k, n, alpha, beta: the paper's constants. Unlike some frameworks, α is not divided by n.

    Returns:
      The normalized activations, in the shape and dtype of x; computed in float32 at least.

    Raises:
      ValueError: x is not of floats, or n is not a positive odd number.
    """
    check_arguments("local_response_norm", x, n=n)
    return _lrn(x, float(k), (n,), float(alpha), float(beta))


@partial(jax.jit, static_argnums=(1, 2, 3, 4), static_argnames=("size", "scale", "power", "min_div"))
def spatial_response_norm(
    x: jax.Array, size: int = 5, scale: float = 0.001, power: float = 0.75, min_div: float = 1.0
) -> jax.Array:
    """Return the `rnorm` of the original code: b = a / (minDiv + scale / size² · Σ a²)^power, each map on its own.

    The original configuration calls this layer contrast normalization, but no mean is subtracted. The gradient is of
    reverse mode only, as that of `local_response_norm`.

    Args:
      x: float activations [B, H, W, C]. The sum runs over size×size pixels centered on each one, clipped at the edges.

    Returns:
      The normalized activations, in the shape and dtype of x; computed in float32 at least.

    Raises:
      ValueError: x is not of floats, or size is not a positive odd number.
    """
    check_arguments("spatial_response_norm", x, size=size)
    return _lrn(x, float(min_div), (size, size, 1), float(scale) / size**2, float(power))
