"""A network's layers as a table."""

from functools import partial

import jax
import jax.numpy as jnp

from alexnet_jax.model import OUTPUTS, AlexNet, activations
from alexnet_jax.tables import table


def layer_summary(model: AlexNet, image_shape: tuple[int, int, int]) -> str:
    """Return a table of a network's layers for images [H, W, C]: output, kernel, parameters. Computes nothing."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    outputs = jax.eval_shape(partial(activations, model), params, image)
    rows = []
    for name in [name for name in OUTPUTS if name in outputs]:  # JAX sorts the names of a dict
        shape, kernel, count = "×".join(map(str, outputs[name].shape[1:])), "", ""
        if name in params:
            kernel = "×".join(map(str, params[name]["kernel"].shape))
            count = f"{sum(x.size for x in jax.tree.leaves(params[name])):,}"
        rows.append((name, shape, kernel, count))
    rows.append(("total", "", "", f"{sum(x.size for x in jax.tree.leaves(params)):,}"))
    return table(rows, ("layer", "output", "kernel", "parameters"))
