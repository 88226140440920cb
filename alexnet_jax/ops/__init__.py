"""The operations of sections 3 and 4 that JAX and Flax do not have as the paper defines them, with their gradients.

Arrays are NHWC. Each function is pure and jittable. `OPS` is the bundle that the network takes by default; `PLAIN` is
that of XLA's own operations.
"""

from alexnet_jax.ops.bundle import OPS, PLAIN, Ops
from alexnet_jax.ops.convolution import conv
from alexnet_jax.ops.dropout import dropout
from alexnet_jax.ops.lrn import local_response_norm, spatial_response_norm
from alexnet_jax.ops.pooling import max_pool

__all__ = ["OPS", "PLAIN", "Ops", "conv", "dropout", "local_response_norm", "max_pool", "spatial_response_norm"]
