"""The operations that a GPU takes in other implementations than a CPU, against those of the CPU or of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.ops import dropout, pooling
from alexnet_jax.ops.dropout_gpu import gpu_dropout
from alexnet_jax.ops.relu import relu


@pytest.mark.parametrize("towers, units, first_tower", [(2, 3000, 0), (1, 2048, 1)])
@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_the_kernel_draws_the_same_units(towers, units, first_tower, rate):
    x = jax.random.normal(jax.random.key(1), (3, units))
    arguments = jax.random.key(5), x, rate, towers, 7, first_tower
    kernel = jax.jit(partial(gpu_dropout, interpret=True), static_argnums=(2, 3))
    np.testing.assert_array_equal(kernel(*arguments), dropout(*arguments))
    gradient = jax.grad(lambda x: (kernel(jax.random.key(5), x, rate, towers, 7, first_tower) * 3.0).sum())(x)
    np.testing.assert_array_equal(gradient, 3.0 * (dropout(*arguments) != 0))


def test_the_kernel_under_vmap_draws_for_each_key():
    x, keys = jnp.ones((2, 64)), jax.random.split(jax.random.key(3), 3)
    drawn = jax.vmap(lambda key: gpu_dropout(key, x, 0.5, 2, interpret=True))(keys)
    np.testing.assert_array_equal(drawn, jax.vmap(lambda key: dropout(key, x, 0.5, 2))(keys))


def test_keys_of_another_generator_draw_as_without_the_kernel():
    key, x = jax.random.key(0, impl="rbg"), jnp.ones((2, 64))
    np.testing.assert_array_equal(gpu_dropout(key, x, 0.5, 2), dropout(key, x, 0.5, 2))


def test_dropout_checks_its_arguments_as_without_the_kernel():
    with pytest.raises(ValueError, match="rate=2"):
        gpu_dropout(jax.random.key(0), jnp.ones((2, 64)), 2, interpret=True)


def test_relu_and_its_gradient():
    x = jnp.asarray([-2.0, -0.0, 0.0, 1.0, 3.0, jnp.inf])
    y, pull = jax.vjp(relu, x)
    expected, expected_pull = jax.vjp(jax.nn.relu, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pull(x + 1)[0], expected_pull(x + 1)[0])


@pytest.mark.parametrize("window, stride", [(3, 2), (2, 2), (3, 1), (5, 2)])
def test_the_table_of_positions_is_that_of_the_indices(window, stride):
    for a in range((window - 1) // stride + 1):
        for b in range((window - 1) // stride + 1):
            table = pooling._positions(window, stride, a, b)
            for r in range(stride):
                for c in range(stride):
                    i, j = r + stride * a, c + stride * b
                    inside = i < window and j < window
                    assert table[r, 0, c, 0] == (i * window + j if inside else -2)
