from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from alexnet_jax import augment, center_crop, pca_lighting, random_crop, random_flip, rgb_pca, ten_crop
from alexnet_jax.augment import example_keys


def coordinates(batch, height, width):
    """Images whose pixel at (r, c) is 100 r + c, so that a crop shows its position."""
    image = 100 * np.arange(height)[:, None] + np.arange(width)
    return np.broadcast_to(image[None, :, :, None], (batch, height, width, 1)).astype(np.float32)


class RandomCropTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_crops_are_contiguous_and_every_position_is_equally_likely(self):
        size, positions = 6, (3, 4)  # of an 8×9 image
        images = coordinates(6000, 8, 9)
        crops = np.asarray(self.variant(lambda k, x: random_crop(k, x, size))(jax.random.key(0), images))
        corner = crops[:, 0, 0, 0].astype(int)
        contiguous = coordinates(1, size, size) + crops[:, :1, :1]
        np.testing.assert_array_equal(crops, contiguous)
        counts = np.zeros(positions)
        np.add.at(counts, (corner // 100, corner % 100), 1)
        expected = 6000 / counts.size
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 31.3  # 11 degrees of freedom: one in a thousand

    def test_dtype_is_kept_and_the_key_decides(self):
        images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
        one = random_crop(jax.random.key(0), images, 5)
        assert one.dtype == jnp.uint8 and one.shape == (2, 5, 5, 3)
        np.testing.assert_array_equal(one, random_crop(jax.random.key(0), images, 5))

    @chex.variants(with_jit=True)
    def test_products_take_the_same_crops_as_slices_do(self):
        images = jax.random.uniform(jax.random.key(1), (50, 9, 8, 3), minval=-255, maxval=255)
        corners = jax.random.randint(jax.random.key(2), (50, 2), 0, jnp.array([4, 3]))
        for flip in (None, jax.random.bernoulli(jax.random.key(3), shape=(50,))):
            expected = augment._crop_by_slices(corners, flip, images, 6)
            for dtype in (jnp.float32, jnp.bfloat16):
                crops = self.variant(partial(augment._crop_by_products, size=6, dtype=dtype))(corners, flip, images)
                np.testing.assert_array_equal(crops, expected.astype(dtype).astype(jnp.float32))

    def test_crops_with_a_key_for_flips_are_those_of_both_functions(self):
        images, (crop_key, flip_key) = coordinates(20, 8, 9), jax.random.split(jax.random.key(0))
        both = random_crop(crop_key, images, 6, flip_key=flip_key)
        np.testing.assert_array_equal(both, random_flip(flip_key, random_crop(crop_key, images, 6)))

    def test_size_that_does_not_fit(self):
        with pytest.raises(ValueError, match="size=9"):
            random_crop(jax.random.key(0), coordinates(1, 8, 10), 9)


@pytest.mark.parametrize("channels", [1, 3])
def test_random_flip_flips_half_of_the_images(channels):
    images = np.random.default_rng(0).normal(size=(4000, 3, 5, channels)).astype(np.float32)
    flipped = np.asarray(random_flip(jax.random.key(1), images))
    are_flipped = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == images).all((1, 2, 3)) ^ are_flipped).all()
    assert abs(are_flipped.mean() - 0.5) < 0.03  # 3.8 standard deviations


@pytest.mark.parametrize("function", [
    lambda key, x: random_crop(key, x, 4), random_flip, lambda key, x: pca_lighting(key, x, np.ones(3), np.eye(3)),
])  # fmt: skip
def test_a_key_of_either_kind_draws_the_same(function):
    images = np.random.default_rng(0).random((6, 5, 5, 3)).astype(np.float32)
    expected = function(jax.random.key(3), images)
    np.testing.assert_array_equal(function(jax.random.PRNGKey(3), images), expected)
    np.testing.assert_array_equal(function(example_keys(jax.random.PRNGKey(3), 6), images), expected)


@pytest.mark.parametrize("function", [
    lambda x: random_crop(jax.random.key(0), x, 2), lambda x: random_flip(jax.random.key(0), x),
    lambda x: pca_lighting(jax.random.key(0), x, np.ones(3), np.eye(3)), lambda x: center_crop(x, 2),
    lambda x: ten_crop(x, 2),
])  # fmt: skip
def test_one_image_without_a_batch_axis_is_refused(function):
    with pytest.raises(ValueError, match=r"shape \(4, 4, 3\): expected \[B, H, W, C\]"):
        function(jnp.ones((4, 4, 3)))


class LightingTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_covariance_of_the_shift_is_the_formula(self):
        rng = np.random.default_rng(0)
        eigenvectors = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        eigenvalues = np.array([0.2175, 0.0188, 0.0045])
        images = rng.random((20_000, 2, 2, 3)).astype(np.float32)
        out = self.variant(pca_lighting)(jax.random.key(2), images, eigenvalues, eigenvectors)
        shift = np.asarray(out, np.float64) - images
        np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6)  # one per image
        shift = shift[:, 0, 0] @ eigenvectors  # along the principal directions
        expected = 0.1 * eigenvalues
        np.testing.assert_allclose(shift.std(0), expected, rtol=0.02)
        assert (np.abs(shift.mean(0)) < 4 * expected / np.sqrt(len(shift))).all()
        correlation = np.corrcoef(shift.T) - np.eye(3)
        assert np.abs(correlation).max() < 0.03

    @parameterized.parameters(((1, 4, 4, 1), "float32", "three|3"), ((1, 4, 4, 3), "uint8", "uint8: expected floats"))
    def test_gray_and_integer_images_are_refused(self, shape, dtype, words):
        with pytest.raises(ValueError, match=words):
            pca_lighting(jax.random.key(0), jnp.ones(shape, dtype), np.ones(3), np.eye(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_ten_crop_is_the_corners_the_center_and_their_flips(channels):
    images = np.random.default_rng(0).normal(size=(2, 256, 256, channels)).astype(np.float32)
    crops = np.asarray(ten_crop(images, 224))
    assert crops.shape == (2, 10, 224, 224, channels)
    for i, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]):
        np.testing.assert_array_equal(crops[:, i], images[:, top : top + 224, left : left + 224])
        np.testing.assert_array_equal(crops[:, i + 5], crops[:, i, :, ::-1])
    np.testing.assert_array_equal(center_crop(images, 224), crops[:, 4])


def test_ten_crop_that_does_not_fit():
    with pytest.raises(ValueError, match="size=11"):
        ten_crop(jnp.ones((1, 10, 12, 3)), 11)


def test_rgb_pca_against_numpy_and_streaming():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 3))
    images = np.clip(rng.normal(size=(50, 9, 7, 3)) @ mixing * 30 + 120, 0, 255).astype(np.uint8)
    eigenvalues, eigenvectors = rgb_pca(images)
    covariance = np.cov(images.reshape(-1, 3).T.astype(np.float64), bias=True)
    assert eigenvalues.dtype == np.float64 and (np.diff(eigenvalues) < 0).all()
    np.testing.assert_allclose(eigenvectors @ np.diag(eigenvalues) @ eigenvectors.T, covariance, rtol=1e-9)
    streamed, _ = rgb_pca(images[i : i + 7] for i in range(0, 50, 7))
    np.testing.assert_allclose(streamed, eigenvalues, rtol=1e-12)


@pytest.mark.parametrize("images,words", [(np.ones((2, 4, 4, 1)), "expected"), ([], "two pixels")])
def test_rgb_pca_needs_three_channels(images, words):
    with pytest.raises(ValueError, match=words):
        rgb_pca(images)


def test_augmentation_depends_on_the_key_and_the_index_alone():
    images = np.random.default_rng(0).normal(size=(8, 9, 9, 3)).astype(np.float32)
    key = jax.random.key(7)
    for function in (
        lambda x: random_crop(key, x, 6),
        lambda x: random_flip(key, x),
        lambda x: pca_lighting(key, x, np.ones(3), np.eye(3)),
    ):
        np.testing.assert_array_equal(function(images)[:3], function(images[:3]))
