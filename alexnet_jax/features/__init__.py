"""Features: the output of any layer, by name (section 6.1 compares images by those of fc7)."""

from alexnet_jax.features.extraction import features

__all__ = ["features"]
