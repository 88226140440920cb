"""Checks of a config: on its own, and against the data set."""

import json
import math
from typing import Any

import ml_collections

from alexnet_jax import sharding
from alexnet_jax.checks import check_images, check_network, check_tower_devices
from alexnet_jax.errors import UserError
from alexnet_jax.trained_layers import frozen_layers, layer_rates, layers_of


class ConfigError(UserError):
    """A config that cannot work: the field, its value, and what was expected."""


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the config in JSON's types."""
    return json.loads(config.to_json_best_effort())


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise ConfigError for a value that is invalid for every data set."""

    def require(name, good, expected):
        if not good:
            raise ConfigError(f"config.{name}={config[name]!r}: expected {expected}")

    try:
        sharding.check_axes(**config.mesh)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    for name in ("batch_size", "image_size", "log_every", "crop_group"):
        require(name, config[name] >= 1, "a number of at least 1")
    counts = ("loader_workers", "num_train_steps", "pad", "resize", "warmup_steps", "plateau_patience", "eval_every")
    for name in counts:
        require(name, config[name] >= 0, "0 or more")
    require("seed", 0 <= config.seed < 2**32, "0 to 2³²−1")
    require("num_epochs", 0 < config.num_epochs < math.inf or config.num_train_steps, "a positive number")
    require("momentum", 0 <= config.momentum < 1, "at least 0 and below 1")
    try:
        check_network(config)
        check_tower_devices(config, config.mesh.tower)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    layers = layers_of(config.widths)
    try:
        frozen = frozen_layers(config.freeze, layers)
        layer_rates(config.learning_rates, [layer for layer in layers if layer not in frozen])
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    require("init_sha256", not config.init_sha256 or config.init, "the SHA-256 of config.init, which is not set")
    require("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
    for name in ("weight_decay", "bias_rate", "bias_decay", "lighting_exponent"):
        require(name, 0 <= config[name] < math.inf, "0 or more")
    for name in ("learning_rate", "input_scale", "lighting_divisor"):
        require(name, 0 < config[name] < math.inf, "a positive number")
    drops = all(isinstance(epoch, int | float) and 0 < epoch < math.inf for epoch in config.drop_at_epochs)
    require("drop_at_epochs", drops, "positive numbers of epochs")


def check_data(
    config: ml_collections.ConfigDict, image_shape: tuple[int, ...], examples: int, num_classes: int
) -> None:
    """Raise ConfigError for a value that does not fit the images [H, W, C], the training set or the classes."""
    if num_classes < 2:
        raise ConfigError(f"config.dataset={config.dataset!r}: it has {num_classes} class; expected at least 2")
    if num_classes % config.mesh.tower:
        raise ConfigError(
            f"config.mesh.tower={config.mesh.tower}: {config.dataset} has {num_classes} classes, and each tower holds "
            "half of fc8; expected 1 with an odd number of classes"
        )
    if config.batch_size > examples:
        raise ConfigError(
            f"config.batch_size={config.batch_size}: expected at most {examples:,}, the examples of the training split"
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
    field = "resize" if config.resize else "image_size"
    try:
        check_images(config, (1, config[field], config[field], channels))
    except ValueError as error:
        raise ConfigError(f"config.{field}={config[field]}: {error}") from None
