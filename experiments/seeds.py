"""Several runs of one network as one program: the runs are a vmapped axis, and the steps of a chunk are one scan.

On a GPU the launches of kernels limit a small network, so that several runs in one program take little longer than one.
The batches, the augmentation and the dropout masks of a run are those of `alexnet_jax.main` with the same seed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax import sharding
from alexnet_jax.data import Batch, Examples
from alexnet_jax.inference import predict
from alexnet_jax.optimizer import Plateau
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.train_step import TrainState, create_state, make_update, state_specs


class Task(NamedTuple):
    """The network, the training functions and the data that the runs share."""

    model: nn.Module
    optimizer: optax.GradientTransformationExtraArgs
    preprocess: Preprocess
    learning_rate: Callable[[jax.Array, Plateau], jax.Array]
    train: Examples
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train.labels) // self.batch_size


class Runs:
    """The runs of one task, a seed and a factor of the learning rate for each; R of them.

    Args:
      task: of all runs.
      seeds: [R] integers.
      rates: [R] factors of the task's learning rate; None for 1.
    """

    def __init__(self, task: Task, seeds: Sequence[int], rates: Sequence[float] | None = None):
        self.task, self.seeds, self.step = task, tuple(seeds), 0
        self.rates = jnp.array(rates or [1.0] * len(seeds), jnp.float32)
        self.mesh = sharding.one_device()
        self.arrays = sharding.place(tuple(task.train), self.mesh)
        shape = task.preprocess.image_shape
        states = [create_state(task.model, task.optimizer, shape, seed) for seed in seeds]
        self.state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        self._advance = jax.jit(self._scan, static_argnames="steps", donate_argnums=0)
        self._wrong = jax.jit(self._count_wrong, static_argnames="ten_crop")

    def advance(self, steps: int) -> dict[str, np.ndarray]:
        """Train for a number of steps, all in one epoch, and return the metrics of each step, [R, steps].

        Raises:
          ValueError: the steps leave the epoch.
        """
        if self.step % self.task.steps_per_epoch + steps > self.task.steps_per_epoch:
            raise ValueError(f"advance: {steps} steps from step {self.step} leave the epoch; expected fewer")
        self.state, metrics = self._advance(self.state, self.rates, *self.arrays, steps=steps)
        self.step += steps
        return {name: np.asarray(values).T for name, values in metrics.items()}

    def _scan(self, state: TrainState, rates, images, labels, *, steps: int):
        task = self.task
        specs = state_specs(state)
        sharded = jax.shard_map(
            partial(_scan, task, steps), mesh=self.mesh,
            in_specs=(specs, *(sharding.REPLICATED,) * 3), out_specs=(specs, sharding.REPLICATED),
        )  # fmt: skip
        return sharded(state, rates, images, labels)

    def errors(self, examples: Examples, ten_crop: bool = False, batch_size: int = 500) -> np.ndarray:
        """Return the top-1 error of each run on a set, [R]."""
        wrong = np.zeros(len(self.seeds))
        for start in range(0, len(examples.labels), batch_size):
            images, labels = (x[start : start + batch_size] for x in examples)
            wrong += self._wrong(self.state.params, images, labels, ten_crop=ten_crop)
        return wrong / len(examples.labels)

    def _count_wrong(self, params, images, labels, *, ten_crop: bool):
        def count(params):
            probabilities = predict(self.task.model, params, images, self.task.preprocess, ten_crop)
            return jnp.sum(jnp.argmax(probabilities, axis=1) != labels)

        return jax.vmap(count)(params)


def _scan(task: Task, steps: int, state: TrainState, rates, images, labels):
    def order(key, epoch):  # that of data.DeviceData
        return jax.random.permutation(jax.random.fold_in(key, epoch), len(labels))

    keys = jax.vmap(lambda data: jax.random.split(jax.random.wrap_key_data(data)))(state.key)
    first = state.step[0]
    orders = jax.vmap(order, (0, None))(keys[:, 0], first // task.steps_per_epoch)

    def step(state, i):
        start = (first + i) % task.steps_per_epoch * task.batch_size
        chosen = jax.lax.dynamic_slice_in_dim(orders, start, task.batch_size, axis=1)

        def one(state, rate, chosen, key):
            learning_rate = lambda step, plateau: rate * task.learning_rate(step, plateau)  # noqa: E731
            update = make_update(task.model, task.optimizer, task.preprocess, learning_rate)
            return update(state, Batch(images[chosen], labels[chosen]), jax.random.fold_in(key, state.step))

        return jax.vmap(one)(state, rates, chosen, keys[:, 1])

    return jax.lax.scan(step, state, jnp.arange(steps))
