"""The minimum that a layout communicates, from the sizes of the layers."""

from functools import partial

import jax
import jax.numpy as jnp

from alexnet_jax import AlexNet, activations
from alexnet_jax.model import LAYERS, OUTPUTS
from alexnet_jax.sharding import DATA, TOWER
from experiments.sharding.collectives import Collective
from experiments.sharding.layouts import Layout, Rule

READ_BOTH_TOWERS = ("conv3", "fc6", "fc7", "fc8")


def expected(
    layout: Layout, model: AlexNet, shape: tuple[int, ...], batch: int, data: int, tower: int
) -> list[Collective]:
    """Return the collectives that a train step needs in this layout, in the order of `collectives()`.

    Activations and their gradients are in the model's dtype, parameters and their gradients in float32.

    Args:
      shape: [H, W, C] of an image.
      batch: images in a step, over all devices.
      data, tower: the mesh.
    """
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    outputs = jax.eval_shape(partial(activations, model), params, image)
    weight_bytes = {layer: 4 * sum(x.size for x in jax.tree.leaves(leaves)) for layer, leaves in params.items()}
    itemsize, needed, names = jnp.dtype(model.dtype).itemsize, [], [name for name in OUTPUTS if name in outputs]

    def gather(layer, axis, parts, images):  # the activations, and their gradient
        arrays = [names[names.index(layer) - 1]] + ["fc8"] * (layer == "fc8")  # its input; the logits too
        size = sum(itemsize * images * outputs[name].size for name in arrays)
        needed.append(Collective.make("all-gather", layer, axis, False, size, parts))
        needed.append(Collective.make("reduce-scatter", layer, axis, True, size, parts))

    for layer in filter(params.__contains__, LAYERS):
        rule = layout.rule(layer) if layout.rules else Rule("")
        if tower > 1 and layer in READ_BOTH_TOWERS:
            gather(layer, TOWER, tower, batch // data)
        if data > 1 and rule.gather:
            needed.append(Collective.make("all-gather", layer, DATA, False, weight_bytes[layer], data))
            needed.append(Collective.make("reduce-scatter", layer, DATA, True, weight_bytes[layer], data))
        elif data > 1 and rule.kernels:
            gather(layer, DATA, data, batch)
        elif data > 1:
            needed.append(Collective.make("all-reduce", layer, DATA, True, weight_bytes[layer] // tower, data))
    axes = [axis for axis, size in ((DATA, data), (TOWER, tower)) if size > 1]
    if axes:
        needed.append(Collective.make("all-reduce", "metrics", "+".join(axes), False, 8, data * tower))  # loss, error
    return sorted(needed, key=lambda c: (c.backward, (*LAYERS, "metrics").index(c.layer), c.axis, c.kind))
