"""A trained run, opened again from its folder."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from alexnet_jax import data, evaluate, recipe, report, stream
from alexnet_jax.checkpoint import fingerprint
from alexnet_jax.configs import default
from alexnet_jax.model import OUTPUTS, AlexNet, activations
from alexnet_jax.optimizer import paper_sgd
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.train_step import create_state

AT_A_TIME = 500  # patches through the network


class RunError(Exception):
    """A folder that holds no run, or none that can be read; one line that says what to do."""


class Run(NamedTuple):
    """A network, what it learned, and the data set that it learned from."""

    config: ml_collections.ConfigDict
    builder: Any  # of TFDS
    step: int
    model: AlexNet
    params: Any
    preprocess: Preprocess

    @property
    def names(self) -> list[str]:
        """The names of the classes."""
        return self.builder.info.features["label"].names

    def load(self, split: str) -> data.Examples:
        """A split of the data set, in TFDS's notation ("test[:100]")."""
        return data.load(self.builder, split)

    def predict(self, images: np.ndarray, ten_crop: bool = False) -> np.ndarray:
        """Class probabilities [N, K] of uint8 images [N, H, W, C], as the data set has them."""
        predict = evaluate.jit_forward(
            lambda params, x: evaluate.predict(self.model, params, x, self.preprocess, ten_crop)
        )
        return _in_batches(partial(predict, self.params), images, AT_A_TIME // 10 if ten_crop else AT_A_TIME)

    def activations(self, images: np.ndarray, layer: str = "fc7") -> np.ndarray:
        """One layer's output [N, …] on the central patches of uint8 images [N, H, W, C]."""
        layer_of = evaluate.jit_forward(
            lambda params, x: activations(self.model, params, self.preprocess.center_crop(x))[layer]
        )
        return _in_batches(partial(layer_of, self.params), images, AT_A_TIME)

    def error(self, examples: data.Examples, ten_crop: bool = False) -> float:
        """The top-1 error on some examples, as a fraction."""
        return float(np.mean(self.predict(examples.images, ten_crop).argmax(axis=1) != examples.labels))


def _in_batches(call: Callable[[jax.Array], jax.Array], images: np.ndarray, size: int) -> np.ndarray:
    size = min(size, len(images))
    outputs = []
    for start in range(0, len(images), size):
        few = images[start : start + size]
        filled = np.concatenate([few, np.repeat(few[-1:], size - len(few), axis=0)])  # so that one program serves
        outputs.append(np.asarray(call(filled), np.float32)[: len(few)])
    return np.concatenate(outputs)


def open_run(workdir: str | Path, data_dir: str = "") -> Run:
    """Reads the newest checkpoint of a run, on one device; changes nothing in its folder.

    Args:
      workdir: the folder that a training left, or is still writing to.
      data_dir: where TFDS keeps the data set now; "" is where it was in training.

    Raises:
      RunError: no run there, or its checkpoint is damaged.
      data.DataError: the data set that it was trained on is not here.
    """
    workdir = Path(workdir)
    config = default.get_config().lock()
    try:
        config.update(json.loads((workdir / "config.json").read_text()))
    except OSError:
        raise RunError(f"--workdir={workdir} holds no run (no config.json); name the folder of a training") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{workdir / 'config.json'} is not a config of this program ({reason})") from None
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    if not steps:
        raise RunError(f"{workdir} holds no checkpoint yet; the first one is written after an epoch")
    builder = data.open_builder(config.dataset, data_dir or config.data_dir, config.source_dir)
    preprocess = recipe.build_preprocess(config, builder, _training_images(config, builder))
    model = recipe.build_model(config, len(builder.info.features["label"].names))
    like = create_state(model, paper_sgd(), preprocess.image_shape, 0)
    params = _read((workdir / "checkpoints" / str(max(steps))).absolute(), like).params
    return Run(config, builder, max(steps), model, params, preprocess)


def _training_images(config: ml_collections.ConfigDict, builder: Any) -> Iterator[np.ndarray]:
    if config.streaming:
        yield from stream.images(builder, config.train_split, config.loader_workers)
    else:
        yield data.load(builder, config.train_split).images


def _read(found: Path, like: Any) -> Any:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    reason = "its contents do not match their fingerprint"
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            state = reader.restore(found / "state", args=ocp.args.StandardRestore(like))
        whole = json.loads((found / "extra" / "metadata").read_text())["fingerprint"] == int(fingerprint(state))
    except Exception as error:  # whatever the damage makes Orbax raise
        whole, reason = False, " ".join(str(error).split())[:200] or type(error).__name__
    if not whole:
        raise RunError(f"checkpoint {found} is damaged ({reason}); remove it to read the one before, or train again")
    return state


def layer_summary(model: AlexNet, shape: tuple[int, int, int]) -> str:
    """A table of the layers of a network for images [H, W, C]: output, kernel, parameters. Computes nothing."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    shapes = jax.eval_shape(partial(activations, model), params, image)
    return report.layer_table({name: shapes[name] for name in OUTPUTS if name in shapes}, params)


def tower_influence(model: AlexNet, params: Any, images: jax.Array) -> dict[str, float]:
    """By how much tower 1 changes, layer by layer, when tower 0's first kernels are set to 0.

    It is 0 as long as the towers do not communicate.

    Args:
      images: [B, H, W, C], as the network sees them.

    Returns:
      For each layer ‖change‖ / ‖output‖ of tower 1's half of the channels; for fc8, of all logits.
    """
    blind = {name: x.at[..., : x.shape[-1] // 2].set(0) for name, x in params["conv1"].items()}
    before, after = (activations(model, p, images) for p in (params, {**params, "conv1": blind}))

    def change(name):
        x, y = (np.asarray(outputs[name], np.float64) for outputs in (before, after))
        half = 0 if name == "fc8" else x.shape[-1] // 2
        return float(np.linalg.norm(y[..., half:] - x[..., half:]) / np.linalg.norm(x[..., half:]))

    return {name: change(name) for name in before}


def nearest(queries: np.ndarray, keys: np.ndarray, count: int = 6) -> np.ndarray:
    """For each query the `count` nearest keys by Euclidean distance, as figure 4 finds similar images.

    Args:
      queries, keys: [Q, …] and [N, …]; whatever follows the first axis counts as one vector.

    Returns:
      Places in `keys`, int [Q, count], the nearest first.

    Raises:
      ValueError: fewer than `count` keys.
    """
    if len(keys) < count:
        raise ValueError(f"nearest: {len(keys)} keys: expected at least {count}")
    queries, keys = (jnp.asarray(x, jnp.float32).reshape(len(x), -1) for x in (queries, keys))
    some = [_nearest(queries[start : start + AT_A_TIME], keys, count) for start in range(0, len(queries), AT_A_TIME)]
    return np.concatenate([np.asarray(x) for x in some])


@partial(jax.jit, static_argnums=2)
def _nearest(queries, keys, count):
    squared = jnp.sum(keys**2, axis=1) - 2 * queries @ keys.T  # |k − q|² without |q|², which ranks nothing
    return jax.lax.top_k(-squared, count)[1]


def precision(labels: Sequence[int], neighbours: np.ndarray) -> float:
    """The share of neighbours, labels [Q, count], that have their query's label, of labels [Q]."""
    return float(np.mean(neighbours == np.asarray(labels)[:, None]))
