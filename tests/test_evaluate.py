import jax
import numpy as np
import pytest

from alexnet_jax import AlexNet, Stem
from alexnet_jax.evaluate import evaluate, predict
from alexnet_jax.preprocess import fit

MODEL = AlexNet(num_classes=7, stem=Stem(5, 2, 2), widths=(4, 4, 4, 4, 4, 8, 8), kernel_std=(0.4,) * 8)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (53, 30, 30, 1), dtype=np.uint8)
    labels = rng.integers(0, 7, 53).astype(np.int32)
    preprocess = fit(images, 0, 28, 0, True, False, scale=0.02)
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))["params"]
    return params, images, labels, preprocess


@pytest.mark.parametrize("ten_crop", [False, True])
@pytest.mark.parametrize("batch_size", [10, 530, 1000])  # a partial last batch, all in one, more than there are
def test_each_example_is_counted_once(problem, ten_crop, batch_size):
    params, images, labels, preprocess = problem
    p = np.asarray(predict(MODEL, params, images, preprocess, ten_crop), np.float64)
    order = np.argsort(-p, axis=1)
    confusion = np.zeros((7, 7), int)
    np.add.at(confusion, (labels, order[:, 0]), 1)
    result = evaluate(MODEL, params, images, labels, preprocess, ten_crop, batch_size)
    assert result.top1_error == pytest.approx((order[:, 0] != labels).mean())
    assert result.top5_error == pytest.approx(1 - (order[:, :5] == labels[:, None]).any(1).mean())
    assert result.loss == pytest.approx(-np.log(p[np.arange(53), labels]).mean(), rel=1e-5)
    np.testing.assert_array_equal(result.confusion, confusion)


def test_ten_crop_is_the_mean_of_the_softmax(problem):
    params, images, _, preprocess = problem
    patches = np.asarray(preprocess.ten(images[:4]))
    apply = jax.jit(lambda x: MODEL.apply({"params": params}, x))
    logits = [np.asarray(apply(patches[:, i]), np.float64) for i in range(10)]
    softmax = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in logits]
    np.testing.assert_allclose(predict(MODEL, params, images[:4], preprocess, True), np.mean(softmax, 0), rtol=1e-5)


def test_a_network_that_says_nothing_is_wrong_every_time(problem):
    params, images, labels, preprocess = problem
    flat = jax.tree.map(np.zeros_like, params)  # every class is equally likely
    result = evaluate(MODEL, flat, images, labels, preprocess)
    assert result.top1_error == 1 and result.top5_error == 1
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    assert evaluate(MODEL, broken, images, labels, preprocess).top1_error == 1
