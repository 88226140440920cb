"""The operations as a bundle, which a network takes as one argument."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from alexnet_jax.ops import convolution, lrn, plain, pooling, relu, relu_lrn_pool_gpu, relu_lrn_pool_tpu, relu_pool_gpu
from alexnet_jax.ops.dropout import dropout
from alexnet_jax.ops.dropout_gpu import gpu_dropout


class Ops(NamedTuple):
    """The operations that `AlexNet(ops=…)` computes with; `OPS._replace(conv=…)` changes one of them.

    Attributes:
      conv: (x, kernel, stride, padding, precision) to the convolution, as `ops.conv`.
      max_pool: (x, window, stride) to the maxima, as `ops.max_pool`.
      local_response_norm: (x, k, n, alpha, beta) to the normalized activations, as `ops.local_response_norm`.
      spatial_response_norm: (x, size, scale, power, min_div) likewise, as `ops.spatial_response_norm`.
      relu: x to max(x, 0), as `jax.nn.relu`.
      dropout: (key, x, rate, towers, first_example, first_tower) to the kept activations, as `ops.dropout`.
      relu_lrn_pool: (inputs, bias, towers, k, n, alpha, beta, window, stride, outputs) to the maxima: a convolution's
        bias, ReLU, LRN and max pooling in one function, as `relu_lrn_pool_gpu.relu_lrn_pool`; None: one operation after
        the other.
      relu_pool: (inputs, bias, towers, window, stride, outputs) likewise, without LRN, as `relu_pool_gpu.relu_pool`.
    """

    conv: Callable[..., jax.Array] = convolution.conv
    max_pool: Callable[..., jax.Array] = pooling.max_pool
    local_response_norm: Callable[..., jax.Array] = lrn.local_response_norm
    spatial_response_norm: Callable[..., jax.Array] = lrn.spatial_response_norm
    relu: Callable[..., jax.Array] = jax.nn.relu
    dropout: Callable[..., jax.Array] = dropout
    relu_lrn_pool: Callable[..., list[jax.Array]] | None = None
    relu_pool: Callable[..., list[jax.Array]] | None = None


# Gradients written by hand, for reverse mode only; on a CPU also Winograd's convolution.
OPS = Ops()

# XLA's own operations with autodiff's gradients: `jax.jvp`, `jax.hessian` and XLA's partitioner work on them.
PLAIN = Ops(plain.conv, plain.max_pool, plain.local_response_norm, plain.spatial_response_norm)

# One kernel forward and one backward for the operations between two convolutions, which memory traffic limits on a GPU.
CUDA = OPS._replace(
    relu_lrn_pool=relu_lrn_pool_gpu.relu_lrn_pool,
    relu_pool=relu_pool_gpu.relu_pool,
    relu=relu.relu,
    dropout=gpu_dropout,
)

# The same on a TPU. XLA's gradient of max pooling there, select-and-scatter, moves the fewest bytes.
TPU = OPS._replace(relu_lrn_pool=relu_lrn_pool_tpu.relu_lrn_pool, relu=relu.relu, max_pool=plain.max_pool)


def ops_for(device: jax.Device) -> Ops:
    """Return the fastest operations for a device: `CUDA` for an NVIDIA GPU, `TPU` for a TPU, `OPS` for any other."""
    if device.platform == "tpu":
        return TPU
    return CUDA if device.platform in ("gpu", "cuda") and "NVIDIA" in device.device_kind else OPS
