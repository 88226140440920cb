"""The bytes and FLOP that a train step or an inference needs, from the shapes of the network alone.

The rule: each array is written once, and read once by each operation that needs it, in the activations' dtype without
padding. The operations are
- the crop, which reads uint8 pixels and writes the network's inputs,
- a convolution or product, which reads its inputs and its kernel and writes its outputs, after the bias and ReLU,
- ReLU, LRN and pooling together, where a layer has LRN or pooling: one pass each way, that of the backward pass over
  the gradient, the convolution's outputs and their gradient,
- in the backward pass of a layer, ReLU's mask where there is no such pass (the gradient, the outputs, the gradient
  before them), the gradient of the kernel, and that of the inputs, which conv1 does not need,
- the update, which reads a gradient, and reads and writes a float32 parameter and its momentum,
- on several devices, what a collective reads and writes on each: the gathered activations, and float32 gradients.

A multiply-add is two FLOP; only convolutions and products count.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax import AlexNet, activations
from alexnet_jax.model import LAYERS
from experiments.compiled.traffic import INPUT, UPDATE


class Floor(NamedTuple):
    """What a part of the program must move in a device's memory, and compute."""

    bytes: int
    flops: int


def floor(
    model: AlexNet, stored: tuple[int, ...], side: int, batch: int, data: int, tower: int, train: bool
) -> dict[tuple[str, bool], Floor]:
    """Return the floor of one device, for each (layer or part, whether backward).

    Args:
      stored: [H, W, C] of an image as it is stored, in uint8.
      side: of the crop that the network takes.
      batch: images over all devices.
      data, tower: the mesh.
    """
    images = batch // data
    params, outputs = _shapes(model, (side, side, stored[-1]))
    itemsize, floors = jnp.dtype(model.dtype).itemsize, {}
    pixels = side * side * stored[-1]
    floors[INPUT, False] = Floor(images * (pixels + itemsize * pixels), 0)
    x, gathered, weights = images * pixels * itemsize, 0, 0  # the bytes of a layer's inputs
    for layer in LAYERS:
        convolution, number = layer.startswith("conv"), layer.removeprefix("conv")
        after = [outputs[name].size for name in (f"norm{number}", f"pool{number}") if name in outputs]
        if layer not in params:  # it is left out; LRN and pooling remain
            y = images * after[-1] * itemsize // tower if after else x
            floors[layer, False] = Floor((x + y) * bool(after), 0)
            floors[layer, True] = Floor((y + 2 * x) * bool(after) * train, 0)
            x = y
            continue
        kernel, bias = params[layer]["kernel"], params[layer]["bias"]
        inputs = x * tower if layer in ("conv3", "fc6", "fc7", "fc8") and tower > 1 else x
        gathered = inputs + x if inputs > x else 0  # what the all-gather writes and reads
        own = (kernel.size + bias.size) // tower
        z = images * outputs[layer].size * itemsize // tower
        y = images * after[-1] * itemsize // tower if after else z
        rows = outputs[layer].size // outputs[layer].shape[-1]  # positions, each with a product by the kernel
        flops = 2 * images * rows * kernel.size // tower
        weight = own * itemsize
        activate = z + y if after else 0
        floors[layer, False] = Floor(gathered + inputs + weight + z + activate, flops)
        mask = layer != "fc8" and not after
        backward = (y + 2 * z) * bool(after or mask)  # the pass of ReLU, or of ReLU, LRN and pooling
        backward += inputs + z + weight  # of the kernel
        backward += (z + weight + inputs + gathered) * (layer != "conv1")  # of the inputs
        if train:
            floors[layer, True] = Floor(backward, flops * (2 if layer != "conv1" else 1))
            weights += own
        x = y if convolution else z
    if train:
        reduced = 2 * 4 * weights if data > 1 else 0
        floors[UPDATE, False] = Floor(weights * (itemsize + 4 * 4) + reduced, 0)
    return floors


def _shapes(model: AlexNet, shape: tuple[int, ...]) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """Return the shapes of the parameters and of every layer's output on one image."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return params, jax.eval_shape(partial(activations, model), params, image)
