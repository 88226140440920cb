"""The operations as XLA has them, differentiated by autodiff in every mode and order."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.ops import lrn, pooling


def conv(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: Sequence[tuple[int, int]],
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Return the convolution of [B, H, W, I] with an HWIO kernel, as `ops.conv`."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


def max_pool(x: jax.Array, window: int = 3, stride: int = 2) -> jax.Array:
    """Return the maxima of [B, H, W, C] over windows, as `ops.max_pool`; the gradient is select-and-scatter."""
    pooling.check_arguments(x, window, stride)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID")


def local_response_norm(x: jax.Array, k: float = 2.0, n: int = 5, alpha: float = 1e-4, beta: float = 0.75) -> jax.Array:
    """Return b_i = a_i / (k + α Σ_j a_j²)^β of activations [..., C], as `ops.local_response_norm`."""
    lrn.check_arguments("local_response_norm", x, n=n)
    return _response_norm(x, k, (1,) * (x.ndim - 1) + (n,), alpha, beta)


def spatial_response_norm(
    x: jax.Array, size: int = 5, scale: float = 0.001, power: float = 0.75, min_div: float = 1.0
) -> jax.Array:
    """Return b = a / (minDiv + scale / size² · Σ a²)^power of [B, H, W, C], as `ops.spatial_response_norm`."""
    lrn.check_arguments("spatial_response_norm", x, size=size)
    return _response_norm(x, min_div, (1, size, size, 1), scale / size**2, power)


def _response_norm(x, k, window, alpha, beta):
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    sums = lax.reduce_window(x32 * x32, 0.0, lax.add, window, (1,) * x.ndim, "SAME")
    return (x32 * (k + alpha * sums) ** -beta).astype(x.dtype)
