"""Top-1 and top-5 error on the center crop or on ten crops (section 4.1), of one network or several averaged."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from alexnet_jax import sharding
from alexnet_jax.data.batch import Batch
from alexnet_jax.preprocess import Preprocess


class Network(NamedTuple):
    """A network with its parameters and its preprocessing."""

    model: nn.Module
    params: Any
    preprocess: Preprocess


class Evaluation(NamedTuple):
    """The result over one split: errors as fractions, and confusion[label, prediction] as counts."""

    loss: float
    top1_error: float
    top5_error: float
    confusion: np.ndarray


def predict(model: nn.Module, params: Any, images: jax.Array, preprocess: Preprocess, ten_crop: bool) -> jax.Array:
    """Return class probabilities [B, K] of uint8 images [B, H, W, C]: of the center crop, or the mean of ten-crops."""
    if not ten_crop:
        logits: Any = model.apply({"params": params}, preprocess.center_crop(images))
        return jax.nn.softmax(logits)
    crops = preprocess.ten_crop(images)
    logits = model.apply({"params": params}, crops.reshape(-1, *crops.shape[2:]))
    return jax.nn.softmax(logits).reshape(*crops.shape[:2], -1).mean(axis=1)


def jit_forward(function: Callable, **options) -> Callable:
    """Return `jax.jit` of a forward pass, on a CPU without YNNPACK's kernels: they are slow for small batches."""
    cpu = jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""} if cpu else None, **options)


@cache
def _predict_program():
    return jit_forward(predict_on_mesh, static_argnames=("model", "ten_crop", "mesh"))


def predict_on_mesh(
    params: Any, images: jax.Array, preprocess: Preprocess, *, model: nn.Module, ten_crop: bool, mesh: Mesh
) -> jax.Array:
    """Return `predict` of whole arrays on the mesh, as `evaluate` compiles it; the batch stays split."""
    sharded_model = model.clone(data_axis=sharding.DATA, tower_axis=sharding.TOWER)

    def predict_part(params, images):  # on each device, its part of the batch
        return lax.pmean(predict(sharded_model, params, images, preprocess, ten_crop), sharding.TOWER)  # equal on both

    return jax.shard_map(
        predict_part, mesh=mesh, in_specs=(sharding.tower_specs(params), sharding.BATCH), out_specs=sharding.BATCH
    )(params, images)


@partial(jax.jit, static_argnames="mesh")
def _count(predictions, labels, *, mesh):
    def count_part(predictions, labels):
        probabilities = sum(predictions) / len(predictions)
        weight = (labels >= 0).astype(jnp.int32)
        labels = jnp.maximum(labels, 0)
        true = jnp.take_along_axis(probabilities, labels[:, None], axis=1)
        # Classes of equal probability, or of one that is not a number, rank above the label.
        rank = jnp.sum(~(probabilities < true), axis=1) - 1
        classes = probabilities.shape[1]
        counts = {
            "examples": jnp.sum(weight),
            "loss": jnp.sum(-jnp.log(jnp.maximum(true[:, 0], 1e-30)) * weight),
            "top1": jnp.sum((rank >= 1) * weight),
            "top5": jnp.sum((rank >= 5) * weight),
            "confusion": jnp.zeros((classes, classes), jnp.int32)
            .at[labels, jnp.argmax(probabilities, axis=1)]
            .add(weight),
        }
        return lax.psum(counts, sharding.DATA)

    return jax.shard_map(
        count_part, mesh=mesh, in_specs=(sharding.BATCH, sharding.BATCH), out_specs=sharding.REPLICATED
    )(predictions, labels)


def evaluate(
    networks: Sequence[Network], batches: Iterable[Batch], ten_crop: bool = False, mesh: Mesh | None = None
) -> Evaluation:
    """Return the errors over a split, each example counted once, of the mean of the networks' softmax (section 6).

    Args:
      batches: of one size, split over the mesh, each example once; those of label −1 are not counted.
      ten_crop: whether to average the softmax over the ten-crop, of five crops if training has no flips.
      mesh: of `sharding.make_mesh`; None for one device.

    Raises:
      ValueError: no example has a label.
    """
    mesh = mesh or sharding.one_device()
    placed = [n._replace(params=sharding.place(n.params, mesh, sharding.tower_specs(n.params))) for n in networks]
    predict_all, total, last = _predict_program(), None, None

    def add(counts):
        counts = jax.tree.map(lambda x: np.asarray(x, np.float64), counts)
        return counts if total is None else jax.tree.map(np.add, total, counts)

    for images, labels in batches:
        predictions = [
            predict_all(params, images, preprocess, model=model, ten_crop=ten_crop, mesh=mesh)
            for model, params, preprocess in placed
        ]
        counts = _count(predictions, labels, mesh=mesh)
        if last is not None:  # the device has its next batch already
            total = add(last)
        last = counts
    total = add(last)
    if not (size := total["examples"]):
        raise ValueError("evaluate: no example with a label; expected at least one")
    return Evaluation(
        float(total["loss"] / size), float(total["top1"] / size), float(total["top5"] / size),
        total["confusion"].astype(np.int64),
    )  # fmt: skip


def batch_size(examples: int, ten_crop: bool, mesh: Mesh, crops: int = 500) -> int:
    """Return the images of a batch: about `crops` pass through the network at a time, in equal parts over the mesh."""
    size, parts = min(crops // 10 if ten_crop else crops, examples), mesh.shape[sharding.DATA]
    return -(-size // parts) * parts
