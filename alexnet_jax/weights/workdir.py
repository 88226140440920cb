"""A run's working directory as weights: the network and what predictions need, without the training data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from alexnet_jax import sharding
from alexnet_jax.checkpoint import newest_step, read_checkpoint
from alexnet_jax.configs import default
from alexnet_jax.errors import UserError, one_line
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.runtime.files import replaced, user_path
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.setup import build_model, build_optimizer, build_preprocess, open_dataset, preprocess_fields
from alexnet_jax.train_step import create_state
from alexnet_jax.trained_layers import frozen_layers, layers_of
from alexnet_jax.weights.description import Source, Weights, WeightsError
from alexnet_jax.workdir import CHECKPOINTS, CONFIG

PREPROCESS = "preprocess.npz"  # the training set's mean, PCA lighting and class names
LIGHTING = ("lighting_factors", "lighting_directions")


class RunError(UserError):
    """A folder that holds no run, or none that can be read."""


class Checkpoint(NamedTuple):
    """The newest checkpoint of a run: its weights, the run's config and the step."""

    weights: Weights
    config: ml_collections.ConfigDict
    step: int


def write_preprocess(workdir: Path, preprocess: Preprocess, class_names: Sequence[str]) -> None:
    """Write what predictions need of the training data into a run's working directory; raises OSError."""
    arrays: dict[str, Any] = {"mean": preprocess.mean, "class_names": np.array(class_names, str)}
    if preprocess.lighting is not None:
        arrays |= zip(LIGHTING, preprocess.lighting, strict=True)
    with replaced(workdir / PREPROCESS) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_workdir(path: str | Path) -> Weights:
    """Return the weights of a run's newest checkpoint; raises as `read_run`."""
    return read_run(user_path(path, "the run's workdir")).weights


@run_settings()
def read_run(workdir: Path, data_dir: str = "") -> Checkpoint:
    """Read the newest checkpoint of a run, on one device; changes nothing in the folder.

    Runs from before `write_preprocess` need their data set.

    Args:
      workdir: the run's working directory; it may still be training.
      data_dir: where TFDS keeps the data set now; "" is where it was in training.

    Raises:
      RunError: the folder holds no run, no checkpoint, or a corrupt file.
      checkpoint.CheckpointError: the newest checkpoint is corrupt.
      sharding.DeviceError: there are no devices.
      data.DataError: the data set is needed and missing.
    """
    sharding.all_devices()
    config = default.get_config().lock()
    try:
        values = json.loads((workdir / CONFIG).read_text())
        config.update(values)
        if missing := [name for name in ("dataset", "stem", "widths") if name not in values]:
            raise ValueError(f"it has no {missing[0]}")
    except OSError:
        raise RunError(
            f"{workdir} holds no run (no {CONFIG}); name the workdir of a training, or a file of weights"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{workdir / CONFIG} is not a config of this program ({one_line(error)})") from None
    step = newest_step(workdir / CHECKPOINTS)
    if step is None:
        raise RunError(f"{workdir} holds no checkpoint yet; the first one is written after an epoch")
    preprocess, class_names = read_preprocess(workdir, config, data_dir)
    model = build_model(config, len(class_names))
    try:
        optimizer, frozen = build_optimizer(config), frozen_layers(config.freeze, layers_of(config.widths))
    except ValueError as error:
        raise RunError(f"{workdir / CONFIG} is not a config of this program ({error})") from None
    like = create_state(model, optimizer, preprocess.image_shape, seed=0, frozen=frozen)
    state, _ = read_checkpoint(workdir / CHECKPOINTS / str(step), like)
    try:
        weights = Weights(
            model=model,
            params=jax.device_get(state.params),
            preprocess=preprocess,
            ten_crop=config.ten_crop,
            class_names=class_names,
            dataset=config.dataset,
            test_split=config.validation_split,
            source=Source("run", str(workdir), init=config.init, init_sha256=config.init_sha256),
        )
    except WeightsError as error:
        raise RunError(f"{workdir}: {error}") from None
    return Checkpoint(weights, config, step)


def read_preprocess(
    workdir: Path, config: ml_collections.ConfigDict, data_dir: str = ""
) -> tuple[Preprocess, tuple[str, ...]]:
    """Return a run's preprocessing and class names, from its file or its data set; raises RunError, data.DataError."""
    path = workdir / PREPROCESS
    if not path.exists():
        dataset = open_dataset(config, data_dir)
        return build_preprocess(config, dataset), tuple(dataset.class_names)
    try:
        with np.load(path) as arrays:
            lighting = (arrays[LIGHTING[0]], arrays[LIGHTING[1]]) if LIGHTING[0] in arrays else None
            preprocess = Preprocess(mean=arrays["mean"], lighting=lighting, **preprocess_fields(config))
            return preprocess, tuple(arrays["class_names"].tolist())
    except Exception:  # any exception of a corrupt file
        raise RunError(f"{path} is corrupt; delete it to compute its contents from the data set again") from None
