"""The loss, the paper's stochastic gradient descent, and its learning-rate schedule (section 5)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alexnet_jax.variants import variant_named


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy of logits [B, K] against integer labels [B] (section 3.5's objective, negated)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class PaperSgdState(NamedTuple):
    velocity: Any


def paper_sgd(
    momentum: float = 0.9, weight_decay: float = 5e-4, variant: str = "paper"
) -> optax.GradientTransformationExtraArgs:
    """The update of section 5:  v ← 0.9 v − 0.0005 ε w − ε ∂L/∂w;  w ← w + v.

    `update` takes ε as the keyword `learning_rate`, so that a schedule that listens to the validation error can set it.

    Args:
      variant: a name in `VARIANTS`, which may give the leaves called `bias` an ε and a weight decay of their own.

    Raises:
      ValueError: an unknown variant; from `update`, a call without the parameters.
    """
    of = variant_named(variant)
    # `optax.sgd(momentum)` after `add_decayed_weights` accumulates ∂L/∂w + 0.0005 w and multiplies the sum by ε at the
    # end: when ε drops tenfold, the whole velocity drops with it. Here ε is inside v, and old steps keep their size.

    def init(params):
        return PaperSgdState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None, *, learning_rate, **unused):
        del unused
        if params is None:
            raise ValueError("paper_sgd: weight decay needs the parameters: call update(gradients, state, params, …)")

        def leaf(path, v, g, w):
            bias = path[-1] == jax.tree_util.DictKey("bias")
            rate, decay = (of.bias_rate, of.bias_decay) if bias else (1.0, 1.0)
            rate *= learning_rate
            return momentum * v - decay * weight_decay * rate * w - rate * g

        velocity = jax.tree.map_with_path(leaf, state.velocity, gradients, params)
        return velocity, PaperSgdState(velocity)

    return optax.GradientTransformationExtraArgs(init, update)


class Plateau(NamedTuple):
    """Where the schedule stands: three scalars that a checkpoint carries."""

    best_error: jax.Array
    evaluations_since_best: jax.Array
    drops: jax.Array


def plateau_init() -> Plateau:
    """The start of section 5's schedule: no error known yet, and no drop made."""
    return Plateau(jnp.float32(jnp.inf), jnp.int32(0), jnp.int32(0))


def plateau_update(state: Plateau, validation_error: jax.Array, patience: int, max_drops: int = 3) -> Plateau:
    """Section 5: divide ε by 10 when the validation error stops improving, three times.

    Args:
      validation_error: of one evaluation.
      patience: evaluations without a new best error after which ε drops.
    """
    improved = validation_error < state.best_error
    waited = jnp.where(improved, 0, state.evaluations_since_best + 1)
    drop = (waited >= patience) & (state.drops < max_drops)
    return Plateau(
        jnp.where(improved, validation_error, state.best_error).astype(jnp.float32),
        jnp.where(drop, 0, waited).astype(jnp.int32),
        state.drops + drop.astype(jnp.int32),
    )


def learning_rate_at(
    step: jax.Array | int,
    plateau: Plateau,
    base: float,
    warmup_steps: int = 0,
    drop_at: tuple[int, ...] = (),
    linear_steps: int = 0,
) -> jax.Array:
    """ε at a step (section 5), a float32 scalar: `base`, ÷ 10 a drop of the plateau.

    Its n-th drop comes at the n-th of the steps `drop_at` at the latest. The plateau alone is the paper's schedule,
    `drop_at` alone a fixed one. The first `warmup_steps` steps rise linearly to `base`, and with `linear_steps` ε falls
    linearly, to zero after that many; the paper has neither (0).
    """
    drops = jnp.maximum(plateau.drops, sum(jnp.int32(step >= at) for at in drop_at))
    warmup = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    left = jnp.maximum(0.0, 1.0 - step / linear_steps) if linear_steps else 1.0
    return jnp.float32(base) * jnp.minimum(warmup, left) * jnp.float32(0.1) ** drops
