"""A network as one StableHLO program for CPU, CUDA and TPU, which JAX runs without this package."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from alexnet_jax.ops import OPS
from alexnet_jax.runtime.files import replaced
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.weights.description import Weights

PLATFORMS = ("cpu", "cuda", "tpu")


@run_settings()
def write_stablehlo(weights: Weights, path: Path, with_preprocessing: bool = False) -> None:
    """Write a network without dropout, with its parameters, as `jax.export` serializes it.

    `jax.export.deserialize(bytes).call(images)` gives float32 logits [B, num_classes], for any batch size B.

    Args:
      path: is written completely or not at all.
      with_preprocessing: whether `images` is uint8 [B, H, W, C], of which the program takes the center crop; or the
        network's inputs, float32 [B, H, W, C], (pixel − mean) × scale.

    Raises:
      OSError: the file cannot be written.
    """
    preprocess = weights.preprocess
    # OPS has each platform's implementation in the program. On a CPU it takes half the time of PLAIN for one image, and
    # the kernels of CUDA would need to know the batch size.
    model = weights.model.clone(ops=OPS)

    def alexnet(images):
        inputs = preprocess.center_crop(images) if with_preprocessing else images
        return model.apply({"params": weights.params}, inputs)

    (batch,) = export.symbolic_shape("batch")
    shape, dtype = (preprocess.mean.shape, jnp.uint8) if with_preprocessing else (preprocess.image_shape, jnp.float32)
    images = jax.ShapeDtypeStruct((batch, *shape), dtype)
    content = export.export(jax.jit(alexnet), platforms=PLATFORMS)(images).serialize()
    with replaced(path) as temporary:
        temporary.write_bytes(content)
