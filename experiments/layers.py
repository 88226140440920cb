"""The layers of the network, each on its own: what it computes, and what it must compute and move for that."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from alexnet_jax import AlexNet, activations, dropout, local_response_norm, max_pool
from alexnet_jax.model import LAYERS, OUTPUTS
from alexnet_jax.variants import VARIANTS
from experiments import measure


class Layer(NamedTuple):
    """A layer as the network calls it: `function(params, inputs)`, and the shapes of both."""

    name: str
    function: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    input_gradient: bool = True  # conv1's inputs are the images


def layers_of(model: AlexNet, batch: int, shape: tuple[int, int, int]) -> list[Layer]:
    """The layers of the paper's form, each with its ReLU, fc6 and fc7 with their dropout; images are [H, W, C]."""
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    shapes = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    variant, seen = VARIANTS[model.variant], {}

    def keep(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.name in LAYERS:
            seen[context.module.name] = context.module.clone(parent=None), shapes(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        maps = jax.eval_shape(partial(activations, model), params, images)

    def towers(of):
        return [jax.ShapeDtypeStruct((*of.shape[:-1], of.shape[-1] // model.towers), of.dtype)] * model.towers

    def learned(name, params, inputs):
        x = jax.tree.map(nn.relu if name != "fc8" else lambda x: x, seen[name][0].apply({"params": params}, inputs))
        return dropout(jax.random.key(0), x) if name in ("fc6", "fc7") else x

    def fixed(function, params, inputs):
        return [function(x) for x in inputs]

    found = []
    for before, name in zip(("images", *OUTPUTS), OUTPUTS, strict=False):
        if name in LAYERS:
            found.append(Layer(name, partial(learned, name), params[name], seen[name][1], name != "conv1"))
        else:
            norm = lambda x: local_response_norm(x, *variant.lrn)  # noqa: E731
            function = partial(fixed, norm if name.startswith("norm") else max_pool)
            found.append(Layer(name, function, {}, towers(maps[before])))
    return found


def forward_and_backward(layer: Layer) -> tuple[Callable, Callable]:
    """Functions of (params, inputs, gradient of the outputs): the outputs; the outputs and the gradients."""

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
    """What a layer must read and write, forward and backward, if each array moves once."""
    outputs = jax.eval_shape(layer.function, layer.params, layer.inputs)
    params, x, y = measure.size(layer.params), measure.size(layer.inputs), measure.size(outputs)
    return params + x + y, 2 * params + x + y + x * layer.input_gradient


def step_bytes(model: AlexNet, batch: int, shape: tuple[int, int, int]) -> dict[str, int]:
    """The least bytes of a training step and of inference: all layers', and reading and writing for the update."""
    each = [(least_bytes(layer), measure.size(layer.params)) for layer in layers_of(model, batch, shape)]
    forward, backward = (sum(bytes_[i] for bytes_, _ in each) for i in (0, 1))
    # Parameters and velocities are read and written, gradients read.
    return {"training": forward + backward + 5 * sum(params for _, params in each), "inference": forward}
