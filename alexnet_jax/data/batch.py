"""The batches of training and evaluation, from memory or from files."""

from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """Some examples, split over the mesh."""

    images: jax.Array  # uint8 [B, H, W, C]
    labels: jax.Array  # int32 [B]; −1 for the padding of the last batch of a split


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Return the number of full batches of a training set; the remainder is dropped, other examples each epoch."""
    return size // batch_size
