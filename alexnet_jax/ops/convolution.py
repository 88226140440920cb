"""Convolution: the one place that chooses its implementation by platform."""

from collections.abc import Callable
from functools import partial

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from alexnet_jax.ops import plain, winograd
from alexnet_jax.ops.space_to_depth import space_to_depth


def _by_platform(x: jax.Array, kernel: jax.Array, stride: int, precision: lax.PrecisionLike) -> dict[str, Callable]:
    """Return the implementation for each platform, as keywords of `lax.platform_dependent`."""
    xla = partial(plain.conv, precision=precision)
    few_channels = stride > 1 and kernel.shape[2] <= 4  # conv1: cuDNN is slow for 3 channels
    return {
        "cpu": winograd.conv if winograd.pays(x, kernel, stride) else xla,
        "cuda": partial(_conv_over_blocks, precision=precision) if few_channels else xla,
        "default": xla,
    }


def in_kernel_order(gradient: jax.Array) -> jax.Array:
    """Return the gradient of an HWIO kernel, which an NVIDIA GPU then stores in the order of the kernel.

    cuDNN's gradient is OHWI. An update that also transposes it is not done in place, and copies what it returns.
    """

    def in_order(gradient):
        return with_layout_constraint(lax.optimization_barrier(gradient), Layout((0, 1, 2, 3)))

    return lax.platform_dependent(gradient, cuda=in_order, default=lambda gradient: gradient)


def _conv_over_blocks(x, kernel, stride, padding, precision):
    return plain.conv(*space_to_depth(x, kernel, stride, padding), 1, ((0, 0), (0, 0)), precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, stride, padding, precision):
    implementations = _by_platform(x, kernel, stride, precision)
    calls = {platform: partial(f, stride=stride, padding=padding) for platform, f in implementations.items()}
    return lax.platform_dependent(x, kernel, **calls)


def _conv_forward(x, kernel, stride, padding, precision):
    return _conv(x, kernel, stride, padding, precision), (x, kernel)


def _conv_backward(stride, padding, precision, residuals, g):
    def gradients(implementation):
        return lambda x, kernel, g: jax.vjp(partial(implementation, stride=stride, padding=padding), x, kernel)[1](g)

    x, kernel = residuals
    implementations = _by_platform(x, kernel, stride, precision)
    return lax.platform_dependent(x, kernel, g, **{name: gradients(f) for name, f in implementations.items()})


_conv.defvjp(_conv_forward, _conv_backward)


@partial(jax.jit, static_argnums=(2, 3, 4), static_argnames=("stride", "padding", "precision"))
def conv(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Return the two-dimensional convolution, ungrouped, of [B, H, W, I] with a square HWIO kernel: [B, H', W', O].

    On a CPU it is Winograd's where that is faster, and on an NVIDIA GPU conv1 runs over blocks of 4×4 pixels. The
    gradient is a `jax.custom_vjp` of reverse mode only. Where XLA's partitioner is to split the batch (`jax.jit` of
    sharded arrays, no `jax.shard_map`), use `PLAIN.conv`.

    Args:
      padding: zeros before and after, of the height and of the width.
      precision: of the products, as in `lax.conv_general_dilated`; Winograd's are in float32 at least.

    Raises:
      ValueError: shapes that do not match, a kernel that is not square or is larger than the padded images, or a stride
        below 1.
    """
    side = kernel.shape[0] if kernel.ndim == 4 else 0
    if x.ndim != 4 or kernel.shape != (side, side, x.shape[3], kernel.shape[-1]) or side < 1 or stride < 1:
        raise ValueError(
            f"conv: images {x.shape}, kernel {kernel.shape}, stride={stride}: expected [B, H, W, I], a square "
            "[side, side, I, O] and a stride of at least 1"
        )
    if min(size + sum(edges) for size, edges in zip(x.shape[1:3], padding, strict=True)) < side:
        raise ValueError(f"conv: images {x.shape}, padding {padding}: smaller than the kernel, {side}×{side}")
    return _conv(x, kernel, stride, padding, precision)
