"""Caffe's AlexNet, which several frameworks have in files of their own: its order of layers, and its preparation."""

from collections.abc import Sequence

import numpy as np

from alexnet_jax.model import AlexNet
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.weights.description import Params, Source, Weights, WeightsError
from alexnet_jax.weights.layouts import CAFFE_MEAN, constant_mean, widths

ORDER = ["conv", "lrn", "pool", "conv", "lrn", "pool", "conv", "conv", "conv", "pool", "dense", "dense", "dense"]
CROP = 227
STEM, POOL, LRN = (4, 0), (3, 2), (5, 1e-4, 0.75, 1.0)  # stride and padding; window and stride; n, α, β, k


def check_order(kinds: Sequence[str]) -> None:
    """Raise WeightsError unless the layers, those in `ORDER` alone, come in AlexNet's order."""
    if list(kinds) != ORDER:
        caffenet = " (CaffeNet's, which pools before it normalizes)" if list(kinds)[1:3] == ["pool", "lrn"] else ""
        found = " ".join(kinds)[:150] + caffenet
        raise WeightsError(f"not an AlexNet: its layers are {found or 'none'}; expected {' '.join(ORDER)}")


def check_lrn(size: float, alpha: float, beta: float, k: float) -> None:
    """Raise WeightsError unless the constants of LRN, α before it is divided by n, are AlexNet's."""
    if not np.allclose((size, alpha, beta, k), LRN, rtol=1e-5):
        found = f"n={size:g}, α={alpha:g}, β={beta:g}, k={k:g}"
        raise WeightsError(f"not an AlexNet: LRN with {found}; expected n=5, α=0.0001, β=0.75, k=1")


def caffe_weights(
    params: Params, source: Source, mean: np.ndarray | None = None, class_names: tuple[str, ...] | None = None
) -> Weights:
    """Return Caffe's network with parameters that take RGB.

    Args:
      source, class_names: as in `Weights`.
      mean: the mean image [H, W, 3] in RGB; None: Caffe's mean color of ImageNet, at 256×256.

    Raises:
      WeightsError: parameters of another network, or a mean image smaller than the crop.
    """
    inputs, conv1 = params["conv2"]["kernel"].shape[2], params["conv1"]["bias"].size
    if inputs not in (conv1, conv1 // 2):
        raise WeightsError(f"not an AlexNet: conv2 takes {inputs} channels of conv1's {conv1}; expected all or half")
    if mean is not None and (mean.ndim != 3 or min(mean.shape[:2]) < CROP or mean.shape[2] != 3):
        raise WeightsError(f"a mean image of {'×'.join(map(str, mean.shape))}; expected 256×256×3")
    return Weights(
        model=AlexNet(
            num_classes=params["fc8"]["bias"].size, variant="caffe", towers=conv1 // inputs, widths=widths(params)
        ),
        params=params,
        preprocess=Preprocess(
            mean=constant_mean(CAFFE_MEAN) if mean is None else np.ascontiguousarray(mean, np.float32),
            pad=0, crop=CROP, resize=0, flip=True, lighting=None, scale=1.0,
        ),
        resizing="caffe",
        class_names=class_names,
        source=source,
    )  # fmt: skip
