"""The float64 references against their definitions: SciPy's correlation, and slopes along random directions."""

from functools import partial

import numpy as np
import pytest
import reference


def random_arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in shapes]


def assert_slopes(function, x, gradient, g, step=1e-6, rel=1e-6):
    """<gradient, direction> is the slope of <g, function(x)> along it."""
    (direction,) = random_arrays(np.shape(x))
    slope = (np.vdot(g, function(x + step * direction)) - np.vdot(g, function(x - step * direction))) / (2 * step)
    assert np.vdot(gradient, direction) == pytest.approx(slope, rel=rel)


@pytest.mark.parametrize("stride,padding", [(1, ((0, 0), (0, 0))), (1, ((1, 2), (0, 3))), (3, ((2, 1), (1, 0)))])
def test_conv_is_scipys_correlation(stride, padding):
    x, w = random_arrays((2, 9, 11, 3), (4, 4, 3, 5))
    y = reference.conv(x, w, stride, padding)
    np.testing.assert_allclose(y, reference.scipy_conv(x, w, stride, padding), atol=1e-12)
    (g,) = random_arrays(y.shape)
    dx, dw = reference.conv_gradient(x, w, g, stride, padding)
    assert_slopes(lambda x: reference.conv(x, w, stride, padding), x, dx, g)
    assert_slopes(lambda w: reference.conv(x, w, stride, padding), w, dw, g)


def test_lrn_by_a_loop_over_channels():
    (a,) = random_arrays((2, 3, 3, 9))
    b, k, n, alpha, beta = np.empty_like(a), 2.0, 5, 0.3, 0.75
    for i in range(9):
        low, high = max(0, i - n // 2), min(8, i + n // 2)
        b[..., i] = a[..., i] / (k + alpha * (a[..., low : high + 1] ** 2).sum(-1)) ** beta
    np.testing.assert_allclose(reference.lrn(a, k, n, alpha, beta), b, rtol=1e-12)


def test_spatial_norm_by_a_loop_over_pixels():
    (a,) = random_arrays((2, 6, 7, 3))
    b = np.empty_like(a)
    for r in range(6):
        for c in range(7):
            window = a[:, max(0, r - 2) : r + 3, max(0, c - 2) : c + 3]
            b[:, r, c] = a[:, r, c] / (1.5 + 0.4 / 25 * (window**2).sum((1, 2))) ** 0.6
    np.testing.assert_allclose(reference.spatial_norm(a, 5, 0.4, 0.6, 1.5), b, rtol=1e-12)


@pytest.mark.parametrize("name,constants", [
    ("lrn", (2.0, 5, 0.3, 0.75)), ("lrn", (1.0, 3, 2.0, 0.5)), ("spatial_norm", (5, 0.4, 0.6, 1.5)), ("relu", ()),
    ("tanh", ()), ("max_pool", (3, 2)), ("max_pool", (2, 3)),
])  # fmt: skip
def test_gradients_are_slopes(name, constants):
    (x,) = random_arrays((2, 7, 8, 6))
    function, gradient = getattr(reference, name), getattr(reference, f"{name}_gradient")
    (g,) = random_arrays(function(x, *constants).shape)
    assert_slopes(lambda x: function(x, *constants), x, gradient(x, g, *constants), g)


def test_the_first_of_several_maxima_takes_the_gradient():
    dx = reference.max_pool_gradient(np.ones((1, 5, 5, 1)), np.float64([[[[1], [2]], [[3], [4]]]]))
    expected = np.zeros((5, 5))
    expected[:3:2, :3:2] = [[1, 2], [3, 4]]
    np.testing.assert_array_equal(dx[0, :, :, 0], expected)


def test_cross_entropy_of_logits_far_apart():
    logits, labels = np.float64([[1000, 0, 0], [0, 0, 0]]), np.array([1, 2])
    assert reference.cross_entropy(logits, labels) == pytest.approx((1000 + np.log(3)) / 2)
    (near,) = random_arrays((2, 3))
    gradient = reference.cross_entropy_gradient(near, labels)
    assert_slopes(lambda x: reference.cross_entropy(x, labels), near, gradient, 1.0)
    np.testing.assert_allclose(reference.softmax(logits)[0], [1, 0, 0])


WIDTHS = {"conv1": (5, 5, 3, 8), "conv2": (5, 5, 4, 8), "conv3": (3, 3, 8, 6), "conv4": (3, 3, 3, 8),
          "conv5": (3, 3, 4, 4), "fc6": (4, 6), "fc7": (6, 6), "fc8": (6, 5)}  # fmt: skip


@pytest.mark.parametrize("how", [
    dict(), dict(variant="source2012"), dict(variant="caffe"), dict(activation="tanh"), dict(use_lrn=False),
    dict(scale=0.5), dict(towers=1), dict(variant="torchvision"),
], ids=str)  # fmt: skip
def test_the_networks_gradients_are_slopes(how):
    shapes = WIDTHS | ({"conv2": (5, 5, 8, 8), "conv4": (3, 3, 6, 8), "conv5": (3, 3, 8, 4)} if "towers" in how else {})
    kernels = dict(zip(shapes, random_arrays(*shapes.values()), strict=True))
    params = {
        name: {"kernel": w / np.sqrt(w[..., 0].size), "bias": w[(0,) * (w.ndim - 1)]} for name, w in kernels.items()
    }
    torchvision = how.get("variant") == "torchvision"
    images, mask, inputs_mask = random_arrays((2, 32, 32, 3), (2, 6), (2, 4))
    images *= 1 if "activation" in how else 60  # LRN scales large ones, tanh saturates
    masks = inputs_mask < 0.9 if torchvision else mask > 0.5, mask < 0.9
    labels, how = np.array([4, 0]), dict(stem=(5, 2, 2), masks=masks, **how)
    _, _, gradients = reference.loss_and_gradients(params, images, labels, **how)
    assert set(gradients) == set(params)

    def loss(w, name, leaf):
        changed = params | {name: params[name] | {leaf: w}}
        return reference.loss_and_gradients(changed, images, labels, **how)[0]

    for name, of in params.items():
        for leaf, w in of.items():
            function = partial(loss, name=name, leaf=leaf)
            assert_slopes(function, w, gradients[name][leaf], 1.0, step=1e-7, rel=1e-4)


def test_augmentation_with_given_positions_flips_and_alpha():
    (images,) = random_arrays((2, 6, 7, 3))
    np.testing.assert_array_equal(reference.crop(images, [(0, 2), (1, 1)], 4)[1], images[1, 1:5, 1:5])
    np.testing.assert_array_equal(reference.flip(images, [True, False])[0, :, 0], images[0, :, 6])
    np.testing.assert_array_equal(reference.flip(images, [True, False])[1], images[1])
    axes = np.float64([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    shifted = reference.pca_lighting(images, [[1, 0, 0], [0, 0, 2]], [3, 4, 5], axes)
    np.testing.assert_allclose(shifted - images, np.broadcast_to([[[[0, 3, 0]]], [[[0, 0, 10]]]], images.shape))
    line = np.arange(4.0)[None, None, :, None]
    np.testing.assert_allclose(
        reference.resize(np.repeat(line, 4, 1), 8)[0, 3, :, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    )
