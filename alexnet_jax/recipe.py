"""What a config means: checked on its own, against the data, and against the run that a folder holds already."""

import contextlib
import fcntl
import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from alexnet_jax import distributed, report, sharding
from alexnet_jax.checks import check_network, check_tower_devices
from alexnet_jax.data import DataError
from alexnet_jax.images import SIDE
from alexnet_jax.model import AlexNet, Stem
from alexnet_jax.prepare import STATISTICS
from alexnet_jax.preprocess import Preprocess, fit, read_statistics

log = logging.getLogger(__name__)

# May change between the starts of one run.
UNRELATED_TO_RESULT = ("data_dir", "source_dir", "loader_workers", "log_every", "mesh")


class ConfigError(Exception):
    """A config that cannot work; one line with the field, what it got and what it takes."""


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for a value that no data set could make right."""

    def require(name, good, takes):
        if not good:
            raise ConfigError(f"config.{name}={config[name]!r}: expected {takes}")

    def positive(values, types):
        return all(isinstance(v, types) and 0 < v < math.inf for v in values)

    try:
        sharding.check_axes(**config.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name in ("batch_size", "image_size", "log_every"):
        require(name, config[name] >= 1, "a number of at least 1")
    whole = ("loader_workers", "num_train_steps", "pad", "resize", "warmup_steps", "plateau_patience", "eval_every")
    for name in whole:
        require(name, config[name] >= 0, "0 or more")
    require("seed", 0 <= config.seed < 2**32, "0 to 2³²−1")
    require("num_epochs", 0 < config.num_epochs < math.inf or config.num_train_steps, "a positive number")
    require("learning_rate", 0 < config.learning_rate < math.inf, "a positive number")
    require("momentum", 0 <= config.momentum < 1, "at least 0 and below 1")
    require("weight_decay", 0 <= config.weight_decay < math.inf, "0 or more")
    require("input_scale", 0 < config.input_scale < math.inf, "a positive number")
    try:
        check_network(config)
        check_tower_devices(config, config.mesh.tower)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    require("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
    require("bias_rate", 0 <= config.bias_rate < math.inf, "0 or more")
    require("bias_decay", 0 <= config.bias_decay < math.inf, "0 or more")
    require("crop_group", config.crop_group >= 1, "a number of at least 1")
    require("lighting_exponent", 0 <= config.lighting_exponent < math.inf, "0 or more")
    require("lighting_divisor", 0 < config.lighting_divisor < math.inf, "a positive number")
    require("drop_at_epochs", positive(config.drop_at_epochs, int | float), "positive numbers of epochs")


def build_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """The mesh that a config asks for; raises ConfigError if the devices or the batch do not divide so."""
    try:
        mesh = sharding.make_mesh(**config.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.batch_size % mesh.shape[sharding.DATA]:
        raise ConfigError(
            f"config.batch_size={config.batch_size}: the mesh splits a batch into {mesh.shape[sharding.DATA]} parts; "
            "expected a multiple of that (or another config.mesh.data)"
        )
    return mesh


def check_data(config: ml_collections.ConfigDict, shape: tuple[int, ...], examples: int, num_classes: int) -> None:
    """Raises ConfigError for a value that does not suit the images [H, W, C], the training set or the classes."""
    if num_classes % config.mesh.tower:
        raise ConfigError(
            f"config.mesh.tower={config.mesh.tower}: {config.dataset} has {num_classes} classes, and each tower holds "
            "half of fc8; expected 1 with an odd number of classes"
        )
    if config.batch_size > examples:
        raise ConfigError(
            f"config.batch_size={config.batch_size}: the training split has {examples:,} examples; expected no more"
        )
    side = min(shape[:2]) + 2 * config.pad
    if config.image_size > side:
        raise ConfigError(
            f"config.image_size={config.image_size}: the images are {shape[0]}×{shape[1]} with a border of "
            f"{config.pad}; expected at most {side} (or a larger config.pad; config.resize enlarges)"
        )
    if config.lighting and shape[2] != 3:
        raise ConfigError(
            f"config.lighting=True: {config.dataset} has {shape[2]} channel(s); PCA lighting needs three; set it to "
            "False for grey images"
        )
    seen = config.resize or config.image_size
    try:
        jax.eval_shape(build_model(config, 10).init, jax.random.key(0), jnp.zeros((1, seen, seen, shape[2])))
    except ValueError as error:
        field = "resize" if config.resize else "image_size"
        raise ConfigError(f"config.{field}={seen}: {error}") from None


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> AlexNet:
    """The network that a config describes."""
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


def build_preprocess(
    config: ml_collections.ConfigDict, builder: Any, images: np.ndarray | Iterable[np.ndarray]
) -> Preprocess:
    """The preprocessing that a config describes, with the statistics that `prepare` left beside the data set.

    Those are of the whole split `train`, whatever part of it trains.

    Args:
      images: the training set, as `preprocess.fit` takes it, to measure where there are no such statistics.

    Raises:
      data.DataError: the statistics are there and cannot be read.
    """
    path = Path(builder.data_path) / STATISTICS
    if path.exists():
        try:
            images = read_statistics(path)
        except Exception as error:  # whatever the damage makes NumPy raise
            raise DataError(f"{path} is damaged ({error}); delete {path.parent} and prepare it again") from None
    elif builder.name.endswith(f"_{SIDE}"):
        log.warning("%s is missing; the mean image is measured anew, of %s", path, config.train_split)
    return fit(
        images, config.pad, config.image_size, config.resize, config.flip, config.lighting, config.input_scale,
        config.random_crop, config.crop_group, config.crop_last_position, config.lighting_exponent,
        config.lighting_divisor,
    )  # fmt: skip


def check_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Raises ConfigError if the folder holds a run of another config; the message names each field that differs."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged; restore it, or train into another --workdir")
    wanted = plain(config)
    related = [{k: v for k, v in values.items() if k not in UNRELATED_TO_RESULT} for values in (found, wanted)]
    if differing := distributed.differences(*related, words=("there", "now")):
        raise ConfigError(
            f"--workdir={workdir} holds a run of another config ({differing}); give the same config, or another "
            "--workdir"
        )


@contextlib.contextmanager
def claimed_workdir(config: ml_collections.ConfigDict, workdir: Path) -> Iterator[None]:
    """The folder with its `config.json`, made by process 0 and held by it against other runs for as long as the block.

    Raises:
      ConfigError: it cannot be written, at first or later; another run holds it; or some process sees another folder.
    """
    with contextlib.ExitStack() as stack:
        try:
            if jax.process_index() == 0:
                workdir.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(workdir / ".lock", "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(f"--workdir={workdir}: another process trains there; wait, or stop it") from None
                report.write_json(workdir / "config.json", plain(config))
            distributed.highest(0)
            if blind := distributed.highest(0 if (workdir / "config.json").exists() else jax.process_index()):
                raise ConfigError(
                    f"--workdir={workdir}: process {blind} does not see what process 0 writes there; name a folder "
                    "that all machines share"
                )
            yield
        except OSError as error:
            raise ConfigError(
                f"--workdir={workdir} cannot be written: {error}; free some space or make it writable, then run the "
                "same command again"
            ) from None


def plain(config: ml_collections.ConfigDict) -> dict:
    """The config as JSON knows it."""
    return json.loads(config.to_json_best_effort())
