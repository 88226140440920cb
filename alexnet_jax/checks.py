"""Checks of a network's fields, shared by `model.AlexNet` and the configs."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp

from alexnet_jax.ops import Ops
from alexnet_jax.variants import ACTIVATIONS, LAYERS, VARIANTS

OPERATIONS = {"relu", "lrn", "contrast_norm", "pool"}  # those of a variant's order
Rule = tuple[Callable[[Any], bool], str]  # whether a value is valid, and what is expected


def check_network(network: Any) -> None:
    """Check the fields of a network, by type and range.

    Args:
      network: an `AlexNet`, or a config, which has some of its fields.

    Raises:
      ValueError: "FIELD=VALUE: expected …" for the first field with a value that no image size could make right.
    """
    for name, (valid, expected) in _rules(network.towers).items():
        if hasattr(network, name) and not valid(value := getattr(network, name)):
            raise ValueError(f"{name}={value!r}: expected {expected}")
    for layer in LAYERS[:5]:
        order = getattr(VARIANTS[network.variant], layer)
        if unknown := set(order.split()) - OPERATIONS:
            raise ValueError(
                f"VARIANTS[{network.variant!r}].{layer}={order!r}: unknown operation {min(unknown)!r}; expected "
                f"some of {', '.join(sorted(OPERATIONS))}"
            )


def _rules(towers: Any) -> dict[str, Rule]:
    """Return the rule of each field of a network with that value of `towers`."""
    multiple, kind = (1, "numbers") if towers == 1 else (2, "even numbers")
    widths: Rule = (
        lambda x: _all(x, 7, lambda w: _whole(w, 0) and w % multiple == 0) and x[0] > 0,
        f"seven {kind} (conv1 to conv5, fc6, fc7), of which 0 omits a layer after conv1",
    )
    own = "or None for that of the variant"
    return {
        "num_classes": (lambda x: _whole(x, 1), "a whole number of at least 1"),
        "variant": _one_of(VARIANTS),
        "dtype": (_is_float_dtype, "a floating-point dtype"),
        "param_dtype": (_is_float_dtype, "a floating-point dtype"),
        "stem": (
            lambda x: _all(x, 3, lambda n: _whole(n, 0)) and min(x[:2]) > 0,
            "(kernel, stride, padding), with kernel and stride at least 1 and padding at least 0",
        ),
        "towers": (lambda x: _whole(x, 1) and x <= 2, "1 or 2"),
        "widths": widths,
        "activation": _one_of(ACTIVATIONS),
        "lrn": (lambda x: isinstance(x, bool), "True or False"),
        "lrn_alpha": (lambda x: x is None or _finite(x) and x > 0, f"a positive number, {own}"),
        "pool_window": (lambda x: _whole(x, 2), "2 or more, a whole number"),
        "dropout": (lambda x: _finite(x) and 0 <= x < 1, "a rate of at least 0 and below 1"),
        "kernel_std": (
            lambda x: x is None or _all(x, 8, lambda v: _finite(v) and v > 0),
            f"eight positive numbers (conv1 to fc8), {own}",
        ),
        "bias": (lambda x: x is None or _all(x, 8, _finite), f"eight numbers (conv1 to fc8), {own}"),
        "ops": (lambda x: x is None or isinstance(x, Ops), "an Ops, such as PLAIN, or None"),
        "data_axis": (_is_name, "the name of a mesh axis, or None"),
        "tower_axis": (_is_name, "the name of a mesh axis, or None"),
    }


def _one_of(names: Sequence[str] | dict[str, Any]) -> Rule:
    return lambda x: isinstance(x, str) and x in names, f"one of {', '.join(names)}"


def _whole(x: Any, least: int) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= least


def _finite(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _all(values: Any, length: int, valid: Callable[[Any], bool]) -> bool:
    return isinstance(values, Sequence) and len(values) == length and all(map(valid, values))


def _is_float_dtype(x: Any) -> bool:
    try:
        return x is not None and jnp.issubdtype(jnp.dtype(x), jnp.floating)
    except TypeError:
        return False


def _is_name(x: Any) -> bool:
    return x is None or isinstance(x, str)


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
            f"images of {shape[1]}×{shape[2]}: too small for a stem of {kernel}×{kernel} and stride {stride}, and "
            f"three poolings of pool_window={window}, stride 2; use larger images (config.resize enlarges them), a "
            "smaller stem or window"
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
