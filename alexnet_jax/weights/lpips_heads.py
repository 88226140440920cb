"""The heads of LPIPS, from the file `alex.pth` that the packages `lpips` and `torchmetrics` have."""

import hashlib
from pathlib import Path

import numpy as np

from alexnet_jax.runtime.files import user_path
from alexnet_jax.weights.description import WeightsError
from alexnet_jax.weights.load import opened
from alexnet_jax.weights.read_torch import arrays_of, check_floats, load_state_dict
from alexnet_jax.weights.stored import whole

EXPECTED = "alex.pth of the package lpips (weights/v0.1) or torchmetrics"
CHANNELS = (64, 192, 384, 256, 256)  # of conv1 … conv5
# Of weights/v0.0/alex.pth, for which the package does not normalize the images.
VERSION_0_0 = "18720f55913d0af89042f13faa7e536a6ce1444a0914e6db9461355ece1e8cd5"
KEYS = tuple(f"lin{i}.model.1.weight" for i in range(5))


def load_lpips_heads(path: str | Path) -> tuple[np.ndarray, ...]:
    """Return the weights of LPIPS for the channels of conv1 … conv5: five arrays [C], float32, for `lpips`.

    Args:
      path: `lpips/weights/v0.1/alex.pth` of the package `lpips`, torchmetrics'
        `functional/image/lpips_models/alex.pth`, which is the same file, or a state dict of `lpips.LPIPS(net="alex")`.
        Nothing of it is executed.

    Raises:
      WeightsError: no such file, or not the heads of AlexNet, or a corrupt file.
    """
    path = user_path(path, "the file of LPIPS heads")
    with np.errstate(all="ignore"), opened(path, EXPECTED) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == VERSION_0_0:
            raise WeightsError(f"the heads of version 0.0; expected {EXPECTED}")
        try:
            state_dict = load_state_dict(whole(file))
        except WeightsError as error:
            raise WeightsError(f"not the heads of LPIPS ({error}); expected {EXPECTED}") from None
        if missing := [key for key in KEYS if key not in state_dict]:
            raise WeightsError(f"not the heads of LPIPS: {missing[0]} is missing; expected {EXPECTED}")
        arrays = arrays_of({key: state_dict[key] for key in KEYS})
        check_floats(arrays)
        for (key, x), channels in zip(arrays.items(), CHANNELS, strict=True):
            if x.shape != (1, channels, 1, 1):
                shape = "×".join(map(str, x.shape))
                raise WeightsError(f"not AlexNet's heads: {key} is {shape}; expected 1×{channels}×1×1: {EXPECTED}")
        heads = tuple(x.read().astype(np.float32, copy=False).reshape(-1) for x in arrays.values())
        if not all(np.isfinite(head).all() for head in heads):
            raise WeightsError("it holds values that are not finite; the file cannot be used")
        return heads
