"""Top-1 and top-5 error on the central patch or on the paper's ten (section 4.1)."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from alexnet_jax import sharding
from alexnet_jax.preprocess import Preprocess


class Evaluation(NamedTuple):
    """Over one set: errors as fractions, and confusion[label, prediction] as counts."""

    loss: float
    top1_error: float
    top5_error: float
    confusion: np.ndarray


def predict(model: nn.Module, params: Any, images: jax.Array, preprocess: Preprocess, ten_crop: bool) -> jax.Array:
    """Class probabilities [B, K] of uint8 images [B, H, W, C]: of the central patch, or the mean over ten."""
    if not ten_crop:
        return jax.nn.softmax(model.apply({"params": params}, preprocess.center(images)))
    patches = preprocess.ten(images)
    logits = model.apply({"params": params}, patches.reshape(-1, *patches.shape[2:]))
    return jax.nn.softmax(logits).reshape(*patches.shape[:2], -1).mean(axis=1)


@partial(jax.jit, static_argnames=("model", "pad", "crop", "resize", "scale", "ten_crop", "batch_size", "mesh"))
def _count(params, images, labels, start, mean, *, model, pad, crop, resize, scale, ten_crop, batch_size, mesh):
    here = model.clone(data_axis=sharding.DATA, tower_axis=sharding.TOWER)
    preprocess = Preprocess(mean, pad, crop, resize, flip=False, lighting=None, scale=scale)
    size = batch_size // mesh.shape[sharding.DATA]

    def count_part(params, images, labels, start):  # on each device, its part of the batch
        place = start + lax.axis_index(sharding.DATA) * size + jnp.arange(size)
        weight = (place < labels.shape[0]).astype(jnp.int32)  # the last batch is filled up with examples of weight 0
        place = jnp.minimum(place, labels.shape[0] - 1)
        images, labels = images[place], labels[place]
        probabilities = lax.pmean(predict(here, params, images, preprocess, ten_crop), sharding.TOWER)  # equal on both
        true = jnp.take_along_axis(probabilities, labels[:, None], axis=1)
        # An equal probability counts against the network, and so does one that is not a number.
        rank = jnp.sum(~(probabilities < true), axis=1) - 1
        classes = probabilities.shape[1]
        counts = {
            "loss": jnp.sum(-jnp.log(jnp.maximum(true[:, 0], 1e-30)) * weight),
            "top1": jnp.sum((rank >= 1) * weight),
            "top5": jnp.sum((rank >= 5) * weight),
            "confusion": jnp.zeros((classes, classes), jnp.int32)
            .at[labels, jnp.argmax(probabilities, axis=1)]
            .add(weight),
        }
        return lax.psum(counts, sharding.DATA)

    everywhere = sharding.REPLICATED
    return jax.shard_map(
        count_part, mesh=mesh, in_specs=(sharding.tower_specs(params), everywhere, everywhere, everywhere),
        out_specs=everywhere,
    )(params, images, labels, start)  # fmt: skip


def evaluate(
    model: nn.Module,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    preprocess: Preprocess,
    ten_crop: bool = False,
    batch_size: int = 500,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Errors over a whole set, each example counted once.

    Args:
      images: uint8 [N, H, W, C].
      labels: int [N].
      ten_crop: whether to average the softmax over ten patches.
      batch_size: patches through the network at a time, about.
      mesh: of `sharding.make_mesh`; None for one device.
    """
    mesh = mesh or sharding.one_device()
    params = sharding.place(params, mesh, sharding.tower_specs(params))
    images, labels = sharding.place((images, labels), mesh)
    size, data_parts = len(labels), mesh.shape[sharding.DATA]
    batch = min(max(1, batch_size // 10) if ten_crop else batch_size, size)
    batch = -(-batch // data_parts) * data_parts
    counts = [
        _count(params, images, labels, start, preprocess.mean, model=model, pad=preprocess.pad, crop=preprocess.crop,
               resize=preprocess.resize, scale=preprocess.scale, ten_crop=ten_crop, batch_size=batch, mesh=mesh)
        for start in range(0, size, batch)
    ]  # fmt: skip
    total = jax.tree.map(lambda *x: np.sum([np.asarray(i, np.float64) for i in x], axis=0), *counts)
    return Evaluation(
        float(total["loss"] / size), float(total["top1"] / size), float(total["top5"] / size),
        total["confusion"].astype(np.int64),
    )  # fmt: skip
