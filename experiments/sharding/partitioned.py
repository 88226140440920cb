"""The train step of a layout with rules: XLA's partitioner places its collectives."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax import AlexNet, cross_entropy
from alexnet_jax.model import LAYERS
from alexnet_jax.ops import OPS, PLAIN
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.train_step import Batch, TrainState, apply_gradients
from experiments.sharding.layouts import Layout, param_specs

PARTITIONABLE = OPS._replace(conv=PLAIN.conv)  # XLA's partitioner does not split the kernels of GPUs and TPUs


def make_partitioned_step(
    layout: Layout,
    model: AlexNet,
    optimizer: optax.GradientTransformationExtraArgs,
    preprocess: Preprocess,
    learning_rate: Callable,
    mesh: Mesh,
) -> Callable:
    """Return the step of `train_step.make_train_step`, not jitted, whose arrays are split by the layout's rules.

    The model computes with `PARTITIONABLE`, whatever its own operations are.
    """
    model = model.clone(ops=PARTITIONABLE)
    place = lambda x, *spec: lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))  # noqa: E731

    def follow_rules(layer, args, kwargs, context):
        name = context.module.name
        if name not in LAYERS or context.method_name != "__call__":
            return layer(*args, **kwargs)
        rule = layout.rule(name)
        split_units = None if rule.gather else rule.kernels
        with jax.named_scope(name):  # a collective for a layer has its name
            args = jax.tree.map(lambda x: place(x, rule.batch), args)
        outputs = layer(*args, **kwargs)
        with jax.named_scope(name):
            return jax.tree.map(lambda x: place(x, rule.batch, *(None,) * (x.ndim - 2), split_units), outputs)

    def train_step(state: TrainState, batch: Batch, key: jax.Array):
        images, labels = batch
        image_key, dropout_key = jax.random.split(key)
        images = preprocess.train(image_key, images)

        def loss_fn(params):
            params = dict(params)
            for layer in LAYERS:
                if layout.rule(layer).gather:
                    with jax.named_scope(layer):
                        params[layer] = jax.tree.map(place, params[layer])
            with nn.intercept_methods(follow_rules):
                logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
            with jax.named_scope("fc8"):
                logits = place(logits, layout.rule("fc8").batch)
            with jax.named_scope("metrics"):
                return cross_entropy(logits, labels), logits

        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state, rate = apply_gradients(state, gradients, optimizer, learning_rate)
        with jax.named_scope("metrics"):
            error = jnp.mean(jnp.argmax(logits, axis=-1) != labels)
        return state, {"loss": loss, "error": error, "learning_rate": rate}

    return train_step


def state_shardings(layout: Layout, state: TrainState, mesh: Mesh) -> Any:
    """Return the sharding of each array of a state: the momentum like the parameters, the rest on every device."""
    opt_state = type(state.opt_state)(*(param_specs(layout, field) for field in state.opt_state))
    specs = jax.tree.map(lambda _: P(), state).replace(params=param_specs(layout, state.params), opt_state=opt_state)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
