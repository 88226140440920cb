"""Which layers of a network are trained, and how fast: the texts of `config.freeze` and `config.learning_rates`."""

import math
from collections.abc import Sequence

from alexnet_jax.variants import LAYERS

ALL_BUT = "all_but_"


def layers_of(widths: Sequence[int]) -> tuple[str, ...]:
    """Return the layers of a network with these widths of conv1 … fc7, of which 0 leaves one out."""
    return tuple(layer for layer, width in zip(LAYERS, (*widths, 1), strict=True) if width)


def frozen_layers(text: str, layers: Sequence[str]) -> frozenset[str]:
    """Return the layers that a text such as "conv1,fc", or "all_but_fc8", names or whose names it begins.

    Args:
      layers: those of the network.

    Raises:
      ValueError: a name of no layer; every layer is frozen.
    """
    expected = (
        f"expected some of {', '.join(layers)}, or how several of these begin, such as conv, separated by commas; or "
        f"{ALL_BUT}fc8"
    )
    frozen: set[str] = set()
    for name in _parts(text):
        named = _matching(name.removeprefix(ALL_BUT), layers)
        if not named:
            raise ValueError(f"freeze={text!r}: no layer {name!r}; {expected}")
        frozen |= set(layers) - set(named) if name.startswith(ALL_BUT) else set(named)
    if len(frozen) == len(layers):
        raise ValueError(f"freeze={text!r}: it freezes every layer; expected at least one to train")
    return frozenset(frozen)


def layer_rates(text: str, layers: Sequence[str]) -> dict[str, float]:
    """Return each layer's factor of the learning rate, from a text such as "fc8=10,conv=0.1"; 1 where it has none.

    The longest name that a layer begins with decides.

    Args:
      layers: those of the network, of a config those that are not frozen.

    Raises:
      ValueError: a name of no layer, or one that is given twice; a factor that is not a positive number.
    """
    factors: dict[str, float] = {}
    for part in _parts(text):
        name, _, number = (x.strip() for x in part.partition("="))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        problem = ""
        if not _matching(name, layers):
            problem = f"no trained layer {name!r}"
        elif name in factors:
            problem = f"{name!r} is given twice"
        elif not 0 < factor < math.inf:
            advice = "; to freeze layers, name them in freeze" if factor == 0 else ""
            problem = f"{part!r} has no positive number{advice}"
        if problem:
            raise ValueError(
                f"learning_rates={text!r}: {problem}; expected LAYER=FACTOR, separated by commas, such as "
                f"fc8=10,conv=0.1, with some of {', '.join(layers)}, or how several of these begin"
            )
        factors[name] = factor
    rates = dict.fromkeys(layers, 1.0)
    for name in sorted(factors, key=len):
        rates |= dict.fromkeys(_matching(name, layers), factors[name])
    return rates


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _matching(name: str, layers: Sequence[str]) -> list[str]:
    return [layer for layer in layers if name and layer.startswith(name)]
