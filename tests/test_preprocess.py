from functools import partial

import jax
import numpy as np
import pytest
import reference

from alexnet_jax.augment import rgb_pca
from alexnet_jax.configs import cifar10, fashion_mnist, fashion_mnist_224
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.preprocess import Statistics, fit, measure
from alexnet_jax.setup import build_preprocess


def color_images(n=40, side=8):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_mean_image_is_subtracted_and_the_border_is_mean_color():
    images = color_images()
    p = fit(images, pad=2, crop=12, resize=0, flip=False, lighting=False)
    np.testing.assert_allclose(p.mean, images.mean(0), rtol=1e-6)
    x = np.asarray(p.center_crop(images))
    np.testing.assert_allclose(x[:, 2:-2, 2:-2], images - images.mean(0), atol=1e-4)
    assert (x[:, :2] == 0).all() and (x[:, :, -2:] == 0).all()
    np.testing.assert_array_equal(p.train(jax.random.key(0), images), x)  # one place only, nothing else on


def test_scale_and_resize():
    images = color_images()
    small = np.asarray(fit(images, 0, 8, 0, False, False, scale=0.5).center_crop(images), np.float64)
    np.testing.assert_allclose(small, (images - images.mean(0)) / 2, atol=1e-4)
    large = fit(images, 0, 8, 32, False, False, scale=0.5)
    assert large.image_shape == (32, 32, 3)
    # Four pixels for one: the center of pixel 4r lies 5/8 of the way from the center of r - 1 to that of r.
    weights = np.array([3 / 8, 5 / 8])
    expected = np.einsum("i,j,bijk->bk", weights, weights, small[:, 2:4, 3:5])
    x = np.asarray(large.center_crop(images))
    np.testing.assert_allclose(x[:, 12, 16], expected, atol=1e-3)
    np.testing.assert_allclose(x, reference.resize(small, 32), atol=1e-3)


def test_training_augments_and_testing_does_not():
    images = color_images(200)
    p = fit(images, pad=0, crop=6, resize=0, flip=True, lighting=True)
    first, second = (np.asarray(p.train(jax.random.key(k), images)) for k in (0, 1))
    assert (first != second).any(axis=(1, 2, 3)).all()  # lighting moves every image
    np.testing.assert_allclose(p.center_crop(images), (images - images.mean(0))[:, 1:7, 1:7], atol=1e-4)
    assert p.ten_crop(images).shape == (200, 10, 6, 6, 3)
    np.testing.assert_array_equal(p.ten_crop(images)[:, 4], p.center_crop(images))
    without_flips = fit(images, pad=0, crop=6, resize=0, flip=False, lighting=True).ten_crop(images)
    np.testing.assert_array_equal(without_flips, p.ten_crop(images)[:, :5])


def test_without_random_crops_training_takes_the_center_crop():
    images = color_images()
    p = fit(images, pad=1, crop=6, resize=0, flip=False, lighting=False, random_crop=False)
    np.testing.assert_array_equal(p.train(jax.random.key(0), images), p.center_crop(images))


def test_pca_lighting_has_the_scale_of_the_pixels():
    images = color_images(500)
    p = fit(images, pad=0, crop=8, resize=0, flip=False, lighting=True)
    x = np.asarray(p.train(jax.random.key(0), images), np.float64) - (images - images.mean(0))
    shift = x[:, 0, 0] @ rgb_pca(images)[1]
    unit_eigenvalues, _ = rgb_pca(images / 255.0)  # the paper's λ, of pixels in [0, 1]
    np.testing.assert_allclose(shift.std(0), 0.1 * unit_eigenvalues * 255, rtol=0.15)


def test_gray_images_have_no_pca_lighting():
    with pytest.raises(ValueError, match="expected"):
        fit(color_images()[..., :1], 0, 8, 0, False, lighting=True)


def test_it_is_an_argument_of_a_jitted_function():
    images = color_images()
    p = fit(images, pad=1, crop=6, resize=0, flip=True, lighting=True, scale=0.5)
    assert len(jax.tree.leaves(p)) == 3  # the mean image, and the factors and directions of PCA lighting
    np.testing.assert_allclose(jax.jit(lambda p, x: p.ten_crop(x))(p, images), p.ten_crop(images), atol=1e-4)
    key = jax.random.key(0)
    np.testing.assert_allclose(jax.jit(lambda p, x: p.train(key, x))(p, images), p.train(key, images), atol=1e-4)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_gray_images_in_three_channels_have_finite_lighting_along_gray(exponent):
    gray = np.random.default_rng(1).integers(0, 256, (30, 16, 16, 1), dtype=np.uint8).repeat(3, -1)
    values, vectors = rgb_pca(gray)
    assert (values >= 0).all() and np.abs(vectors[:, 0]) == pytest.approx(3**-0.5)
    negative = Statistics(gray.mean(0), np.array([values[0], -1e-13, -1e-12]), vectors)  # as some data sets store them
    for source in (gray, negative):
        p = fit(source, 0, 16, 0, False, True, lighting_exponent=exponent)
        x = np.asarray(p.train(jax.random.key(0), gray))
        shift = x - (gray - gray.mean(0))
        assert np.isfinite(x).all() and np.abs(shift).max() > 1
        np.testing.assert_allclose(shift, shift[:, :1, :1, :1] * np.ones(shift.shape), atol=0.02)


@pytest.mark.parametrize(
    "module,shifts", [(fashion_mnist, (-1, 0, 1)), (fashion_mnist_224, (-2, -1, 0, 1, 2)), (cifar10, (-2, -1, 0, 1, 2))]
)
def test_crops_of_small_images_are_shifted_equally_to_every_side(synthetic, module, shifts):
    config, count = module.get_config(), 200 * len(shifts) ** 2
    config.resize, config.flip, config.lighting = 0, False, False  # the crop as it is
    side = 32 if module is cifar10 else 28
    images = np.zeros((count, side, side, 1), np.uint8)
    p = build_preprocess(config, Dataset(synthetic), partial(measure, [images]))
    images[:, 14, 14] = 200

    def position(crops):
        return np.stack(np.nonzero(np.asarray(crops)[..., 0])[1:], axis=-1)  # of the one pixel

    test = position(p.center_crop(images[:1]))[0]
    crops = position(p.train(jax.random.key(0), images))
    assert len(crops) == count
    found, counts = np.unique(crops - test, axis=0, return_counts=True)
    assert found.tolist() == [[y, x] for y in shifts for x in shifts]  # the test crop is in the middle
    assert np.abs(counts - 200).max() < 5 * 200**0.5
