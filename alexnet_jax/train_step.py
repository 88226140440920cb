"""The training state and the update of a step (section 5): pure functions."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from alexnet_jax import sharding
from alexnet_jax.model import AlexNet
from alexnet_jax.ops.convolution import in_kernel_order
from alexnet_jax.optimizer import Plateau, cross_entropies, plateau_init
from alexnet_jax.preprocess import Preprocess


class TrainState(flax.struct.PyTreeNode):
    """The training state, as a checkpoint stores it."""

    step: jax.Array  # updates so far; with the seed it also gives the position in the data
    params: Any
    opt_state: Any
    plateau: Plateau
    key: jax.Array  # raw data of the run's key


Batch = tuple[jax.Array, jax.Array]  # images uint8 [B, H, W, C] and labels [B]
Metrics = dict[str, jax.Array]
Update = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def state_specs(state: TrainState) -> TrainState:
    """Return the partition of the state: parameters and velocities over the towers, the rest on every device."""
    replicated = jax.tree.map(lambda _: sharding.REPLICATED, state)
    return replicated.replace(
        params=sharding.tower_specs(state.params), opt_state=sharding.tower_specs(state.opt_state)
    )


def create_state(
    model: AlexNet,
    optimizer: optax.GradientTransformation,
    shape: tuple[int, ...],
    seed: int,
    mesh: Mesh | None = None,
    frozen: Collection[str] = (),
) -> TrainState:
    """Return the state before the first step, the same on any mesh.

    Args:
      shape: [H, W, C] of the network's inputs.
      seed: every random number of the training derives from it.
      mesh: of `sharding.make_mesh`; None for one device.
      frozen: the layers that are not trained; the optimizer has no state for them.
    """

    def create():
        init_key, run_key = jax.random.split(jax.random.key(seed))
        params = model.init(init_key, jnp.zeros((1, *shape)))["params"]
        trained = {layer: x for layer, x in params.items() if layer not in frozen}
        return TrainState(jnp.int32(0), params, optimizer.init(trained), plateau_init(), jax.random.key_data(run_key))

    mesh = mesh or sharding.one_device()
    specs = state_specs(jax.eval_shape(create))
    return jax.jit(create, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()


def apply_gradients(
    state: TrainState,
    gradients: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[jax.Array, Plateau], jax.Array],
) -> tuple[TrainState, jax.Array]:
    """Return the state after an update by these gradients, and its learning rate; layers without gradient are kept."""
    trained = {layer: state.params[layer] for layer in gradients}
    rate = learning_rate(state.step, state.plateau)
    with jax.named_scope("optimizer"):
        gradients = jax.tree.map(lambda g: in_kernel_order(g) if g.ndim == 4 else g, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained, learning_rate=rate)
        trained = optax.apply_updates(trained, updates)
    return state.replace(step=state.step + 1, params=state.params | trained, opt_state=opt_state), rate


def make_update(
    model: AlexNet,
    optimizer: optax.GradientTransformationExtraArgs,
    preprocess: Preprocess,
    learning_rate: Callable[[jax.Array, Plateau], jax.Array],
    frozen: Collection[str] = (),
) -> Update:
    """Return one update as each device computes it: (state, batch, key) to (state, metrics).

    It runs under `jax.shard_map` over a mesh of `sharding.make_mesh`, with this device's part of the state and of the
    batch, images uint8 [B, H, W, C] and labels [B]. The key is the step's own, the same on all devices; augmentation
    and dropout draw from it. The metrics are those of the whole batch before the update: `loss`, `error` (top-1), and
    the `learning_rate`. The loss is not differentiated by the parameters of the layers `frozen`.
    """
    axes = (sharding.DATA, sharding.TOWER)
    model = model.clone(data_axis=sharding.DATA, tower_axis=sharding.TOWER)

    def update(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        images, labels = batch
        image_key, dropout_key = jax.random.split(key)
        first = lax.axis_index(sharding.DATA) * labels.shape[0]
        with jax.named_scope("preprocess"):
            images = preprocess.train(image_key, images, first, model.dtype)
            images = lax.pcast(images, sharding.TOWER, to="varying")

        def loss_fn(trained):
            # The one place where the gradients are summed over `data`: the transpose of this cast.
            params = jax.tree.map(lambda w: lax.pcast(w, sharding.DATA, to="varying"), state.params | trained)
            logits: Any = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
            with jax.named_scope("metrics"):
                losses = cross_entropies(logits, labels)
                # Both towers compute the same loss; the mean over `tower` keeps its gradient from counting twice.
                return lax.pmean(losses.mean(), axes), jnp.stack([losses, jnp.argmax(logits, axis=-1) != labels])

        trained = {layer: x for layer, x in state.params.items() if layer not in frozen}
        gradients, losses_and_errors = jax.grad(loss_fn, has_aux=True)(trained)
        state, rate = apply_gradients(state, gradients, optimizer, learning_rate)
        with jax.named_scope("metrics"):
            loss, error = (lax.pmean(mean, axes) for mean in losses_and_errors.mean(axis=1))
        return state, {"loss": loss, "error": error, "learning_rate": rate}

    return update


def make_train_step(
    model: AlexNet,
    optimizer: optax.GradientTransformationExtraArgs,
    preprocess: Preprocess,
    learning_rate: Callable[[jax.Array, Plateau], jax.Array],
    mesh: Mesh | None = None,
    frozen: Collection[str] = (),
) -> Update:
    """Return `make_update`'s update as a jitted function of whole arrays on the mesh; the state is donated.

    The result is the same on any mesh, up to rounding.

    Args:
      learning_rate: a function of the step and of the state of the decay on plateau, as `optimizer.learning_rate_at`.
      mesh: of `sharding.make_mesh`; None for one device.
      frozen: the layers that are not trained, as in `create_state`.
    """
    update = make_update(model, optimizer, preprocess, learning_rate, frozen)
    mesh = mesh or sharding.one_device()

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        specs = state_specs(state)
        sharded = jax.shard_map(
            update, mesh=mesh, in_specs=(specs, sharding.BATCH, sharding.REPLICATED),
            out_specs=(specs, sharding.REPLICATED),
        )  # fmt: skip
        return sharded(state, batch, key)

    return train_step
