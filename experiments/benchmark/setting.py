"""The setting of a benchmark."""

from pathlib import Path
from typing import NamedTuple

from alexnet_jax import AlexNet

ROOT = Path(__file__).parents[2]


class Setting(NamedTuple):
    """The network that is measured, with its batches and dtypes: the paper's, or a small one with --quick."""

    model: AlexNet
    shape: tuple[int, int, int]  # [H, W, C] of an image
    batches: tuple[int, ...]  # in ascending order
    dtypes: tuple[str, ...]
    rounds: int
    torch_python: str  # a Python interpreter, which may have PyTorch
    quick: bool = False
    config: tuple[str, ...] = ()  # flags of the training loop's config
