"""Footnote 3's network against NumPy, and its update against the parameter files' rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from experiments.four_layers import FourLayers, optimizer

KERNELS = {
    "conv1": (5, 5, 3, 64), "conv2": (5, 5, 64, 64), "local3": (6, 6, 576, 32), "local4": (6, 6, 288, 32),
    "fc10": (1152, 10),
}  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32) * 60


def larger(params):  # the initial kernels of conv1 are so small that every logit is 0
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params)


@pytest.mark.parametrize("lrn", [True, False])
def test_logits_against_float64(images, lrn):
    model = FourLayers(lrn=lrn)
    params = larger(model.init(jax.random.key(0), images)["params"])
    assert {name: leaves["kernel"].shape for name, leaves in params.items()} == KERNELS

    def convolution(x, leaves):
        x = reference.relu(reference.conv(x, leaves["kernel"], 1, ((2, 2), (2, 2))) + np.asarray(leaves["bias"]))
        x = reference.lrn(x, 1.0, 5, 0.001 / 5, 0.75) if lrn else x
        return reference.max_pool(np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))

    def local(x, leaves):  # each place has its kernel, whose inputs are ordered by channel, row, column
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        outputs = np.empty((len(x), 6, 6, 32))
        for row in range(6):
            for column in range(6):
                patch = padded[:, row : row + 3, column : column + 3].transpose(0, 3, 1, 2).reshape(len(x), -1)
                outputs[:, row, column] = patch @ np.float64(leaves["kernel"][row, column])
        return reference.relu(outputs + np.asarray(leaves["bias"]))

    x = convolution(convolution(images, params["conv1"]), params["conv2"])
    assert x.shape == (2, 6, 6, 64)
    x = local(local(x, params["local3"]), params["local4"]).reshape(2, -1)
    expected = x @ np.float64(params["fc10"]["kernel"]) + np.asarray(params["fc10"]["bias"])
    np.testing.assert_allclose(model.apply({"params": params}, images), expected, rtol=1e-4, atol=1e-4)


def test_decay_and_rates_are_the_parameter_files():
    params = {name: {"kernel": jnp.ones(2), "bias": jnp.ones(2)} for name in KERNELS}
    gradients = jax.tree.map(lambda x: 3 * x, params)
    update, state = optimizer(), optimizer().init(params)
    for _ in range(2):
        updates, state = update.update(gradients, state, params, learning_rate=0.001)
        params = optax.apply_updates(params, updates)
    for name in KERNELS:
        decay = 0.0 if name.startswith("conv") else 0.004
        kernel, bias, velocity, bias_velocity = 1.0, 1.0, 0.0, 0.0
        for _ in range(2):
            velocity = 0.9 * velocity - 0.001 * (decay * kernel + 3)
            bias_velocity = 0.9 * bias_velocity - 0.002 * 3
            kernel, bias = kernel + velocity, bias + bias_velocity
        np.testing.assert_allclose(params[name]["kernel"], kernel, rtol=1e-6)
        np.testing.assert_allclose(params[name]["bias"], bias, rtol=1e-6)
