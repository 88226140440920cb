"""A linear probe: fc8 alone is trained, on the outputs of the layer before it, which are computed once.

They are those of the center crops: a probe has no random crops, flips or PCA lighting. Dropout of these outputs, where
the variant has it, is drawn in each step.
"""

import dataclasses
import logging
import time
from functools import cache
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from alexnet_jax import sharding
from alexnet_jax.data.dataset import Batches
from alexnet_jax.data.in_memory import DeviceBatches, DeviceData, Examples
from alexnet_jax.inference import batch_size, jit_forward
from alexnet_jax.model import AlexNet, Dense, activations, tower_devices
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.setup import Setup
from alexnet_jax.trained_layers import layers_of
from alexnet_jax.variants import VARIANTS

log = logging.getLogger(__name__)


class Head(AlexNet):
    """fc8 of an AlexNet with the dropout before it: from the outputs of the layer before it, [B, …], to logits.

    Its fields are those of the network, and it takes the same parameters.
    """

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:  # type: ignore[override]
        devices = tower_devices(self.tower_axis)
        x = features.astype(self.dtype)
        if devices > 1:  # as in the whole network, this device has the outputs of its tower
            part = x.shape[-1] // devices
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(self.tower_axis) * part, part, axis=-1)
        towers, layer = [x], layers_of(self.widths)[-2]
        if layer.startswith("fc") and not VARIANTS[self.variant].dropout_on_inputs:
            towers = self._dropout(layer, towers, train)
        return Dense(gather_outputs=True, **self._fields("fc8"))(towers).astype(jnp.float32)


@flax.struct.dataclass
class Unchanged:
    """The preprocessing of features, with the interface of `preprocess.Preprocess`: none."""

    def train(self, key: jax.Array, features: jax.Array, first: Any = 0, dtype: Any = None) -> jax.Array:
        """Return the features."""
        return features

    def center_crop(self, features: jax.Array) -> jax.Array:
        """Return the features."""
        return features


def is_probe(run: Setup) -> bool:
    """Return whether fc8 is the only layer that is trained."""
    return set(run.rates) - run.frozen == {"fc8"}


def on_features(run: Setup, params: Any) -> Setup:
    """Return a probe's run with the features of its training and validation set in place of their images.

    Its network is a `Head` for the same parameters. The features are in memory: 16 kB for an image's fc7.
    """
    started, layer = time.monotonic(), _last_output(run.model)
    size = batch_size(min(run.sizes["train"], 500), False, run.mesh)
    train = _features(run, params, layer, run.dataset.batches(run.train_split, size, run.mesh), run.sizes["train"])
    validation = _features(run, params, layer, run.validation_data, run.sizes["validate"])
    log.info(
        "linear probe on %s of the center crops: %s images in %.1f s", layer,
        f"{run.sizes['train'] + run.sizes['validate']:,}", time.monotonic() - started,
    )  # fmt: skip
    fields = {name: getattr(run.model, name) for name in AlexNet.__dataclass_fields__ if name not in ("parent", "name")}
    preprocess: Any = Unchanged()
    return dataclasses.replace(
        run,
        model=Head(**fields),
        preprocess=preprocess,
        train_data=DeviceData(train, run.batch_size, run.mesh),
        validation_data=DeviceBatches(validation, run.validation_data.batch_size, run.mesh),
    )


def _last_output(model: AlexNet) -> str:
    """Return the name of the output that fc8 takes."""
    layer = layers_of(model.widths)[-2]
    return layer if layer.startswith("fc") else "pool5"


def _features(run: Setup, params: Any, layer: str, batches: Batches, size: int) -> Examples:
    """Return the outputs of a layer on a split, as [N, …], with its labels."""
    outputs, labels = [], []
    for images, batch_labels in batches:
        x = _program()(params, images, run.preprocess, model=run.model, layer=layer, mesh=run.mesh)
        x, batch_labels = multihost_utils.process_allgather((x, batch_labels), tiled=True)
        outputs.append(np.asarray(x))
        labels.append(np.asarray(batch_labels))
    return Examples(np.concatenate(outputs)[:size], np.concatenate(labels)[:size])


def _outputs_on_mesh(params, images, preprocess: Preprocess, *, model: AlexNet, layer: str, mesh):
    sharded = model.clone(data_axis=sharding.DATA, tower_axis=sharding.TOWER)

    def outputs(params, images):  # of this device's part of the batch, and of its towers
        return activations(sharded, params, preprocess.center_crop(images))[layer]

    specs = PartitionSpec(sharding.DATA, *([None] * 2 if layer == "pool5" else []), sharding.TOWER)
    return jax.shard_map(
        outputs, mesh=mesh, in_specs=(sharding.tower_specs(params), sharding.BATCH), out_specs=specs
    )(params, images)  # fmt: skip


@cache
def _program():
    return jit_forward(_outputs_on_mesh, static_argnames=("model", "layer", "mesh"))
