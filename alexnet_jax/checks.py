"""Checks of a network's fields, shared by `model.AlexNet` and the configs."""

import math
from collections.abc import Sequence
from typing import Any

from alexnet_jax.variants import ACTIVATIONS, LAYERS, VARIANTS

OPERATIONS = {"relu", "lrn", "contrast_norm", "pool"}  # those of a variant's order


def check_network(network: Any) -> None:
    """Check the fields of a network.

    Args:
      network: an `AlexNet` or a config, whose fields `variant`, `stem`, `widths`, `towers`, `activation`, `lrn_alpha`,
        `pool_window`, `dropout`, `kernel_std` and `bias` are read.

    Raises:
      ValueError: "FIELD=VALUE: expected …" for the first field with a value that no image size could make right.
    """

    def require(name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"{name}={getattr(network, name)!r}: expected {expected}")

    require("variant", network.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
    for layer in LAYERS[:5]:
        order = getattr(VARIANTS[network.variant], layer)
        if unknown := set(order.split()) - OPERATIONS:
            raise ValueError(
                f"VARIANTS[{network.variant!r}].{layer}={order!r}: unknown operation {min(unknown)!r}; expected "
                f"some of {', '.join(sorted(OPERATIONS))}"
            )
    stem = len(network.stem) == 3 and all(
        isinstance(x, int) and x >= least for x, least in zip(network.stem, (1, 1, 0), strict=True)
    )
    require("stem", stem, "(kernel, stride, padding), with kernel and stride at least 1 and padding at least 0")
    require("towers", network.towers in (1, 2), "1 or 2")
    numbers = all(isinstance(w, int) for w in network.widths)
    if network.towers == 2:
        widths = numbers and all(w >= 2 and w % 2 == 0 for w in network.widths)
        require("widths", widths and len(network.widths) == 7, "seven even numbers (conv1 to conv5, fc6, fc7)")
    else:
        widths = numbers and len(network.widths) == 7 and network.widths[0] >= 1 and min(network.widths) >= 0
        takes = "seven numbers, of which 0 leaves out a layer after conv1 (conv1 to conv5, fc6, fc7)"
        require("widths", widths, takes)
    require("activation", network.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
    alpha, std, bias = network.lrn_alpha, network.kernel_std, network.bias
    own = "or None for that of the variant"
    require("lrn_alpha", alpha is None or 0 < alpha < math.inf, f"a positive number, {own}")
    require("pool_window", network.pool_window >= 2, "2 or more")
    require("dropout", 0 <= network.dropout < 1, "a rate of at least 0 and below 1")
    positive = std is None or _finite(std) and min(std) > 0
    require("kernel_std", positive, f"eight positive numbers (conv1 to fc8), {own}")
    require("bias", bias is None or _finite(bias), f"eight numbers (conv1 to fc8), {own}")


def _finite(values: Sequence[Any]) -> bool:
    return len(values) == len(LAYERS) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def check_images(network: Any, shape: tuple[int, ...]) -> None:
    """Check that a network, as in `check_network`, can take images of that shape, [B, H, W, C].

    Raises:
      ValueError: images that are not 4-D, or from which three poolings leave nothing.
    """
    if len(shape) != 4:
        raise ValueError(f"images of shape {shape}: expected [B, H, W, C]")
    (kernel, stride, padding), window = network.stem, network.pool_window
    size = min(shape[1:3]) + 2 * padding - kernel
    maps = 1 + (size + (stride - 1) * VARIANTS[network.variant].ceil_mode) // stride
    for _ in range(3):
        maps = (maps - window) // 2 + 1
    if maps < 1:
        raise ValueError(
            f"images of {shape[1]}×{shape[2]}: too small for a {kernel}×{kernel} stem of stride {stride} and three "
            f"poolings of pool_window={window}, stride 2; use larger images, a smaller stem or window"
        )


def check_tower_devices(network: Any, devices: int) -> None:
    """Check that the towers of a network, as in `check_network`, can be split over that number of devices, 1 or 2.

    Raises:
      ValueError: they must stay on one device.
    """
    if network.towers % devices:
        raise ValueError(f"towers={network.towers}: expected 2 on two devices; a single tower stays on one")
    if VARIANTS[network.variant].lrn_across_towers and devices > 1:
        raise ValueError(f"variant={network.variant!r}: expected another on two devices; its LRN runs over both towers")
