"""Occlusion, saliency and activation maximization against loops and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SMALL, images_of, small_params

from alexnet_jax import PLAIN, visualize
from alexnet_jax.features import features

MODEL = SMALL.clone(kernel_std=None)
IMAGES = images_of(32, batch=2, channels=3) * 10
PARAMS = jax.tree.map(lambda x: x * 0.7, small_params(IMAGES))
LABELS = [4, 1]


def logits(images):
    return MODEL.clone(ops=PLAIN).apply({"params": PARAMS}, images)


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_occlusion_is_that_of_a_loop(monkeypatch, batch):
    monkeypatch.setattr(visualize, "BATCH", batch)
    maps = visualize.occlusion(MODEL, PARAMS, IMAGES, LABELS, size=12, stride=10)
    assert maps.shape == (2, 3, 3) and maps.dtype == np.float32
    expected = np.empty_like(maps)
    for b, label in enumerate(LABELS):
        for i in range(3):
            for j in range(3):
                image = np.array(IMAGES[b])
                image[10 * i : 10 * i + 12, 10 * j : 10 * j + 12] = 0
                expected[b, i, j] = jax.nn.softmax(logits(image[None]))[0, label]
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)
    assert maps.std() > 1e-3


def test_a_square_of_the_images_size_hides_all():
    maps = visualize.occlusion(MODEL, PARAMS, IMAGES, LABELS, size=32)
    expected = jax.nn.softmax(logits(jnp.zeros_like(IMAGES)))[[0, 1], np.array(LABELS)]
    np.testing.assert_allclose(maps[:, 0, 0], expected, rtol=1e-4)


def test_saliency_is_the_largest_difference_of_a_channel():
    maps = visualize.saliency(MODEL, PARAMS, IMAGES, LABELS)
    assert maps.shape == (2, 32, 32) and maps.dtype == np.float32
    x = np.asarray(IMAGES)
    with jax.enable_x64(True):
        model = MODEL.clone(ops=PLAIN, dtype=jnp.float64, param_dtype=jnp.float64)
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
        apply = jax.jit(lambda images: model.apply({"params": params}, images))
        for b, row, column in [(0, 9, 9), (0, 3, 12), (1, 10, 7), (1, 0, 31)]:
            changed = np.repeat(x[b : b + 1].astype(np.float64), 6, axis=0)
            for channel in range(3):
                changed[2 * channel, row, column, channel] += 1e-3
                changed[2 * channel + 1, row, column, channel] -= 1e-3
            values = np.asarray(apply(changed), np.float64)[:, LABELS[b]]
            expected = np.abs(values[::2] - values[1::2]).max() / 2e-3
            np.testing.assert_allclose(maps[b, row, column], expected, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("layer,units", [("conv1", [0, 7]), ("conv5", [3, 11]), ("fc6", [19]), ("fc8", [2, 2])])
def test_maximize_raises_the_unit_above_noise_and_images(layer, units):
    found = visualize.maximize(MODEL, PARAMS, jax.random.key(0), (32, 32, 3), layer, units, steps=30)
    assert found.shape == (len(units), 32, 32, 3) and np.isfinite(found).all()
    spread = found.std(axis=(1, 2, 3), keepdims=True)
    others = np.random.default_rng(0).normal(0, 1, (40, 32, 32, 3)).astype(np.float32)
    for i, unit in enumerate(units):
        same_spread = others * spread[i] / others.std(axis=(1, 2, 3), keepdims=True)
        assert output(found[i : i + 1], layer, unit)[0] > output(same_spread, layer, unit).max()


def output(images, layer, unit):
    """The output of a unit as `features` has it: independent of how `maximize` reads it."""
    name = layer if layer == "fc8" else f"{layer}:pre"
    x = features(MODEL, PARAMS, images, [name])[name]
    return x[:, x.shape[1] // 2, x.shape[2] // 2, unit] if x.ndim == 4 else x[:, unit]


def test_convolutions_take_other_sizes_and_the_key_decides():
    found = visualize.maximize(MODEL, PARAMS, jax.random.key(0), (40, 36, 3), "conv5", [1], steps=3)
    assert found.shape == (1, 40, 36, 3)
    same = visualize.maximize(MODEL, PARAMS, jax.random.key(0), (40, 36, 3), "conv5", [1], steps=3)
    other = visualize.maximize(MODEL, PARAMS, jax.random.key(1), (40, 36, 3), "conv5", [1], steps=3)
    np.testing.assert_array_equal(found, same)
    assert np.abs(found - other).max() > 0.1


@pytest.mark.parametrize("call,words", [
    (lambda: visualize.occlusion(MODEL, PARAMS, IMAGES, LABELS, size=33), "size=33, stride=1 for images of 32×32"),
    (lambda: visualize.occlusion(MODEL, PARAMS, IMAGES, LABELS, size=4, stride=0), "stride of at least 1"),
    (lambda: visualize.occlusion(MODEL, PARAMS, IMAGES, [1], size=4), r"labels of shape \[1\] for 2 images"),
    (lambda: visualize.saliency(MODEL, PARAMS, IMAGES, 1), r"labels of shape \[\] for 2 images"),
    (lambda: maximized("conv6", [0]), "layer='conv6': expected one of conv1, conv2"),
    (lambda: maximized("pool5", [0]), "layer='pool5'"),
    (lambda: maximized("conv5", [12]), "0 to 11, the channels or units of conv5"),
    (lambda: maximized("conv5", []), r"units=\[\]"),
])  # fmt: skip
def test_what_cannot_be_visualized_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def maximized(layer, units):
    return visualize.maximize(MODEL, PARAMS, jax.random.key(0), (32, 32, 3), layer, units)
