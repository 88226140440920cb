"""A network of the variant `torchvision` as torchvision's own state dict, in a .safetensors file."""

import json
from pathlib import Path

import numpy as np

from alexnet_jax.model import AlexNet
from alexnet_jax.weights.description import Weights, WeightsError, parameter_shapes
from alexnet_jax.weights.safetensors_file import write_safetensors

KEYS = {
    "conv1": "features.0", "conv2": "features.3", "conv3": "features.6", "conv4": "features.8", "conv5": "features.10",
    "fc6": "classifier.1", "fc7": "classifier.4", "fc8": "classifier.6",
}  # fmt: skip
FIELDS = ("variant", "stem", "widths", "towers", "activation", "pool_window")
DEVIATION = np.array((58.395, 57.12, 57.375))  # of torchvision's images, pixels in 0 to 255


def write_torch(weights: Weights, path: Path) -> None:
    """Write `state_dict` to a file that `safetensors.torch.load_file` reads, the complete file or nothing.

    Its metadata has `mean`, three numbers for pixels in 0 to 1, and `class_names`, each as JSON.

    Raises:
      WeightsError: as `state_dict`.
      OSError: the file cannot be written.
    """
    tensors = state_dict(weights)
    mean = np.asarray(weights.preprocess.mean, np.float64).mean((0, 1)) / 255
    metadata = {"format": "pt", "mean": json.dumps([round(x, 6) for x in mean.tolist()])}
    if weights.class_names is not None:
        metadata["class_names"] = json.dumps(weights.class_names)
    write_safetensors(path, tensors, metadata)


def state_dict(weights: Weights) -> dict[str, np.ndarray]:
    """Return the parameters as `torchvision.models.alexnet(num_classes=…)` has them.

    conv1's kernel takes torchvision's inputs, (pixel / 255 − mean) / deviation: it is multiplied by the deviations, of
    pixels in 0 to 255, and by the scale of the network's own inputs.

    Raises:
      WeightsError: a network that torchvision does not have.
    """
    model = weights.model
    theirs = AlexNet(num_classes=model.num_classes, variant="torchvision")
    for name in FIELDS:
        if (value := getattr(model, name)) != (expected := getattr(theirs, name)):
            expected = tuple(expected) if isinstance(expected, tuple) else expected
            raise WeightsError(f"torchvision's alexnet has {name}={expected!r}, and this network {value!r}")
    expected = parameter_shapes(theirs, (224, 224, 3))
    for layer in ("conv1", "fc6"):  # their inputs depend on the images
        if (shape := weights.params[layer]["kernel"].shape) != (expected_shape := expected[f"{layer}.kernel"]):
            raise WeightsError(
                f"torchvision's alexnet has a kernel {list(expected_shape)} in {layer}, and this network {list(shape)}"
            )
    tensors: dict[str, np.ndarray] = {}
    for layer, key in KEYS.items():
        kernel, bias = weights.params[layer]["kernel"], weights.params[layer]["bias"]
        if layer == "conv1":
            kernel = _times(kernel, (DEVIATION * weights.preprocess.scale)[:, None])
        if layer == "fc6":  # its rows are in the order (H, W, C), in PyTorch (C, H, W)
            kernel = kernel.reshape(6, 6, 256, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)  # HWIO to OIHW, [in, out] to [out, in]
        tensors |= {f"{key}.weight": np.ascontiguousarray(kernel.transpose(axes)), f"{key}.bias": bias}
    return tensors


def _times(kernel: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return float32 products that give the same bits when they are divided by the factor, where there are such."""
    product = (kernel * factor).astype(np.float32)
    inexact = (product / factor).astype(np.float32) != kernel
    for limit in (np.float32(-np.inf), np.float32(np.inf)):
        neighbor = np.nextafter(product, limit)
        exact = (neighbor / factor).astype(np.float32) == kernel
        product = np.where(inexact & exact, neighbor, product)
    return product
