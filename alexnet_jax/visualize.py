"""What a network responds to: occlusion, gradient saliency, and activation maximization.

Images are inputs of the network, [B, H, W, C] with their mean subtracted, as `Preprocess.center_crop` returns them.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.inference import jit_forward
from alexnet_jax.model import AlexNet
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.variants import BEFORE, LAYERS

BATCH = 256  # occluded images that pass through the network together
BLUR = (0.12, 0.76, 0.12)  # of activation maximization, along rows and columns in each step
DECAY = 0.01  # of the pixels, in each step


@run_settings()
def occlusion(
    model: AlexNet, params: Any, images: np.ndarray | jax.Array, labels: Sequence[int], size: int, stride: int = 1
) -> np.ndarray:
    """Return the probability of a class while a square of an image is hidden (Zeiler and Fergus, 2014).

    The square has the mean color, which is 0 in the network's inputs. Where the probability is low, the network needs
    what the square hides.

    Args:
      images: [B, H, W, C].
      labels: the class of each image [B].
      size: the side of the square, in pixels.
      stride: the pixels between two positions of the square.

    Returns:
      float32 [B, (H − size) // stride + 1, (W − size) // stride + 1]: at [b, i, j] rows and columns from i · stride and
      j · stride are hidden.

    Raises:
      ValueError: a square that is larger than the images or empty; a stride below 1; labels that are not one per image.
    """
    images, labels = jnp.asarray(images, jnp.float32), _labels(images, labels)
    height, width = images.shape[1:3]
    if not 0 < size <= min(height, width) or stride < 1:
        raise ValueError(
            f"occlusion: size={size}, stride={stride} for images of {height}×{width}: expected 1 ≤ size ≤ H, W and a "
            "stride of at least 1"
        )
    tops, lefts = (np.arange(0, side - size + 1, stride) for side in (height, width))
    corners = np.stack(np.meshgrid(tops, lefts, indexing="ij"), axis=-1).reshape(-1, 2)
    padded = np.concatenate([corners, np.repeat(corners[-1:], -len(corners) % min(BATCH, len(corners)), axis=0)])
    parts, program = padded.reshape(-1, min(BATCH, len(corners)), 2), _occlusion_program()
    maps = []
    for image, label in zip(images, labels, strict=True):
        rows = [program(params, image, label, part, model=model, size=size) for part in parts]
        maps.append(np.concatenate(rows)[: len(corners)].reshape(len(tops), len(lefts)))
    return np.stack(maps)


@cache
def _occlusion_program():
    def probabilities(params, image, label, corners, *, model, size):
        def hidden(corner):
            rows, columns = (jnp.arange(side) - first for side, first in zip(image.shape[:2], corner, strict=True))
            inside = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))
            return jnp.where(inside[..., None], 0, image)

        return jax.nn.softmax(model.apply({"params": params}, jax.vmap(hidden)(corners)))[:, label]

    return jit_forward(probabilities, static_argnames=("model", "size"))


@run_settings()
def saliency(model: AlexNet, params: Any, images: np.ndarray | jax.Array, labels: Sequence[int]) -> np.ndarray:
    """Return how much the logit of a class changes with each pixel (Simonyan, Vedaldi and Zisserman, 2014).

    Args:
      images: [B, H, W, C].
      labels: the class of each image [B].

    Returns:
      float32 [B, H, W]: the largest absolute partial derivative over the channels of the pixel.

    Raises:
      ValueError: labels that are not one per image.
    """
    images, labels = jnp.asarray(images, jnp.float32), _labels(images, labels)
    return np.asarray(_saliency_program()(params, images, labels, model=model))


@cache
def _saliency_program():
    def saliency(params, images, labels, *, model):
        def logits(x):  # an image's logits depend on no other image
            return jnp.take_along_axis(model.apply({"params": params}, x), labels[:, None], axis=1).sum()

        return jnp.abs(jax.grad(logits)(images)).max(axis=-1)

    return jax.jit(saliency, static_argnames="model")


def _labels(images, labels):
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"labels of shape {[*labels.shape]} for {len(images)} images: expected [{len(images)}]")
    return labels


@run_settings()
def maximize(
    model: AlexNet,
    params: Any,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    layer: str,
    units: Sequence[int],
    steps: int = 100,
    step_size: float = 1.0,
) -> np.ndarray:
    """Return for each unit an image that activates it strongly, by gradient ascent (Erhan and others, 2009).

    It starts from noise with a standard deviation of `step_size`. Each step adds the gradient, scaled to a root mean
    square that falls from `step_size` to 0, and then decays and blurs the image slightly (Yosinski and others, 2015):
    without this the image would be noise.

    Args:
      key: of `jax.random`, for the noise.
      image_shape: [H, W, C] of the images; for a convolution of any size that is large enough.
      layer: conv1 … conv5, fc6, fc7 or fc8. Its output before the activation is maximized, which has a gradient where
        the activation is 0.
      units: channels of a convolution, each at the center of its map; or units of a fully connected layer.
      step_size: in the scale of the network's inputs.

    Returns:
      float32 [len(units), H, W, C].

    Raises:
      ValueError: no such layer in this network, or no such unit.
    """
    if layer not in LAYERS or layer not in params:
        known = ", ".join(name for name in LAYERS if name in params)
        raise ValueError(f"layer={layer!r}: expected one of {known}")
    count = params[layer]["kernel"].shape[-1]
    if not len(units) or not all(0 <= unit < count for unit in units):
        raise ValueError(f"units={list(units)}: expected some of 0 to {count - 1}, the channels or units of {layer}")
    x = step_size * jax.random.normal(key, (len(units), *image_shape))
    params, step = jax.device_put(params), _ascent_program()
    for number in range(steps):  # not in `lax.fori_loop`, where convolutions are slow on a CPU
        x = step(params, x, np.asarray(units), step_size * (1 - number / steps), model=model, layer=layer)
    return np.asarray(x)


@cache
def _ascent_program():
    def step(params, x, units, length, *, model, layer):
        gradient = jax.grad(lambda x: unit_outputs(model, params, x, layer, units).sum())(x)
        scale = jnp.sqrt(jnp.mean(gradient**2, axis=(1, 2, 3), keepdims=True))
        x = (1 - DECAY) * (x + length * gradient / jnp.maximum(scale, 1e-12))
        for axis in (1, 2):
            x = sum(w * jnp.roll(x, shift, axis) for w, shift in zip(BLUR, (-1, 0, 1), strict=True))
        return x

    return jax.jit(step, static_argnames=("model", "layer"))


def unit_outputs(model: AlexNet, params: Any, images: jax.Array, layer: str, units: np.ndarray) -> jax.Array:
    """Return the output of one unit for each image [B], before the activation: what `maximize` raises.

    Args:
      units: [B], as in `maximize`.
    """
    convolution = layer.startswith("conv")
    logits, state = model.apply(
        {"params": params}, images, convolutions_only=convolution, mutable=["preactivations"]
    )  # fmt: skip
    x = logits if layer == "fc8" else state["preactivations"]["outputs"][f"{layer}{BEFORE}"]
    x = x[:, x.shape[1] // 2, x.shape[2] // 2] if convolution else x
    return jnp.take_along_axis(x, units[:, None], axis=1)[:, 0]
