"""The two-tower split on virtual devices: the same training on any mesh, and communication where the paper has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import AlexNet, Stem, evaluate, preprocess, sharding, train
from alexnet_jax.data import DeviceData, load

MESHES = [(1, 1), (1, 2), (4, 1), (2, 2), (4, 2)]
MODEL = AlexNet(num_classes=10, stem=Stem(5, 2, 2), widths=(8, 16, 24, 24, 16, 32, 24),
                kernel_std=(0.28, 0.1, 0.1, 0.12, 0.12, 0.3, 0.25, 0.05))  # fmt: skip


def twenty_steps(mesh, examples):
    optimizer, prepare = train.paper_sgd(), preprocess.fit(examples.images, 2, 28, 0, True, False, 1 / 70)
    state = train.create_state(MODEL, optimizer, prepare.image_shape, 0, mesh)
    step = train.make_train_step(MODEL, optimizer, prepare, lambda step, plateau: jnp.float32(0.02), mesh)
    data = DeviceData(examples, 32, mesh)
    losses = []
    for i in range(20):
        state, metrics = step(state, data.batch(jax.random.key(5), i), jax.random.key(i))
        losses.append(float(metrics["loss"]))
    tested = evaluate.evaluate(MODEL, state.params, *examples, prepare, ten_crop=False, batch_size=48, mesh=mesh)
    return state, losses, tested


@pytest.fixture(scope="module")
def one_device(fashion_mnist):
    examples = load(fashion_mnist, "train[:203]")
    return examples, twenty_steps(sharding.make_mesh(1, 1), examples)


@pytest.mark.parametrize("data,tower", MESHES[1:])
def test_the_same_training_on_any_mesh(one_device, data, tower):
    examples, (_, losses, tested) = one_device
    state, sharded_losses, sharded_tested = twenty_steps(sharding.make_mesh(data, tower), examples)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    assert sharded_tested.confusion.sum() == len(examples.labels) == tested.confusion.sum()
    assert sharded_tested.loss == pytest.approx(tested.loss, rel=1e-4)
    kernel = state.params["conv2"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(5, 5, 4, 16 // tower)}
    velocity = state.opt_state.velocity["fc8"]["kernel"]
    assert {s.data.shape for s in velocity.addressable_shards} == {(24, 10 // tower)}
