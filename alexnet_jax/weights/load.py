"""Weights of a run or of a file."""

from pathlib import Path

from alexnet_jax.weights.description import Weights
from alexnet_jax.weights.native import read_native
from alexnet_jax.weights.workdir import read_workdir


def load_weights(path: str | Path) -> Weights:
    """Return the weights of a run's working directory or of a file of `write_native`."""
    return read_workdir(path) if Path(path).is_dir() else read_native(Path(path))
