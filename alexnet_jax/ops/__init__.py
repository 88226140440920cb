"""The operations of sections 3 and 4 that JAX and Flax do not have as the paper defines them, with their gradients.

Arrays are NHWC. Each function is pure and jittable. `ops_for` gives the bundle that the network takes by default on a
device; `PLAIN` is that of XLA's own operations.
"""

from alexnet_jax.ops.bundle import CUDA, OPS, PLAIN, TPU, Ops, ops_for
from alexnet_jax.ops.convolution import conv
from alexnet_jax.ops.dropout import dropout
from alexnet_jax.ops.lrn import local_response_norm, spatial_response_norm
from alexnet_jax.ops.pooling import max_pool

__all__ = [
    "CUDA", "OPS", "PLAIN", "TPU", "Ops", "conv", "dropout", "local_response_norm", "max_pool", "ops_for",
    "spatial_response_norm",
]  # fmt: skip
