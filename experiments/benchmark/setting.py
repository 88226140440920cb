"""What the parts of the benchmark measure."""

from pathlib import Path
from typing import NamedTuple

from alexnet_jax import AlexNet

ROOT = Path(__file__).parents[2]


class Setting(NamedTuple):
    """What is measured: the paper's network, or with --quick a small one that takes seconds."""

    model: AlexNet
    shape: tuple[int, int, int]  # [H, W, C] of an image
    batches: tuple[int, ...]  # in ascending order
    dtypes: tuple[str, ...]
    rounds: int
    torch_python: str  # a Python interpreter, which may have PyTorch
    quick: bool = False
    config: tuple[str, ...] = ()  # flags of the training loop's config
