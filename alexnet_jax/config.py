"""Checks of a config: on its own, and against the data set."""

import json
import math
from typing import Any

import ml_collections

from alexnet_jax import sharding
from alexnet_jax.errors import UserError
from alexnet_jax.model import ACTIVATIONS, widths_problem
from alexnet_jax.variants import VARIANTS


class ConfigError(UserError):
    """A config that cannot work: the field, its value, and what was expected."""


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the config in JSON's types."""
    return json.loads(config.to_json_best_effort())


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise ConfigError for a value that is wrong with every data set."""

    def require(name, good, expected):
        if not good:
            raise ConfigError(f"config.{name}={config[name]!r}: expected {expected}")

    def positive(values, types):
        return all(isinstance(v, types) and 0 < v < math.inf for v in values)

    try:
        sharding.check_axes(**config.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name in ("batch_size", "image_size", "log_every"):
        require(name, config[name] >= 1, "a number of at least 1")
    counts = ("loader_workers", "num_train_steps", "pad", "resize", "warmup_steps", "plateau_patience", "eval_every")
    for name in counts:
        require(name, config[name] >= 0, "0 or more")
    require("seed", 0 <= config.seed < 2**32, "0 to 2³²−1")
    require("num_epochs", 0 < config.num_epochs < math.inf or config.num_train_steps, "a positive number")
    require("learning_rate", 0 < config.learning_rate < math.inf, "a positive number")
    require("momentum", 0 <= config.momentum < 1, "at least 0 and below 1")
    require("weight_decay", 0 <= config.weight_decay < math.inf, "0 or more")
    require("input_scale", 0 < config.input_scale < math.inf, "a positive number")
    require("variant", config.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
    together = VARIANTS[config.variant].lrn_sees_both_towers and config.mesh.tower > 1
    require("variant", not together, "another one with mesh.tower=2: its LRN spans both towers")
    require("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
    kernel, stride, padding = config.stem if len(config.stem) == 3 else (0, 0, 0)
    stem = positive((kernel, stride), int) and isinstance(padding, int) and padding >= 0
    require("stem", stem, "(kernel, stride, padding), with kernel and stride at least 1")
    require("towers", config.towers in (1, 2), "1 or 2")
    require("towers", config.towers >= config.mesh.tower, "2 with mesh.tower=2: a single tower stays on one device")
    if problem := widths_problem(config.widths, config.towers):
        raise ConfigError(f"config.widths={config.widths!r}: {problem}")
    require("activation", config.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
    require("lrn_alpha", 0 <= config.lrn_alpha < math.inf, "a positive number, or 0 for the variant's own")
    require("pool_window", config.pool_window >= 2, "2 or more")
    require("dropout", 0 <= config.dropout < 1, "a rate of at least 0 and below 1")
    std = len(config.kernel_std) in (0, 8) and positive(config.kernel_std, int | float)
    require("kernel_std", std, "eight positive numbers (conv1 to fc8), or none")
    bias = len(config.bias) in (0, 8) and all(isinstance(b, int | float) and math.isfinite(b) for b in config.bias)
    require("bias", bias, "eight numbers (conv1 to fc8), or none")
    require("drop_at_epochs", positive(config.drop_at_epochs, int | float), "positive numbers of epochs")


def check_data(
    config: ml_collections.ConfigDict, image_shape: tuple[int, ...], examples: int, num_classes: int
) -> None:
    """Raise ConfigError for a value that does not fit the images [H, W, C], the training set or the classes."""
    if num_classes % config.mesh.tower:
        raise ConfigError(
            f"config.mesh.tower={config.mesh.tower}: {config.dataset} has {num_classes} classes, and each tower holds "
            "half of fc8; expected 1 with an odd number of classes"
        )
    if config.batch_size > examples:
        raise ConfigError(
            f"config.batch_size={config.batch_size}: the training split has {examples:,} examples; expected no more"
        )
    height, width, channels = image_shape
    side = min(height, width) + 2 * config.pad
    if config.image_size > side:
        raise ConfigError(
            f"config.image_size={config.image_size}: the images are {height}×{width} with a border of {config.pad}; "
            f"expected at most {side} (or a larger config.pad; config.resize enlarges)"
        )
    if config.lighting and channels != 3:
        raise ConfigError(
            f"config.lighting=True: {config.dataset} has {channels} channel(s), and PCA lighting needs three; expected "
            "False for gray images"
        )
