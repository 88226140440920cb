"""Networks in files: read from any framework's AlexNet, written for this one and for others."""

from alexnet_jax.weights.description import Source, Weights, WeightsError
from alexnet_jax.weights.load import load_weights
from alexnet_jax.weights.lpips_heads import load_lpips_heads
from alexnet_jax.weights.native import read_native, write_native
from alexnet_jax.weights.workdir import RunError, read_workdir

__all__ = [
    "RunError", "Source", "Weights", "WeightsError", "load_lpips_heads", "load_weights", "read_native", "read_workdir",
    "write_native",
]  # fmt: skip
