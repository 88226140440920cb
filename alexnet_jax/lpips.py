"""LPIPS, the perceptual distance of Zhang, Isola, Efros, Shechtman and Wang (2018), on AlexNet.

"The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018. It is version 0.1 of the authors'
package `lpips`, with `net="alex"`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.ops import PLAIN
from alexnet_jax.variants import IMAGENET_MEAN

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
KERNELS = (11, 5, 3, 3, 3)
STRIDES, PADDINGS = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)
SMALLEST = 31  # pixels: the second pooling then has one window
EPSILON = 1e-10  # is added to the norms


def lpips(params: Any, heads: Sequence[jax.Array], a: jax.Array, b: jax.Array, spatial: bool = False) -> jax.Array:
    """Return the LPIPS distance of pairs of images: 0 for equal ones, about 0.7 for unrelated photographs.

    The outputs of conv1 … conv5, after ReLU, are divided by their norm over the channels. The squared differences of
    the two images are summed over the channels with the weights of the heads, averaged over the positions, and summed
    over the layers.

    Every transformation of JAX works on it. The gradient is finite, also for equal images, where it is zero up to
    rounding. Products are in float32, also on devices whose default is less.

    Args:
      params: `{layer: {"kernel", "bias"}}` of conv1 … conv5 of the variant `torchvision`, as `load_weights` returns
        them for torchvision's file, the deviations in conv1; other layers are not read.
      heads: five arrays [C], one for each layer, as `load_lpips_heads` returns them.
      a, b: floats [..., H, W, 3] from −1 to 1, RGB, with H and W of at least 31.
      spatial: whether to return a map: the layers' maps, resized to H×W bilinearly, in place of their means.

    Returns:
      [...], or with `spatial` [..., H, W], float32.

    Raises:
      ValueError: images of different or other shapes, or of integers; parameters or heads of another network.
    """
    _check_images(a, b)
    _check_network(params, heads)
    convolutions = [(params[layer]["kernel"], params[layer]["bias"]) for layer in LAYERS]
    return _lpips(convolutions, list(heads), a, b, spatial)


def _check_array(name: str, x: Any) -> None:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"lpips: {name} is of the type {type(x).__name__}; expected an array")


def _check_images(a: Any, b: Any) -> None:
    _check_array("a", a)
    _check_array("b", b)
    shape = jnp.shape(a)
    if shape != jnp.shape(b):
        raise ValueError(f"lpips: images of the shapes {shape} and {jnp.shape(b)}; expected the same shape")
    if len(shape) < 3 or shape[-1] != 3:
        raise ValueError(f"lpips: images of the shape {shape}; expected [..., H, W, 3], RGB")
    if min(shape[-3:-1]) < SMALLEST:
        raise ValueError(f"lpips: images of {shape[-3]}×{shape[-2]}; expected at least {SMALLEST}×{SMALLEST}")
    for dtype in (jnp.result_type(a), jnp.result_type(b)):
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"lpips: images of {dtype}; expected floats from −1 to 1: images / 127.5 − 1")


def _check_network(params: Any, heads: Sequence[Any]) -> None:
    if not isinstance(params, Mapping):
        raise ValueError(f"lpips: parameters of the type {type(params).__name__}; expected a dict, as weights.params")
    if isinstance(heads, str | Path):
        raise ValueError(f"lpips: heads={str(heads)!r}; expected arrays: load_lpips_heads({str(heads)!r})")
    if not isinstance(heads, Sequence):
        raise ValueError(f"lpips: heads of the type {type(heads).__name__}; expected five arrays: load_lpips_heads(…)")
    for i, head in enumerate(heads):
        _check_array(f"heads[{i}]", head)
    channels = 3
    for layer, side in zip(LAYERS, KERNELS, strict=True):
        if layer not in params:
            raise ValueError(f"lpips: the parameters have no {layer}; expected conv1 to conv5")
        if not isinstance(params[layer], Mapping) or not {"kernel", "bias"} <= set(params[layer]):
            raise ValueError(f'lpips: the parameters of {layer} are no dict of "kernel" and "bias", as weights.params')
        for name in ("kernel", "bias"):
            _check_array(f"the {name} of {layer}", params[layer][name])
        shape = jnp.shape(params[layer]["kernel"])
        if shape[:3] != (side, side, channels) or len(shape) != 4:
            raise ValueError(
                f"lpips: the kernel of {layer} is {shape}; expected ({side}, {side}, {channels}, …), as in the variant "
                "torchvision"
            )
        channels = shape[3]
    sizes = [jnp.shape(params[layer]["bias"]) for layer in LAYERS]
    if [jnp.shape(head) for head in heads] != sizes:
        raise ValueError(f"lpips: heads of the shapes {[jnp.shape(head) for head in heads]}; expected {sizes}")


@partial(jax.jit, static_argnames="spatial")
def _lpips(convolutions, heads, a, b, spatial):
    *batch, height, width, _ = a.shape
    convolutions, heads, a, b = jax.tree.map(lambda x: x.astype(jnp.float32), (convolutions, heads, a, b))
    images = jnp.stack([a, b]).reshape(-1, height, width, 3)
    x = 127.5 * (images + 1) - jnp.array(IMAGENET_MEAN, jnp.float32)
    distances = []
    for i, (kernel, bias) in enumerate(convolutions):
        padding = ((PADDINGS[i],) * 2,) * 2
        x = jax.nn.relu(PLAIN.conv(x, kernel, STRIDES[i], padding, lax.Precision.HIGHEST) + bias)
        first, second = jnp.split(_normalized(x), 2)
        distances.append(jnp.einsum("bhwc,c->bhw", (first - second) ** 2, heads[i], precision=lax.Precision.HIGHEST))
        if i < 2:
            x = PLAIN.max_pool(x, 3, 2)
    if not spatial:
        return jnp.stack([d.mean((1, 2)) for d in distances]).sum(0).reshape(batch)
    maps = [jax.image.resize(d, (len(d), height, width), "linear") for d in distances]
    return jnp.stack(maps).sum(0).reshape(*batch, height, width)


def _normalized(x):
    """Return x divided by its norm over the channels; the gradient is finite where all channels are zero."""
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    return x / (norm + EPSILON)
