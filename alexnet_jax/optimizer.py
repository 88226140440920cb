"""The loss, the paper's stochastic gradient descent, and its learning-rate schedule (section 5)."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean softmax cross-entropy of logits [B, K] against integer labels [B] (section 3.5)."""
    return cross_entropies(logits, labels).mean()


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the softmax cross-entropy of each example [B], as `cross_entropy`."""

    def by_index(logits):
        return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

    def by_comparison(logits):  # its gradient is computed with the softmax's; that of an index is a scatter
        return jnp.where(jnp.arange(logits.shape[-1]) == labels[:, None], logits, 0).sum(-1)

    label_logits = lax.platform_dependent(logits, cpu=by_index, default=by_comparison)
    return jax.nn.logsumexp(logits, axis=-1) - label_logits


class PaperSgdState(NamedTuple):
    """The state of `paper_sgd` with a constant learning rate: v, a tree like the parameters."""

    velocity: Any


class ScheduledPaperSgdState(NamedTuple):
    """The state of `paper_sgd` with a schedule: v, and the number of updates so far."""

    velocity: Any
    count: jax.Array  # type: ignore[assignment]  # also a method of tuples


def paper_sgd(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    bias_rate: float = 1.0,
    bias_decay: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Return the stochastic gradient descent of section 5.

    The update of the parameters w by their gradients g, with the learning rate ε, is

      v ← momentum · v − weight_decay · ε · w − ε · g
      w ← w + v

    `optax.sgd` after `add_decayed_weights` multiplies the velocity by ε after the accumulation, so a decay of ε
    rescales past steps too; here each step keeps its own ε. At a constant ε the two are equal.

    Args:
      learning_rate: ε, or a schedule of the number of updates. A keyword `learning_rate` of `update` overrides it, so
        that a schedule that depends on the validation error can set ε.
      momentum: the momentum coefficient, of at least 0 and below 1.
      weight_decay: relative to ε.
      bias_rate, bias_decay: factors of ε and of the weight decay, for the leaves called `bias`.

    Returns:
      The transformation, for `optax.apply_updates`. v and the updates have the dtype of the parameters. `update` raises
      ValueError without the parameters.

    Raises:
      ValueError: a number that is negative or not finite, or a momentum of 1 or more.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> optimizer = optax.chain(optax.clip_by_global_norm(10.0), paper_sgd(optax.cosine_decay_schedule(0.01, 90)))
    >>> params = {"kernel": jnp.ones(2), "bias": jnp.ones(1)}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> print(optax.apply_updates(params, updates)["bias"])
    [0.989995]
    """
    scheduled = callable(learning_rate)
    if not scheduled:
        _check("learning_rate", learning_rate, ", or a schedule")
    for name, factor in dict(weight_decay=weight_decay, bias_rate=bias_rate, bias_decay=bias_decay).items():
        _check(name, factor)
    _check("momentum", momentum, " and below 1", limit=1)

    def init(params):
        velocity = jax.tree.map(jnp.zeros_like, params)
        return ScheduledPaperSgdState(velocity, jnp.int32(0)) if scheduled else PaperSgdState(velocity)

    constant_or_schedule = learning_rate

    def update(gradients, state, params=None, *, learning_rate=None, **unused):
        del unused
        if params is None:
            raise ValueError("paper_sgd: weight decay needs the parameters: call update(gradients, state, params, …)")
        if learning_rate is None:
            learning_rate = constant_or_schedule(state.count) if scheduled else constant_or_schedule

        def new_velocity(path, v, g, w):
            is_bias = path[-1:] == (jax.tree_util.DictKey("bias"),)
            rate, decay = (bias_rate, bias_decay) if is_bias else (1.0, 1.0)
            rate *= learning_rate
            return (momentum * v - decay * weight_decay * rate * w - rate * g).astype(v.dtype)

        velocity = jax.tree.map_with_path(new_velocity, state.velocity, gradients, params)
        if scheduled:
            return velocity, ScheduledPaperSgdState(velocity, optax.safe_increment(state.count))
        return velocity, PaperSgdState(velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_layers(
    optimizer: optax.GradientTransformationExtraArgs, rates: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that updates each layer with its own factor of the learning rate, as Caffe's `lr_mult`.

    The updates of `paper_sgd` are proportional to ε, weight decay included, so its updates are what is multiplied.

    Args:
      rates: the factor of each layer.
    """
    scales = {str(rate): optax.scale(rate) for rate in rates.values()}
    by_layer = optax.partition(scales, lambda params: {layer: str(rates[layer]) for layer in params})
    return optax.GradientTransformationExtraArgs(*optax.chain(optimizer, by_layer))


def _check(name: str, value: Any, also: str = "", limit: float = math.inf) -> None:
    """Raise ValueError unless a number is at least 0 and below `limit`; an array may be traced, and is not checked."""
    if not isinstance(value, jax.Array | np.ndarray) and not (isinstance(value, Real) and 0 <= float(value) < limit):
        raise ValueError(f"paper_sgd: {name}={value!r}: expected a number of at least 0{also}")


class Plateau(NamedTuple):
    """The state of the learning-rate decay on plateau: three scalars, part of a checkpoint."""

    best_error: jax.Array
    evaluations_since_best: jax.Array
    drops: jax.Array


def plateau_init() -> Plateau:
    """Return the state before the first evaluation."""
    return Plateau(jnp.float32(jnp.inf), jnp.int32(0), jnp.int32(0))


def plateau_update(state: Plateau, validation_error: jax.Array, patience: int, max_drops: int = 3) -> Plateau:
    """Return the state after an evaluation: the learning rate drops when the error stops improving (section 5).

    Args:
      validation_error: of the evaluation, a scalar.
      patience: evaluations without a new best error after which the learning rate is divided by 10.
      max_drops: the maximum number of divisions; the paper's three.
    """
    improved = validation_error < state.best_error
    evaluations = jnp.where(improved, 0, state.evaluations_since_best + 1)
    drop = (evaluations >= patience) & (state.drops < max_drops)
    return Plateau(
        jnp.where(improved, validation_error, state.best_error).astype(jnp.float32),
        jnp.where(drop, 0, evaluations).astype(jnp.int32),
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
    """Return the learning rate of a step (section 5), a float32 scalar: `base`, divided by 10 at each drop.

    The paper's schedule is the decay on plateau alone; with `drop_at` alone it is a fixed one.

    Args:
      step: the number of updates so far.
      plateau: the state of the decay on plateau. From step `drop_at[n − 1]` on, at least n drops apply.
      warmup_steps: steps in which the rate rises linearly to `base`; 0 in the paper.
      drop_at: the steps of a fixed schedule.
      linear_steps: steps in which the rate falls linearly to zero; 0 (the paper's) for no such decay.
    """
    drops = jnp.maximum(plateau.drops, sum(jnp.int32(step >= at) for at in drop_at))
    warmup = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    decay = jnp.maximum(0.0, 1.0 - step / linear_steps) if linear_steps else 1.0
    return jnp.float32(base) * jnp.minimum(warmup, decay) * jnp.float32(0.1) ** drops
