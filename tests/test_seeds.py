from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import AlexNet, data, paper_sgd
from alexnet_jax.optimizer import learning_rate_at
from alexnet_jax.preprocess import fit
from alexnet_jax.train_step import create_state, make_train_step
from experiments.seeds import Runs, Task


@pytest.fixture
def task(synthetic):
    train = data.load(synthetic, "train[:120]")
    model = AlexNet(num_classes=10, stem=(3, 1, 1), widths=(4, 8, 8, 8, 8, 16, 16), kernel_std=(0.3,) * 8)
    preprocess = fit(train.images, pad=1, crop=28, resize=0, flip=True, lighting=False, scale=1 / 70)
    return Task(model, paper_sgd(), preprocess, partial(learning_rate_at, base=0.02), train, batch_size=50)


def test_each_run_is_the_one_that_trains_alone(task):
    runs = Runs(task, seeds=(0, 3), rates=(1.0, 0.5))
    losses = np.concatenate([runs.advance(2)["loss"], runs.advance(1)["loss"], runs.advance(1)["loss"]], axis=1)
    batches = data.DeviceData(task.train, task.batch_size)
    for i, (seed, rate) in enumerate(((0, 1.0), (3, 0.5))):
        step = make_train_step(task.model, task.optimizer, task.preprocess, partial(learning_rate_at, base=0.02 * rate))
        state = create_state(task.model, task.optimizer, task.preprocess.image_shape, seed)
        order_key, step_key = jax.random.split(jax.random.wrap_key_data(state.key))
        alone = []
        for number in range(4):  # two epochs
            key = jax.random.fold_in(step_key, number)
            state, metrics = step(state, batches.batch(order_key, number), key)
            alone.append(float(metrics["loss"]))
        np.testing.assert_allclose(losses[i], alone, rtol=1e-4)
        run_params = jax.tree.map(lambda x, i=i: x[i], runs.state.params)
        chex.assert_trees_all_close(run_params, state.params, atol=2e-5)
    assert abs(losses[0] - losses[1]).min() > 1e-4


def test_errors_are_those_of_each_run(task):
    runs = Runs(task, seeds=(0, 1))
    constant = jax.tree.map(jnp.zeros_like, runs.state.params)
    constant["fc8"]["bias"] = constant["fc8"]["bias"].at[:, 3].set(1)  # always class 3
    runs.state = runs.state.replace(params=constant)
    expected = np.mean(task.train.labels != 3)
    np.testing.assert_allclose(runs.errors(task.train, batch_size=50), [expected, expected])


def test_steps_stay_in_their_epoch(task):
    with pytest.raises(ValueError, match="3 steps from step 0 leave the epoch"):
        Runs(task, seeds=(0,)).advance(3)
