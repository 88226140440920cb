"""Dropout (section 4.2) whose masks do not depend on the layout of the devices."""

import jax
import jax.numpy as jnp


def dropout(
    key: jax.Array,
    x: jax.Array,
    rate: float = 0.5,
    towers: int = 2,
    first_example: jax.Array | int = 0,
    first_tower: jax.Array | int = 0,
) -> jax.Array:
    """Return x with each unit set to zero with probability `rate` (section 4.2), and no unit rescaled.

    The mask depends on the key, the example's index in the batch and the tower alone, so it is the same on any mesh.

    Args:
      key: a key of its own for each layer and step.
      x: activations [B, N] of `towers` towers; N divisible by `towers`.
      rate: from 0 to 1.
      first_example, first_tower: the indices of x[0] in the batch and of its first tower, over all devices.

    Returns:
      [B, N], in the dtype of x.

    Raises:
      ValueError: a rate outside 0 to 1, or an x that is not 2-D or whose units do not divide among the towers.
    """
    check_dropout(x, rate, towers)
    batch, units = x.shape

    def mask(example, tower):
        tower_key = jax.random.fold_in(jax.random.fold_in(key, example), tower)
        return jax.random.bernoulli(tower_key, 1 - rate, (units // towers,))

    examples, numbers = first_example + jnp.arange(batch), first_tower + jnp.arange(towers)
    keep = jax.vmap(jax.vmap(mask, (None, 0)), (0, None))(examples, numbers)
    return jnp.where(keep.reshape(batch, units), x, jnp.zeros((), x.dtype))


def check_dropout(x: jax.Array, rate: float, towers: int) -> None:
    """Raise ValueError for arguments that `dropout` does not take."""
    if not isinstance(rate, jax.core.Tracer) and not 0 <= rate <= 1:
        raise ValueError(f"dropout: rate={rate}: expected a probability, from 0 to 1")
    if x.ndim != 2 or towers < 1 or x.shape[1] % towers:
        raise ValueError(f"dropout: shape {x.shape}: expected [B, N] with N divisible by towers={towers}")
