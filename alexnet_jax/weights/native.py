"""This project's file of weights: one .safetensors with the parameters, the mean, and the description as JSON."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_jax.errors import one_line
from alexnet_jax.model import AlexNet, Stem
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.weights.description import CORRUPT, Params, Source, Weights, WeightsError
from alexnet_jax.weights.safetensors_file import read_safetensors, write_safetensors
from alexnet_jax.weights.stored import Stored, whole

KEY = "alexnet_jax"  # of the metadata
NETWORK = (
    "num_classes", "variant", "stem", "widths", "towers", "activation", "lrn", "lrn_alpha", "pool_window", "dropout",
    "kernel_std", "bias",
)  # fmt: skip
MEAN, LIGHTING = "preprocess.mean", ("preprocess.lighting_factors", "preprocess.lighting_directions")
STATIC = tuple(f.name for f in fields(Preprocess) if not f.metadata.get("pytree_node", True))
OTHERS = ("resizing", "ten_crop", "class_names", "dataset", "test_split")


def write_native(weights: Weights, path: Path) -> None:
    """Write weights to a .safetensors file, the complete file or nothing; raises OSError."""
    preprocess = weights.preprocess
    tensors = {f"{layer}.{name}": x for layer, arrays in weights.params.items() for name, x in arrays.items()}
    tensors[MEAN] = np.asarray(preprocess.mean, np.float32)
    if preprocess.lighting is not None:
        tensors |= zip(LIGHTING, (np.asarray(x, np.float32) for x in preprocess.lighting), strict=True)
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    # One entry: the library writes several in any order, and the same weights would give different files.
    write_safetensors(path, contiguous, {KEY: json.dumps(describe(weights))})


def describe(weights: Weights) -> dict[str, Any]:
    """Return all but the arrays of some weights, in JSON's types."""
    return {
        "network": {name: getattr(weights.model, name) for name in NETWORK}
        | {"dtype": jnp.dtype(weights.model.dtype).name},
        "preprocess": {name: getattr(weights.preprocess, name) for name in STATIC},
        **{name: getattr(weights, name) for name in OTHERS},
        "source": weights.source._asdict(),
    }


def is_native(metadata: Mapping[str, str] | None) -> bool:
    """Return whether the metadata of a .safetensors file is that of `write_native`."""
    return KEY in (metadata or {})


def read_native(path: Path) -> Weights:
    """Return the weights of a file that `write_native` wrote.

    Raises:
      WeightsError: another file, or a corrupt one.
      OSError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return native_weights(*read_safetensors(whole(file)))
    except WeightsError as error:
        raise WeightsError(f"{path}: {one_line(error, 500)}") from None
    except CORRUPT as error:
        raise WeightsError(f"{path} is not a .safetensors file: {one_line(error)}") from None


def native_weights(metadata: Mapping[str, str], arrays: Mapping[str, Stored]) -> Weights:
    """Return the weights of a file's metadata and arrays; raises WeightsError for those of another or corrupt file."""
    if not is_native(metadata):
        raise WeightsError(f"it holds no description of a network ({KEY})")
    try:
        return _weights(json.loads(metadata[KEY]), {name: x.read() for name, x in arrays.items()})
    except WeightsError:
        raise
    except CORRUPT as error:
        raise WeightsError(f"its description is corrupt: {one_line(error)}") from None


def _weights(description: dict[str, Any], tensors: dict[str, np.ndarray]) -> Weights:
    network = description["network"]
    mean = tensors.pop(MEAN)
    lighting = None
    if LIGHTING[0] in tensors:
        lighting = tensors.pop(LIGHTING[0]), tensors.pop(LIGHTING[1])
    params: Params = {}
    for key, x in tensors.items():
        layer, name = key.split(".")
        params.setdefault(layer, {})[name] = x
    names = description["class_names"]
    return Weights(
        model=AlexNet(
            **{name: _hashable(network[name]) for name in NETWORK if name != "stem"},
            stem=Stem(*network["stem"]),
            dtype=jnp.dtype(network["dtype"]),
        ),
        params=params,
        preprocess=Preprocess(
            mean=mean, lighting=lighting, **{name: description["preprocess"][name] for name in STATIC}
        ),
        source=Source(**description["source"]),
        **{name: description[name] for name in OTHERS if name != "class_names"},
        class_names=None if names is None else tuple(names),
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
