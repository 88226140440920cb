import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alexnet_jax import AlexNet, Stem, paper_sgd, preprocess, sharding
from alexnet_jax.train_step import create_state, make_train_step, make_update, state_specs

MODEL = AlexNet(num_classes=6, stem=Stem(5, 2, 2), widths=(8, 12, 16, 8, 12, 20, 14), kernel_std=(0.1,) * 8)
RATE = lambda step, plateau: jnp.float32(0.01)  # noqa: E731


def problem(batch=10):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch, 30, 30, 1), dtype=np.uint8)
    labels = random.integers(0, 6, batch).astype(np.int32)
    return preprocess.fit(images, 0, 28, 0, True, False, 1 / 70), (images, labels)


def test_train_step_is_one_program_with_its_state_donated():
    prepare, batch = problem()
    optimizer = paper_sgd()
    step = make_train_step(MODEL, optimizer, prepare, RATE)
    state = create_state(MODEL, optimizer, prepare.image_shape, 0)
    batch = sharding.place(batch, sharding.one_device(), sharding.BATCH)
    compiled = step.lower(state, batch, jax.random.key(1)).compile()
    arrays = [x for x in jax.tree.leaves(state.params)]
    donated = 2 * sum(x.nbytes for x in arrays)  # parameters and velocities
    assert compiled.memory_analysis().alias_size_in_bytes >= donated
    step(state, batch, jax.random.key(1))
    assert all(x.is_deleted() for x in arrays)


def test_the_update_of_several_seeds_at_once_is_that_of_each():
    prepare, batch = problem()
    optimizer, mesh, count = paper_sgd(), sharding.one_device(), 3
    update = make_update(MODEL, optimizer, prepare, RATE)
    states = [create_state(MODEL, optimizer, prepare.image_shape, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    keys = jax.random.split(jax.random.key(5), count)

    def train(states, batch, keys):
        def step(states, key):
            return jax.vmap(update, in_axes=(0, None, None))(states, batch, key)

        return jax.lax.scan(step, states, keys)

    specs = jax.tree.map(lambda spec: P(None, *spec), state_specs(states[0]))
    train_both = jax.shard_map(
        train, mesh=mesh, in_specs=(specs, sharding.BATCH, sharding.REPLICATED),
        out_specs=(specs, sharding.REPLICATED),
    )  # fmt: skip
    trained, metrics = jax.jit(train_both)(stacked, batch, keys)
    assert metrics["loss"].shape == (count, 2)
    single = make_train_step(MODEL, optimizer, prepare, RATE)
    placed = sharding.place(batch, mesh, sharding.BATCH)
    for i, state in enumerate(states):
        for n, key in enumerate(keys):
            state, expected = single(state, placed, key)
            np.testing.assert_allclose(metrics["loss"][n, i], expected["loss"], rtol=1e-4)
        for x, y in zip(jax.tree.leaves(trained.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-3, atol=1e-5)


def test_a_scheduled_optimizer_trains_on_two_towers():
    prepare, batch = problem()
    mesh = sharding.make_mesh(1, 2)
    optimizer = paper_sgd(lambda count: 0.01)
    state = create_state(MODEL, optimizer, prepare.image_shape, 0, mesh)
    step = make_train_step(MODEL, optimizer, prepare, RATE, mesh)
    state, _ = step(state, sharding.place(batch, mesh, sharding.BATCH), jax.random.key(1))
    assert int(state.opt_state.count) == 1
