"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) in JAX and Flax: the public names.

Importing this starts no backend and reads no data.
"""

from alexnet_jax.augment import center_crop, pca_lighting, random_crop, random_flip, rgb_pca, ten_crop
from alexnet_jax.model import AlexNet, Stem, activations
from alexnet_jax.ops import OPS, PLAIN, Ops, dropout, local_response_norm, max_pool, spatial_response_norm
from alexnet_jax.optimizer import cross_entropy, learning_rate_at, paper_sgd, plateau_init, plateau_update
from alexnet_jax.variants import VARIANTS, Variant

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
    "local_response_norm",
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
