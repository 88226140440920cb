"""One update of the parameters (section 5): pure functions, no files."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from alexnet_jax import sharding
from alexnet_jax.data.batch import Batch
from alexnet_jax.model import AlexNet
from alexnet_jax.optimizer import Plateau, cross_entropy, plateau_init
from alexnet_jax.preprocess import Preprocess


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes in training, and all that a checkpoint needs."""

    step: jax.Array  # updates done; with the seed it also gives the position in the data
    params: Any
    opt_state: Any
    plateau: Plateau
    key: jax.Array  # raw data of the run's key


def state_specs(state: TrainState) -> TrainState:
    """Where each array of the state lies: parameters and velocities split over the towers, the rest on every device."""
    everywhere = jax.tree.map(lambda _: sharding.REPLICATED, state)
    return everywhere.replace(
        params=sharding.tower_specs(state.params), opt_state=sharding.tower_specs(state.opt_state)
    )


def create_state(
    model: AlexNet,
    optimizer: optax.GradientTransformation,
    shape: tuple[int, ...],
    seed: int,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step, the same on any mesh; `shape` is [H, W, C] of what the network sees."""

    def create():
        init_key, run_key = jax.random.split(jax.random.key(seed))
        params = model.init(init_key, jnp.zeros((1, *shape)))["params"]
        return TrainState(jnp.int32(0), params, optimizer.init(params), plateau_init(), jax.random.key_data(run_key))

    mesh = mesh or sharding.one_device()
    specs = state_specs(jax.eval_shape(create))
    return jax.jit(create, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()


def make_train_step(
    model: AlexNet,
    optimizer: optax.GradientTransformationExtraArgs,
    preprocess: Preprocess,
    learning_rate: Callable[[jax.Array, Plateau], jax.Array],
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """One update as a jitted function of (state, batch, key); the state is donated.

    The key is the step's own: augmentation and dropout draw from it. The metrics are those of the batch before the
    update: loss, top-1 error, and the learning rate. The result is the same on any mesh, up to rounding.
    """
    mesh = mesh or sharding.one_device()
    both = (sharding.DATA, sharding.TOWER)
    here = model.clone(data_axis=sharding.DATA, tower_axis=sharding.TOWER)

    def update(state: TrainState, batch: Batch, key: jax.Array):  # on each device, with its part of the arrays
        image_key, dropout_key = jax.random.split(key)
        first = lax.axis_index(sharding.DATA) * batch.labels.shape[0]
        images = lax.pcast(preprocess.train(image_key, batch.images, first), sharding.TOWER, to="varying")

        def loss_fn(params):
            # The one place where the gradients are summed over `data`: the transpose of this cast.
            params = jax.tree.map(lambda w: lax.pcast(w, sharding.DATA, to="varying"), params)
            logits = here.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
            with jax.named_scope("metrics"):
                # Both towers hold the same logits, so the mean over `tower` halves each one's share of the gradient.
                return lax.pmean(cross_entropy(logits, batch.labels), both), logits

        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        rate = learning_rate(state.step, state.plateau)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, learning_rate=rate)
        params = optax.apply_updates(state.params, updates)
        with jax.named_scope("metrics"):
            error = lax.pmean(jnp.mean(jnp.argmax(logits, axis=-1) != batch.labels), both)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {"loss": loss, "error": error, "learning_rate": rate}

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch, key: jax.Array):
        specs = state_specs(state)
        sharded = jax.shard_map(
            update, mesh=mesh, in_specs=(specs, sharding.BATCH, sharding.REPLICATED),
            out_specs=(specs, sharding.REPLICATED),
        )  # fmt: skip
        return sharded(state, batch, key)

    return train_step
