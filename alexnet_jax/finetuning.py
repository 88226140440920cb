"""A run that starts from another network (`config.init`): its description, its mean image and its parameters."""

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from alexnet_jax import sharding
from alexnet_jax.config import ConfigError
from alexnet_jax.errors import UserError
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.files import user_path
from alexnet_jax.setup import Setup, build_mesh, open_dataset
from alexnet_jax.train_step import TrainState
from alexnet_jax.weights import Weights, load_weights
from alexnet_jax.weights.description import parameter_shapes
from alexnet_jax.weights.workdir import PREPROCESS, read_preprocess
from alexnet_jax.workdir import CONFIG

# The fields of a config that are the network's that it starts from.
NETWORK = ("variant", "stem", "widths", "towers", "activation", "lrn", "lrn_alpha", "pool_window", "dropout")
# Those of its image sizes, by their names in `Preprocess`; with images of the size that it was trained on.
SIZES = {"pad": "pad", "image_size": "crop", "resize": "resize"}

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      config: the run's, with the network of `config.init`.
      mean: the mean image that this network subtracts; None without `config.init`.
      weights: None without `config.init`, and for a run that has been started before.
    """

    config: ml_collections.ConfigDict
    mean: jax.Array | np.ndarray | None = None
    weights: Weights | None = None


def start_of(config: ml_collections.ConfigDict, workdir: Path) -> Start:
    """Return what a run starts from; `config.init` is read unless the working directory has its description.

    The network, the scale of its inputs, and its mean image are those of `config.init`. So are the sizes of the border,
    the crop and the resized crop, if the data set's images have the size that the network was trained on.

    Raises:
      config.ConfigError: `config.init` is not set or missing, cannot be read, is the working directory itself, has
        another SHA-256 than `config.init_sha256`, or takes images of other channels than the data set's; `config.mesh`
        does not fit the devices.
      weights.RunError: a corrupt file in the working directory.
      data.DataError: a data set that is missing.
    """
    if config.init is None:
        raise ConfigError(
            "config.init is not set; expected --config.init=FILE, the weights or the run to start from, or "
            "--config.init= to start from random kernels"
        )
    if not config.init:
        return Start(config)
    if (recorded := _recorded(config, workdir)) is not None:
        config = _updated(config, recorded)
        return Start(config, read_preprocess(workdir, config)[0].mean)
    if Path(config.init).resolve() == workdir.resolve():
        raise ConfigError(
            f"config.init={config.init} is --workdir itself; expected another run: a run resumes without config.init, "
            "and a new one needs a --workdir of its own"
        )
    build_mesh(config)  # before a run is read, which starts the backend: a CPU is split into devices
    weights, sha256 = _read(config)
    model, preprocess = weights.model, weights.preprocess
    fields = {name: getattr(model, name) for name in NETWORK}
    fields |= {"stem": tuple(model.stem), "input_scale": float(preprocess.scale), "init_sha256": sha256}
    images = open_dataset(config).builder.info.features["image"].shape
    if images[-1] != preprocess.mean.shape[-1]:
        raise ConfigError(
            f"config.init: its network takes images of {preprocess.mean.shape[-1]} channel(s), and those of "
            f"{config.dataset} have {images[-1]}; expected a network or a data set of the same number"
        )
    if images == preprocess.mean.shape:
        fields |= {name: getattr(preprocess, attribute) for name, attribute in SIZES.items()}
    changed = {k: v for k, v in fields.items() if v != config[k] and k != "init_sha256"}
    log.info("config.init=%s sets %s", config.init, ", ".join(f"{k}={v!r}" for k, v in changed.items()) or "no field")
    return Start(_updated(config, fields), preprocess.mean, weights)


def _recorded(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Return the fields that an earlier start of this run took from `config.init`; None if there was none."""
    try:
        existing = json.loads((workdir / CONFIG).read_text())
        if existing["init"] != config.init or not (workdir / PREPROCESS).exists():
            return None
        names = [*NETWORK, *SIZES, "input_scale", *(["init_sha256"] if not config.init_sha256 else [])]
        return {name: existing[name] for name in names}
    except (OSError, ValueError, LookupError, TypeError):  # `workdir.check_config_matches` reports a corrupt file
        return None


def _updated(config: ml_collections.ConfigDict, fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    config = copy.deepcopy(config)
    with config.unlocked(), config.ignore_type():
        for name, value in fields.items():
            config[name] = tuple(value) if isinstance(value, list) else value
    return config


def _read(config: ml_collections.ConfigDict) -> tuple[Weights, str]:
    """Return the weights of `config.init`, and the SHA-256 of the file, or of the parameters of a run."""
    try:
        path = user_path(config.init, "the file")
        weights = load_weights(path)
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        else:
            digest = hashlib.sha256()
            for layer in sorted(weights.params):
                for name in ("kernel", "bias"):
                    digest.update(np.ascontiguousarray(weights.params[layer][name]).data.cast("B"))
    except (UserError, OSError) as error:
        raise ConfigError(f"config.init: {error}") from None
    sha256 = digest.hexdigest()
    distributed.require_same("config.init", {"SHA-256": sha256}, "name a file that is the same on all machines")
    if config.init_sha256 not in ("", sha256):
        raise ConfigError(f"config.init={config.init} has the SHA-256 {sha256}; expected {config.init_sha256}")
    return weights, sha256


def check_fits(run: Setup, weights: Weights) -> None:
    """Raise ConfigError if a run cannot start from these weights.

    fc6 takes images of one size, and an fc8 that is reinitialized must be trained.
    """
    if "fc8" in run.frozen and (reason := _other_classes(run, weights)):
        raise ConfigError(f"config.freeze: it freezes fc8, which is reinitialized ({reason}); expected it trained")
    image_shape = run.preprocess.image_shape
    for name, shape in parameter_shapes(run.model, image_shape).items():
        layer, kind = name.split(".")
        if layer != "fc8" and (found := weights.params[layer][kind].shape) != shape:
            side, expected = image_shape[0], weights.preprocess.image_shape[0]
            raise ConfigError(
                f"config.init: {name} is {list(found)}, and with inputs of {side}×{side} it is {list(shape)}; expected "
                f"inputs of {expected}×{expected}: --config.image_size={expected} crops to it, "
                f"--config.resize={expected} resizes the crops"
            )


def with_weights(
    state: TrainState, run: Setup, config: ml_collections.ConfigDict, weights: Weights | None
) -> TrainState:
    """Return the state before the first step with the parameters of `config.init`, which is read unless given.

    fc8 is that of the state if the classes, or the inputs of fc8, are others; one line reports it.

    Raises:
      config.ConfigError: as `start_of` and `check_fits`.
    """
    weights = weights or _read(config)[0]
    check_fits(run, weights)
    params: dict[str, Any] = dict(weights.params)
    if reason := _other_classes(run, weights):
        log.info("fc8 is reinitialized: %s", reason)
        params["fc8"] = state.params["fc8"]
    return state.replace(params=sharding.place(params, run.mesh, sharding.tower_specs(params)))


def _other_classes(run: Setup, weights: Weights) -> str:
    """Return why fc8 of some weights cannot be kept, or ""."""
    ours, theirs = run.model.num_classes, weights.model.num_classes
    if ours != theirs:
        return f"config.init has {theirs:,} classes, and {run.dataset.full_name} has {ours:,}"
    if weights.class_names is not None and list(weights.class_names) != list(run.dataset.class_names):
        return f"config.init has other classes than {run.dataset.full_name}"
    kernel = weights.params["fc8"]["kernel"].shape
    if kernel != (shape := parameter_shapes(run.model, run.preprocess.image_shape)["fc8.kernel"]):
        return f"its kernel is {list(kernel)} in config.init, and {list(shape)} with these images"
    return ""
