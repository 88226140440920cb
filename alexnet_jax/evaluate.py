"""Top-1 and top-5 error on the central patch or on the paper's ten (section 4.1), of one network or several averaged.

python -m alexnet_jax.evaluate is the command of `evaluation`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import lax
from jax.sharding import Mesh

from alexnet_jax import data, sharding
from alexnet_jax.data import Batch, DeviceBatches
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.stream import StreamedBatches


class Network(NamedTuple):
    """A network with what it learned."""

    model: nn.Module
    params: Any
    preprocess: Preprocess


class Evaluation(NamedTuple):
    """Over one set: errors as fractions, and confusion[label, prediction] as counts."""

    loss: float
    top1_error: float
    top5_error: float
    confusion: np.ndarray


def predict(model: nn.Module, params: Any, images: jax.Array, preprocess: Preprocess, ten_crop: bool) -> jax.Array:
    """Class probabilities [B, K] of uint8 images [B, H, W, C]: of the central patch, or the mean over ten."""
    if not ten_crop:
        return jax.nn.softmax(model.apply({"params": params}, preprocess.center_crop(images)))
    crops = preprocess.ten_crop(images)
    logits = model.apply({"params": params}, crops.reshape(-1, *crops.shape[2:]))
    return jax.nn.softmax(logits).reshape(*crops.shape[:2], -1).mean(axis=1)


def jit_forward(function: Callable, **options) -> Callable:
    """`jax.jit` of a forward pass; on a CPU without the kernels of YNNPACK, which XLA takes there by default."""
    # The whole network at batches of 64 and 8, on two cores: 239 images/s for 231 and 226 for 25 with JAX 0.10.2; with
    # 0.11.2, and XLA's convolutions, 226 for 215 and 211 for 190. A training step gains nothing.
    cpu = jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""} if cpu else None, **options)


@cache
def _predict_program():
    return jit_forward(_predict, static_argnames=("model", "ten_crop", "mesh"))


def _predict(params, images, preprocess, *, model, ten_crop, mesh):
    model = model.clone(data_axis=sharding.DATA, tower_axis=sharding.TOWER)

    def predict_part(params, images):  # on each device, its part of the batch
        return lax.pmean(predict(model, params, images, preprocess, ten_crop), sharding.TOWER)  # equal on both

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
        # An equal probability counts against the network, and so does one that is not a number.
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
    """Errors over a whole set, each example counted once, of the mean of the networks' softmax (section 6).

    Args:
      batches: of one size, split over the mesh, each example once; those of label −1 are not counted.
      ten_crop: whether to average the softmax over ten patches.
      mesh: of `sharding.make_mesh`; None for one device.
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
    size = total["examples"]
    return Evaluation(
        float(total["loss"] / size), float(total["top1"] / size), float(total["top5"] / size),
        total["confusion"].astype(np.int64),
    )  # fmt: skip


def batch_size(examples: int, ten_crop: bool, mesh: Mesh, patches: int = 500) -> int:
    """Images to a batch, so that about `patches` go through the network at a time, in equal parts over the mesh."""
    size, parts = min(patches // 10 if ten_crop else patches, examples), mesh.shape[sharding.DATA]
    return -(-size // parts) * parts


def in_batches(
    config: ml_collections.ConfigDict, builder: Any, split: str, mesh: Mesh, ten_crop: bool = False
) -> DeviceBatches | StreamedBatches:
    """A split for `evaluate`, in memory or streamed as the config says; raises data.DataError."""
    size = batch_size(data.split_size(builder, split), ten_crop, mesh)
    if config.streaming:
        return StreamedBatches(builder, split, size, mesh, config.loader_workers)
    return DeviceBatches(data.load(builder, split), size, mesh)


if __name__ == "__main__":
    from alexnet_jax import evaluation  # which imports this module

    evaluation.main()
