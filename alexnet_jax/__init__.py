"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) in JAX and Flax: the public names.

Importing this starts no backend and reads no data.
"""

import importlib
from typing import TYPE_CHECKING, Any

from alexnet_jax.augment import center_crop, pca_lighting, random_crop, random_flip, rgb_pca, ten_crop
from alexnet_jax.lpips import lpips
from alexnet_jax.model import AlexNet, Stem, activations
from alexnet_jax.ops import OPS, PLAIN, Ops, dropout, local_response_norm, max_pool, spatial_response_norm
from alexnet_jax.optimizer import cross_entropy, learning_rate_at, paper_sgd, plateau_init, plateau_update
from alexnet_jax.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from alexnet_jax.weights import load_lpips_heads, load_weights

__all__ = [
    "OPS",
    "PLAIN",
    "VARIANTS",
    "AlexNet",
    "Ops",
    "Stem",
    "Variant",
    "activations",
    "center_crop",
    "cross_entropy",
    "dropout",
    "learning_rate_at",
    "load_lpips_heads",
    "load_weights",
    "local_response_norm",
    "lpips",
    "max_pool",
    "paper_sgd",
    "pca_lighting",
    "plateau_init",
    "plateau_update",
    "random_crop",
    "random_flip",
    "rgb_pca",
    "spatial_response_norm",
    "ten_crop",
]


def __getattr__(name: str) -> Any:
    """Return what is imported when it is used: `alexnet_jax.weights` imports what reads images and runs."""
    if name in ("load_lpips_heads", "load_weights"):
        return getattr(importlib.import_module("alexnet_jax.weights"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
