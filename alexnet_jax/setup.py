"""A checked config becomes one frozen dataclass, `Setup`; below it, `config` alone reads a config."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from alexnet_jax import data, sharding
from alexnet_jax.config import ConfigError, check_data
from alexnet_jax.data.dataset import Batches, Dataset, TrainData
from alexnet_jax.data.images import SIDE
from alexnet_jax.errors import one_line
from alexnet_jax.inference import batch_size
from alexnet_jax.model import AlexNet, Stem
from alexnet_jax.optimizer import Plateau, learning_rate_at, paper_sgd, scale_layers
from alexnet_jax.preprocess import Preprocess, Statistics, fit, read_statistics
from alexnet_jax.trained_layers import frozen_layers, layer_rates, layers_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What a config and its data set define.

    Attributes:
      mesh: the devices.
      dataset: the data set.
      sizes: the number of examples of each split, by its use: `train`, `validate`, `test`.
      train_data, validation_data: the batches of the first two.
      train_split, test_split: the splits for the training and for the final test, in TFDS's notation.
      preprocess, model, optimizer: the parts of a train step.
      frozen: the layers that are not trained.
      rates: each layer's factor of the learning rate.
      origin: the file or the run that the parameters come from, with its SHA-256; "" for random ones.
      learning_rate: the schedule, as a function of the step and of `optimizer.Plateau`.
      seed: the source of every random number of the run.
      batch_size: images of a step, over all devices.
      num_steps: steps of the run.
      eval_every, log_every: steps between two validations, each with a checkpoint, and between two lines of metrics.
      plateau_patience: validations without a lower error until the learning rate decays; 0 for never.
      ten_crop: whether to test on the ten-crop or on the center crop.
    """

    mesh: Mesh
    dataset: Dataset
    sizes: dict[str, int]
    train_data: TrainData
    validation_data: Batches
    train_split: str
    test_split: str
    preprocess: Preprocess
    model: AlexNet
    optimizer: optax.GradientTransformationExtraArgs
    frozen: frozenset[str]
    rates: dict[str, float]
    origin: str
    learning_rate: Callable[[jax.Array, Plateau], jax.Array]
    seed: int
    batch_size: int
    num_steps: int
    eval_every: int
    log_every: int
    plateau_patience: int
    ten_crop: bool


def setup(config: ml_collections.ConfigDict, mean: jax.Array | np.ndarray | None = None) -> Setup:
    """Return what a config defines; its data set is opened, and the training set is read if it is not streamed.

    Args:
      config: of `alexnet_jax.configs`, checked with `config.check_config`.
      mean: the mean image that the network was trained with; None: that of the training set. Its mean color is taken if
        it has another size than the images.

    Raises:
      config.ConfigError: a value that does not fit the devices or the data set.
      data.DataError: a data set or a split that is missing or cannot be read.
    """
    mesh = build_mesh(config)
    dataset = open_dataset(config)
    sizes = {}
    for use, field in {"train": "train_split", "validate": "validation_split", "test": "test_split"}.items():
        try:
            sizes[use] = dataset.size(config[field])
            dataset.check_labels(config[field])
        except data.DataError as error:
            raise data.DataError(f"config.{field}: {error}") from None
    check_data(config, dataset.image_shape(config.train_split), sizes["train"], dataset.num_classes)
    validation_batch = batch_size(sizes["validate"], False, mesh)
    dataset.check_memory(config.train_split, config.batch_size, config.validation_split, validation_batch, mesh)
    train_data = dataset.training(config.train_split, config.batch_size, mesh)
    steps_per_epoch = train_data.steps_per_epoch
    num_steps = config.num_train_steps or max(1, round(config.num_epochs * steps_per_epoch))
    preprocess = build_preprocess(config, dataset, train_data.measure)
    if mean is not None:
        preprocess = dataclasses.replace(preprocess, mean=_mean_image(mean, train_data.image_shape))
    layers = layers_of(config.widths)
    return Setup(
        mesh=mesh,
        dataset=dataset,
        sizes=sizes,
        train_data=train_data,
        validation_data=dataset.batches(config.validation_split, validation_batch, mesh),
        train_split=config.train_split,
        test_split=config.test_split,
        preprocess=preprocess,
        model=build_model(config, dataset.num_classes),
        optimizer=build_optimizer(config),
        frozen=frozen_layers(config.freeze, layers),
        rates=layer_rates(config.learning_rates, layers),
        origin=f"{config.init}, SHA-256 {config.init_sha256}" if config.init else "",
        learning_rate=partial(
            learning_rate_at,
            base=config.learning_rate,
            warmup_steps=config.warmup_steps,
            drop_at=tuple(round(epoch * steps_per_epoch) for epoch in config.drop_at_epochs),
            linear_steps=num_steps * config.linear_decay,
        ),
        seed=config.seed,
        batch_size=config.batch_size,
        num_steps=num_steps,
        eval_every=config.eval_every or steps_per_epoch,
        log_every=config.log_every,
        plateau_patience=config.plateau_patience,
        ten_crop=config.ten_crop,
    )


def build_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """Return the mesh of a config; raises ConfigError if it does not fit the devices or does not divide the batch."""
    try:
        mesh = sharding.make_mesh(**config.mesh)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    if config.batch_size % mesh.shape[sharding.DATA]:
        raise ConfigError(
            f"config.batch_size={config.batch_size}: the mesh splits a batch into {mesh.shape[sharding.DATA]} parts; "
            "expected a multiple of that (or another config.mesh.data)"
        )
    return mesh


def open_dataset(config: ml_collections.ConfigDict, data_dir: str = "") -> Dataset:
    """Return the data set of a config, from `data_dir` unless that is empty; raises data.DataError."""
    builder = data.open_builder(config.dataset, data_dir or config.data_dir, config.source_dir)
    return Dataset(builder, config.streaming, config.loader_workers)


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> AlexNet:
    """Return the network of a config."""
    return AlexNet(
        num_classes=num_classes,
        variant=config.variant,
        dtype=jnp.dtype(config.dtype),
        stem=Stem(*config.stem),
        widths=tuple(config.widths),
        towers=config.towers,
        activation=config.activation,
        lrn=config.lrn,
        lrn_alpha=config.lrn_alpha,
        pool_window=config.pool_window,
        dropout=config.dropout,
        kernel_std=config.kernel_std,
        bias=config.bias,
    )


def build_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a config."""
    optimizer = paper_sgd(
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        bias_rate=config.bias_rate,
        bias_decay=config.bias_decay,
    )
    rates = layer_rates(config.learning_rates, layers_of(config.widths))
    return scale_layers(optimizer, rates) if set(rates.values()) != {1.0} else optimizer


def _mean_image(mean: jax.Array | np.ndarray, shape: tuple[int, ...]) -> jax.Array | np.ndarray:
    """Return a network's mean image, of its mean color if the images [H, W, C] have another size."""
    if mean.shape == shape:
        return mean
    color = np.mean(mean, axis=(0, 1), dtype=np.float64).astype(np.float32)
    if (mean != color).any():
        log.info("images of another size than those of config.init: its mean color replaces its mean image")
    return np.ascontiguousarray(np.broadcast_to(color, shape))


def build_preprocess(
    config: ml_collections.ConfigDict, dataset: Dataset, measure: Callable[[bool], Statistics] | None = None
) -> Preprocess:
    """Return the preprocessing of a config, with the statistics that `prepare` wrote next to the data set.

    These statistics are of the complete split `train`, even if the training set is a part of it.

    Args:
      measure: computes the statistics of the training set, with the RGB covariance or not; called only without such a
        file. None: the training set is read.

    Raises:
      data.DataError: the statistics exist and cannot be read.
    """
    path = dataset.statistics
    if path.exists():
        try:
            statistics = read_statistics(path)
        except Exception as error:  # any exception of a corrupt file
            raise data.DataError(
                f"{path} is corrupt ({one_line(error)}); delete {path.parent} and prepare it again"
            ) from None
    else:
        if dataset.builder.name.endswith(f"_{SIDE}"):
            log.warning("%s is missing; the mean image is computed again, from %s", path, config.train_split)
        statistics = (measure or partial(dataset.measure, config.train_split))(config.lighting)
    return fit_preprocess(config, statistics)


def fit_preprocess(config: ml_collections.ConfigDict, source: Statistics | Iterable[np.ndarray]) -> Preprocess:
    """Return the preprocessing of a config, with the statistics of a training set or of its images."""
    lighting = dict(lighting=config.lighting, lighting_exponent=config.lighting_exponent)
    return fit(source, **lighting, **preprocess_fields(config))


def preprocess_fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the static fields of `Preprocess`, which need no data."""
    return dict(
        pad=config.pad,
        crop=config.image_size,
        resize=config.resize,
        flip=config.flip,
        scale=config.input_scale,
        random_crop=config.random_crop,
        crop_group=config.crop_group,
        crop_last_position=config.crop_last_position,
        lighting_divisor=config.lighting_divisor,
    )
