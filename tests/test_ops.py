from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from absl.testing import parameterized
from jax.test_util import check_grads

from alexnet_jax import OPS, PLAIN, ops
from alexnet_jax.ops import CUDA, lrn


class LocalResponseNormTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        (2.0, 5, 1e-4, 0.75, 30.0), (1.0, 5, 2e-5, 0.75, 100.0), (2.0, 3, 1e-2, 0.5, 5.0), (2.0, 1, 1e-4, 0.75, 30.0),
        (2.0, 9, 1e-4, 0.75, 30.0),
    )  # fmt: skip
    def test_forward_and_gradient_against_float64(self, k, n, alpha, beta, size):
        rng = np.random.default_rng(0)
        x = (rng.standard_normal((2, 3, 5, 8)) * size).astype(np.float32)
        g = rng.standard_normal(x.shape).astype(np.float32)

        def both(x, g):
            y, vjp = jax.vjp(lambda x: ops.local_response_norm(x, k, n, alpha, beta), x)
            return y, vjp(g)[0]

        y, dx = self.variant(both)(x, g)
        exact_y, exact_dx = reference.lrn(x, k, n, alpha, beta), reference.lrn_gradient(x, g, k, n, alpha, beta)
        assert np.max(np.abs(y - exact_y) / np.abs(exact_y)) < 1e-5
        assert np.max(np.abs(dx - exact_dx)) / np.max(np.abs(exact_dx)) < 1e-5

    def test_bfloat16_in_and_out(self):
        x = jnp.linspace(-50, 50, 64, dtype=jnp.bfloat16).reshape(2, 2, 2, 8)
        y = ops.local_response_norm(x)
        assert y.dtype == jnp.bfloat16
        chex.assert_trees_all_close(y.astype(np.float32), reference.lrn(x, 2.0, 5, 1e-4, 0.75), rtol=0.01)

    def test_even_window_is_refused(self):
        with pytest.raises(ValueError, match="n=4"):
            ops.local_response_norm(jnp.ones((1, 8)), n=4)


@pytest.mark.parametrize("name,shape,argument", [
    ("local_response_norm", (1, 8), dict(n=4)), ("local_response_norm", (1, 8), dict(n=2.5)),
    ("spatial_response_norm", (1, 8, 8, 1), dict(size=4)), ("max_pool", (1, 2, 8, 1), dict(window=3)),
])  # fmt: skip
def test_both_bundles_refuse_the_same_arguments(name, shape, argument):
    for bundle in (ops.OPS, ops.PLAIN):
        with pytest.raises(ValueError, match=f"{name}: .*expected"):
            getattr(bundle, name)(jnp.ones(shape), **argument)


class SpatialResponseNormTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((5, 0.001, 0.75, 1.0), (3, 0.1, 0.5, 2.0), (1, 0.001, 0.75, 1.0))
    def test_forward_and_gradient_against_float64(self, size, scale, power, min_div):
        rng = np.random.default_rng(0)
        x = (rng.standard_normal((2, 6, 7, 3)) * 50).astype(np.float32)
        g, direction = rng.standard_normal((2, *x.shape))
        y, vjp = jax.vjp(self.variant(lambda x: ops.spatial_response_norm(x, size, scale, power, min_div)), x)
        exact = lambda x: reference.spatial_norm(x, size, scale, power, min_div)  # noqa: E731
        np.testing.assert_allclose(y, exact(x), rtol=1e-5)
        slope = (exact(x + 1e-3 * direction) - exact(x - 1e-3 * direction)) / 2e-3
        assert np.vdot(vjp(g.astype(np.float32))[0], direction) == pytest.approx(np.vdot(g, slope), rel=1e-3)

    def test_even_window_is_refused(self):
        with pytest.raises(ValueError, match="size=4"):
            ops.spatial_response_norm(jnp.ones((1, 8, 8, 1)), size=4)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
@pytest.mark.parametrize("norm", [ops.local_response_norm, ops.spatial_response_norm])
def test_normalization_refuses_integers(norm, dtype):
    with pytest.raises(ValueError, match=f"{norm.__name__}: {dtype}: expected floats"):
        norm(jnp.ones((1, 6, 6, 8), dtype))


def xla_max_pool(x, window, stride):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID")


class MaxPoolTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((55, 55, 3, 2), (13, 13, 3, 2), (6, 7, 3, 2), (8, 9, 2, 2), (10, 7, 3, 3), (5, 5, 3, 1))
    def test_values_and_gradient(self, height, width, window, stride):
        rng = np.random.default_rng(1)
        x = rng.integers(-3, 4, (2, height, width, 3)).astype(np.float32)  # full of ties
        y, vjp = jax.vjp(self.variant(lambda x: ops.max_pool(x, window, stride)), x)
        np.testing.assert_array_equal(y, reference.max_pool(x, window, stride))
        g = rng.standard_normal(y.shape).astype(np.float32)
        expected = jax.vjp(lambda x: xla_max_pool(x, window, stride), x)[1](g)[0]
        chex.assert_trees_all_close(vjp(g)[0], expected, atol=1e-5)
        chex.assert_trees_all_close(vjp(g)[0], reference.max_pool_gradient(x, g, window, stride), atol=1e-5)

    @parameterized.parameters((3, 2, "at least 3"), (0, 2, "window=0, stride=2"), (2, 0, "window=2, stride=0"))
    def test_images_smaller_than_a_window_are_refused(self, window, stride, words):
        with pytest.raises(ValueError, match=words):
            ops.max_pool(jnp.ones((1, 2, 5, 1)), window, stride)


@pytest.mark.parametrize("shape,kernel,stride,words", [
    ((1, 9, 9, 3), (3, 5, 3, 4), 1, "expected"), ((1, 9, 9, 3), (3, 3, 2, 4), 1, "expected"),
    ((9, 9, 3), (3, 3, 3, 4), 1, "expected"), ((1, 9, 9, 3), (3, 3, 3), 1, "expected"),
    ((1, 9, 9, 3), (3, 3, 3, 4), 0, "stride=0"), ((1, 2, 9, 3), (3, 3, 3, 4), 1, "smaller than the kernel, 3×3"),
])  # fmt: skip
def test_conv_refuses_shapes_that_do_not_fit(shape, kernel, stride, words):
    with pytest.raises(ValueError, match=f"conv: images .*{words}"):
        ops.conv(jnp.ones(shape), jnp.ones(kernel), stride, ((0, 0), (0, 0)))


@pytest.mark.parametrize("channels,size,kernel,stride,padding", [
    (1, 12, 5, 1, (2, 2)), (3, 24, 11, 4, (0, 3)), (8, 9, 3, 1, (1, 1)), (1, 28, 5, 2, (2, 3)),
])  # fmt: skip
def test_conv_against_scipy(channels, size, kernel, stride, padding):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, size, size, channels)).astype(np.float32)
    w = rng.standard_normal((kernel, kernel, channels, 4)).astype(np.float32)

    def exact(x, w):
        return reference.scipy_conv(x, w, stride, (padding, padding))

    f = lambda x, w: ops.conv(x, w, stride, (padding, padding))  # noqa: E731
    y, vjp = jax.vjp(f, x, w)
    chex.assert_trees_all_close(y, exact(x, w), rtol=1e-4, atol=1e-4)
    # The operation is linear in each argument, so <g, conv(dx, w)> = <vjp(g), dx> for any dx.
    g = rng.standard_normal(y.shape).astype(np.float32)
    dx, dw = vjp(g)
    ux, uw = rng.standard_normal(x.shape), rng.standard_normal(w.shape)
    assert np.vdot(dx, ux) == pytest.approx(np.vdot(g, exact(ux, w)), rel=1e-3, abs=1e-2)
    assert np.vdot(dw, uw) == pytest.approx(np.vdot(g, exact(x, uw)), rel=1e-3, abs=1e-2)


class DropoutTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_half_are_zero_and_the_rest_unscaled(self):
        y = np.asarray(self.variant(ops.dropout)(jax.random.key(0), jnp.full((64, 512), 3.0)))
        assert set(np.unique(y)) == {0.0, 3.0}
        assert abs((y == 0).mean() - 0.5) < 0.01  # 32768 draws: one standard deviation is 0.003

    def test_mask_is_a_function_of_key_example_and_tower(self):
        ones = lambda n: jnp.ones((n, 64))  # noqa: E731
        key = jax.random.key(3)
        many, few = ops.dropout(key, ones(8)), ops.dropout(key, ones(3))
        np.testing.assert_array_equal(many[:3], few)
        assert (many[0] != many[1]).any() and (many[:, :32] != many[:, 32:]).any()
        assert (many != ops.dropout(jax.random.key(4), ones(8))).any()
        np.testing.assert_array_equal(many, ops.dropout(jax.random.PRNGKey(3), ones(8)))

    @parameterized.parameters(
        ((4, 8), 2.0, 2, "rate=2.0"), ((4, 8), -0.1, 2, "rate=-0.1"), ((4, 9), 0.5, 2, r"\(4, 9\).*towers=2"),
        ((4, 8), 0.5, 0, "towers=0"), ((8,), 0.5, 2, r"\[B, N\]"),
    )  # fmt: skip
    def test_wrong_rates_and_shapes_are_refused(self, shape, rate, towers, words):
        with pytest.raises(ValueError, match=words):
            ops.dropout(jax.random.key(0), jnp.ones(shape), rate, towers)

    def test_the_rate_may_be_traced(self):
        y = jax.jit(ops.dropout)(jax.random.key(0), jnp.ones((4, 8)), 0.3)
        np.testing.assert_array_equal(y, ops.dropout(jax.random.key(0), jnp.ones((4, 8)), 0.3))


@pytest.mark.parametrize("axis,side", [(3, 5), (3, 1), (1, 9), (2, 3)])
def test_both_platforms_windows_are_the_same(axis, side):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 11)))
    expected = np.stack([
        np.take(np.asarray(x, np.float64), range(max(0, i - side // 2), min(x.shape[axis], i + side // 2 + 1)), axis)
        .sum(axis) for i in range(x.shape[axis])
    ], axis)  # fmt: skip
    for window_sum in (lrn._reduce_window_sum, lrn._shifted_sum):
        np.testing.assert_allclose(window_sum(x, axis, side), expected, rtol=1e-5, atol=1e-5)


KERNEL = np.random.default_rng(5).standard_normal((3, 3, 6, 4)).astype(np.float32)
CALLS = {
    "conv": lambda bundle, x: bundle.conv(x, KERNEL, 2, ((1, 1), (1, 0))),
    "max_pool": lambda bundle, x: bundle.max_pool(x, window=3, stride=2),
    "local_response_norm": lambda bundle, x: bundle.local_response_norm(x, k=2.0, n=5, alpha=0.05, beta=0.75),
    "spatial_response_norm": lambda bundle, x: bundle.spatial_response_norm(x, 3, 0.5, 0.75, 1.0),
    "dropout": lambda bundle, x: bundle.dropout(jax.random.key(0), x.reshape(len(x), -1), 0.5, 2, 0, 0),
}
each_call = pytest.mark.parametrize("name", CALLS)
each_bundle = pytest.mark.parametrize("bundle", [OPS, PLAIN], ids=["custom", "plain"])


def distinct(*shape):
    """Values whose order no small step changes, so that maxima are differentiable."""
    size = np.prod(shape)
    return (np.random.default_rng(6).permutation(size).reshape(shape) / size * 6 - 3).astype(np.float32)


@each_call
@each_bundle
def test_transformations_of_each_operation(name, bundle):
    call, x = lambda x: CALLS[name](bundle, x), distinct(3, 2, 7, 6, 6)
    np.testing.assert_allclose(jax.vmap(call)(x), np.stack([call(one) for one in x]), rtol=1e-5, atol=1e-5)
    check_grads(call, (x[0],), order=1, modes=["rev"], eps=1e-3, rtol=0.02, atol=0.02)

    def loss(f):
        return lambda x: (f(x) ** 2).sum()

    gradient = jax.grad(loss(call))
    np.testing.assert_allclose(jax.grad(loss(jax.checkpoint(call)))(x[0]), gradient(x[0]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(gradient)(x), np.stack([gradient(one) for one in x]), rtol=1e-5, atol=1e-4
    )  # fmt: skip


@each_call
def test_plain_operations_compute_the_same_and_have_forward_mode(name):
    x = distinct(2, 7, 6, 6)
    custom, plain = (lambda x, bundle=bundle: CALLS[name](bundle, x) for bundle in (OPS, PLAIN))
    np.testing.assert_allclose(custom(x), plain(x), rtol=1e-5, atol=1e-5)
    check_grads(plain, (x,), order=2, modes=["fwd", "rev"], eps=1e-3, rtol=0.05, atol=0.05)
    if name != "dropout":
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(custom, (x,), (x,))


@pytest.mark.parametrize("platform,kind,expected", [
    ("cpu", "cpu", OPS), ("gpu", "NVIDIA H100 80GB HBM3", CUDA), ("gpu", "AMD Instinct MI300X", OPS),
    ("tpu", "TPU v5e", ops.TPU),
])  # fmt: skip
def test_the_operations_for_a_device(platform, kind, expected):
    assert ops.ops_for(SimpleNamespace(platform=platform, device_kind=kind)) is expected


def test_a_cpu_uses_the_default_operations():
    assert ops.ops_for(jax.devices("cpu")[0]) is OPS and OPS.relu_lrn_pool is None
