"""The layers of the network, each alone: its time, its operations, and the minimum of bytes that it moves."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from alexnet_jax import AlexNet, activations, dropout, local_response_norm, max_pool, paper_sgd
from alexnet_jax.model import LAYERS, OUTPUTS
from alexnet_jax.train_step import create_state
from alexnet_jax.variants import VARIANTS
from experiments import measure
from experiments.benchmark.setting import Setting


class Layer(NamedTuple):
    """A layer as a function of (params, inputs), and the shapes of both."""

    name: str
    function: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    input_gradient: bool = True  # conv1's inputs are the images


def layers_of(model: AlexNet, batch: int, shape: tuple[int, int, int]) -> list[Layer]:
    """Return the layers of a network for images [H, W, C], each with its ReLU, fc6 and fc7 with their dropout."""
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    shapes = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    variant, calls = VARIANTS[model.variant], {}

    def record(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.name in LAYERS:
            calls[context.module.name] = context.module.clone(parent=None), shapes(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        outputs = jax.eval_shape(partial(activations, model), params, images)

    def towers(x):
        return [jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // model.towers), x.dtype)] * model.towers

    def with_params(name, params, inputs):
        x = jax.tree.map(nn.relu if name != "fc8" else lambda x: x, calls[name][0].apply({"params": params}, inputs))
        return dropout(jax.random.key(0), x) if name in ("fc6", "fc7") else x

    def without_params(function, params, inputs):
        return [function(x) for x in inputs]

    layers = []
    for before, name in zip(("images", *OUTPUTS), OUTPUTS, strict=False):
        if name in LAYERS:
            layers.append(Layer(name, partial(with_params, name), params[name], calls[name][1], name != "conv1"))
        else:
            lrn = lambda x: local_response_norm(x, *variant.lrn)  # noqa: E731
            function = partial(without_params, lrn if name.startswith("norm") else max_pool)
            layers.append(Layer(name, function, {}, towers(outputs[before])))
    return layers


def forward_and_backward(layer: Layer) -> tuple[Callable, Callable]:
    """Return two functions of (params, inputs, gradient of the outputs): to the outputs; to outputs and gradients."""

    def forward(params, inputs, _):
        return layer.function(params, inputs)

    def both(params, inputs, gradient):
        if layer.input_gradient:
            outputs, back = jax.vjp(layer.function, params, inputs)
        else:
            outputs, back = jax.vjp(lambda params: layer.function(params, inputs), params)
        return outputs, back(gradient)

    return forward, both


def least_bytes(layer: Layer) -> tuple[int, int]:
    """Return the bytes that a layer reads and writes, forward and backward, if each array moves once."""
    outputs = jax.eval_shape(layer.function, layer.params, layer.inputs)
    params, x, y = measure.size(layer.params), measure.size(layer.inputs), measure.size(outputs)
    return params + x + y, 2 * params + x + y + x * layer.input_gradient


def step_bytes(model: AlexNet, batch: int, shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the minimum of bytes of a train step and of inference: of all layers, and of the update."""
    each = [(least_bytes(layer), measure.size(layer.params)) for layer in layers_of(model, batch, shape)]
    forward, backward = (sum(bytes_[i] for bytes_, _ in each) for i in (0, 1))
    # Parameters and momentum are read and written, gradients read.
    return {"training": forward + backward + 5 * sum(params for _, params in each), "inference": forward}


def run(setting: Setting) -> dict[str, Any]:
    """Measure each layer, forward and backward, and the update, at the largest batch."""
    rates = measure.rates(setting.dtypes, setting.rounds)
    batch, records = setting.batches[-1], []
    for dtype in setting.dtypes:
        model = setting.model.clone(dtype=jnp.dtype(dtype))
        for layer in layers_of(model, batch, setting.shape):
            arrays = jax.tree.map(_random, (layer.params, layer.inputs))
            outputs = jax.eval_shape(layer.function, *arrays)
            arrays = (*arrays, jax.tree.map(_random, outputs))
            calls = [jax.jit(function) for function in forward_and_backward(layer)]
            times = [measure.median_seconds(partial(call, *arrays), setting.rounds) for call in calls]
            operations = [measure.flops(call.trace(*arrays)) for call in calls]
            for which, i in (("forward", 0), ("backward", 1)):
                records.append({
                    "layer": layer.name, "pass": which, "dtype": dtype, "bytes": least_bytes(layer)[i],
                    "flops": operations[i] - i * operations[0], "seconds": max(times[i] - i * times[0], 1e-9),
                })  # fmt: skip
        records.append(_update(model, setting) | {"dtype": dtype})
    rates = measure.rates(setting.dtypes, setting.rounds, rates)
    return {"batch": batch, "shape": setting.shape, "rates": rates, "layers": records}


def _random(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.normal(jax.random.key(x.size), x.shape).astype(x.dtype)


def _update(model: AlexNet, setting: Setting) -> dict[str, Any]:
    optimizer = paper_sgd()
    params = create_state(model, optimizer, setting.shape, 0).params
    gradients, opt_state = jax.tree.map(jnp.ones_like, params), optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, gradients):
        updates, opt_state = optimizer.update(gradients, opt_state, params, learning_rate=1e-4)
        return optax.apply_updates(params, updates), opt_state

    operations = measure.flops(update.trace(params, opt_state, gradients))

    def step():
        nonlocal params, opt_state
        params, opt_state = update(params, opt_state, gradients)
        return params

    seconds = measure.median_seconds(step, setting.rounds)
    return {
        "layer": "update", "pass": "update", "seconds": seconds, "flops": operations, "bytes": 5 * measure.size(params)
    }  # fmt: skip
