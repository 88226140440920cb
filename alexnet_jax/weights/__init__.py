"""Networks in files: read from any framework's AlexNet, written for this one and for others."""

from alexnet_jax.weights.description import Source, Weights, WeightsError
from alexnet_jax.weights.load import load_weights
from alexnet_jax.weights.native import read_native, write_native

__all__ = ["Source", "Weights", "WeightsError", "load_weights", "read_native", "write_native"]
