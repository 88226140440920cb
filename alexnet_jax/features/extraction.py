"""Features: any layer's output by name, in batches of one size."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.features.names import needs_full_size, output_name
from alexnet_jax.inference import jit_forward
from alexnet_jax.model import OUTPUTS, AlexNet
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.variants import BEFORE, LAYERS

BATCH = 32  # images


@run_settings()
def features(
    model: AlexNet,
    params: Any,
    images: np.ndarray,
    layers: Sequence[str],
    batch_size: int = BATCH,
    preprocess: Preprocess | None = None,
) -> dict[str, np.ndarray]:
    """Return the outputs of some layers on images, without dropout.

    One program is compiled for all images of one size. Images of other sizes than in training are
    taken as long as no fully connected layer is asked for.

    Args:
      params: the model's parameters, as `init(...)["params"]`.
      images: [N, H, W, C], the network's inputs; with `preprocess`, uint8.
      layers: names as in `model.OUTPUTS`, "conv3:pre" for an output before its activation, or names of torchvision
        ("features.10") and Caffe ("relu7"), listed in `layer_names`. After its activation is what
        `model.activations` returns; the arrays have its axes, [N, H', W', C'] and [N, units].
      batch_size: images that pass through the network together; the last batch is padded to it.
      preprocess: takes the center crops of the images first.

    Returns:
      For each name float32 [N, …], in the order of `layers`.

    Raises:
      ValueError: no such layer, or images that the network or the layer cannot take.
    """
    images = np.asarray(images)
    call, shapes = extractor(model, params, images.shape[1:], layers, batch_size, preprocess)
    outputs = {name: np.empty((len(images), *shape), np.float32) for name, shape in shapes.items()}
    for start in range(0, len(images), batch_size):
        part = slice(start, min(start + batch_size, len(images)))
        for name, x in call(images[part]).items():
            outputs[name][part] = x
    return outputs


def extractor(
    model: AlexNet,
    params: Any,
    image_shape: tuple[int, ...],
    layers: Sequence[str],
    batch_size: int = BATCH,
    preprocess: Preprocess | None = None,
) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], dict[str, tuple[int, ...]]]:
    """Return a function from up to `batch_size` images to the outputs, and the shape of each, of one image.

    Args:
      image_shape: [H, W, C] of the images.
      model, params, layers, batch_size, preprocess, raises: as in `features`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    if not layers:
        raise ValueError("no layers: expected the name of at least one")
    names = {layer: output_name(layer, model.variant) for layer in layers}
    known = (*OUTPUTS, *(f"{layer}{BEFORE}" for layer in LAYERS[:-1]))
    for layer, name in names.items():
        if name not in known:
            raise ValueError(
                f"layer {layer!r}: expected some of {', '.join(OUTPUTS)}, with {BEFORE} for the output of a "
                "convolution or a fully connected layer before its activation, or names of torchvision or Caffe"
            )
    convolutions_only = not any(map(needs_full_size, names))
    static = dict(model=model, names=tuple(dict.fromkeys(names.values())), convolutions_only=convolutions_only)
    image = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32 if preprocess is None else jnp.uint8)
    if not convolutions_only:
        _check_size(model, params, preprocess, image, layers)
    try:
        shapes = jax.eval_shape(partial(_outputs, **static), params, preprocess, image)
    except KeyError as error:
        layer = next(layer for layer, name in names.items() if name == error.args[0])
        raise ValueError(f"layer {layer!r}: this network has none of this name; its layers are left out") from None
    params = jax.device_put(params)

    def call(images):
        padding = np.repeat(images[-1:], batch_size - len(images), axis=0)
        outputs = _program()(params, preprocess, np.concatenate([images, padding]), **static)
        return {layer: np.asarray(outputs[name])[: len(images)] for layer, name in names.items()}

    return call, {layer: shapes[name].shape[1:] for layer, name in names.items()}


def _check_size(model, params, preprocess, image, layers):
    """Raise ValueError for images of another size than the fully connected layers take."""
    maps = jax.eval_shape(partial(_last_maps, model=model), params, preprocess, image).shape[1:]
    first = next(layer for layer in LAYERS[5:] if layer in params)
    if (inputs := params[first]["kernel"].shape[0]) != np.prod(maps):
        layer = next(layer for layer in layers if needs_full_size(layer))
        raise ValueError(
            f"layer {layer!r}: images of {image.shape[1]}×{image.shape[2]} give {first} {int(np.prod(maps)):,} inputs, "
            f"and it has {inputs:,}; expected images of the size that the network was trained on, or convolutions alone"
        )


def _inputs(preprocess, images):
    return images if preprocess is None else preprocess.center_crop(images)


def _last_maps(params, preprocess, images, *, model):
    return model.apply({"params": params}, _inputs(preprocess, images), convolutions_only=True)


def _outputs(params, preprocess, images, *, model, names, convolutions_only):
    state = model.apply(
        {"params": params}, _inputs(preprocess, images), convolutions_only=convolutions_only,
        mutable=["activations", "preactivations"],
    )[1]  # fmt: skip
    outputs = state["activations"]["outputs"] | state["preactivations"]["outputs"]
    return {name: outputs[name].astype(jnp.float32) for name in names}


@cache
def _program():
    return jit_forward(_outputs, static_argnames=("model", "names", "convolutions_only"))
