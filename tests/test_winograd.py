"""Winograd's convolution against its definition in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from alexnet_jax import PLAIN, ops
from alexnet_jax.ops import winograd


@pytest.mark.parametrize("m,r", [(2, 3), (2, 4), (3, 5), (4, 3)])
def test_minimal_filtering_is_exact_up_to_rounding(m, r):
    random = np.random.default_rng(0)
    d, g = random.standard_normal(m + r - 1), random.standard_normal(r)
    a, g_matrix, b = winograd.matrices(m, r)
    expected = [d[i : i + r] @ g for i in range(m)]
    np.testing.assert_allclose(a.T @ ((g_matrix @ g) * (b @ d)), expected, atol=1e-13)


@pytest.mark.parametrize("batch,size,kernel,stride,padding", [
    (2, (9, 12), 3, 1, ((1, 1), (1, 1))), (3, (14, 13), 5, 1, ((2, 2), (2, 2))), (1, (8, 8), 4, 1, ((0, 2), (1, 0))),
    (10, (24, 31), 11, 4, ((0, 3), (0, 0))), (7, (23, 23), 5, 2, ((2, 1), (1, 2))),
])  # fmt: skip
def test_values_and_both_gradients_are_those_of_float64(batch, size, kernel, stride, padding):
    random = np.random.default_rng(1)
    x, w = random.standard_normal((batch, *size, 6)), random.standard_normal((kernel, kernel, 6, 4))
    expected = reference.conv(x, w, stride, padding)
    g = random.standard_normal(expected.shape)
    dx, dw = reference.conv_gradient(x, w, g, stride, padding)

    x, w, g = (jnp.float32(array) for array in (x, w, g))
    y, gradients = jax.vjp(jax.jit(lambda x, w: winograd.conv(x, w, stride, padding)), x, w)
    for result, exact in ((y, expected), *zip(gradients(g), (dx, dw), strict=True)):
        assert result.dtype == jnp.float32 and result.shape == exact.shape
        assert np.abs(result - exact).max() < 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize("batch,side,shape,stride,pays", [
    (2, 224, (11, 11, 3, 96), 4, True), (2, 27, (5, 5, 48, 128), 1, True), (8, 13, (3, 3, 192, 128), 1, True),
    (64, 13, (5, 5, 16, 32), 1, False), (64, 28, (3, 3, 1, 32), 1, False), (32, 6, (3, 3, 64, 96), 1, False),
    (64, 13, (1, 1, 256, 256), 1, False), (64, 13, (7, 7, 64, 64), 1, False),  # no F(m, r) for them
])  # fmt: skip
def test_a_cpu_uses_it_for_layers_that_are_faster_with_it(batch, side, shape, stride, pays):
    x, kernel = jnp.ones((batch, side, side, shape[2])), jnp.ones(shape)
    both = jax.jit(jax.grad(lambda x, kernel: ops.conv(x, kernel, stride, ((0, 0), (0, 0))).sum(), argnums=(0, 1)))
    lowered = both.trace(x, kernel).lower(lowering_platforms=("cpu",))
    assert ("convolution" not in lowered.as_text()) == pays
    on_gpu = both.trace(x, kernel).lower(lowering_platforms=("cuda",))
    assert "convolution" in on_gpu.as_text()


def test_jax_export_takes_a_symbolic_batch():
    random = np.random.default_rng(4)
    x, w = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 13, 13, 192), (3, 3, 192, 128)))
    assert winograd.pays(x, w, 1)
    (batch,) = jax.export.symbolic_shape("batch")
    convolution = jax.export.export(jax.jit(lambda x: ops.conv(x, w, 1, ((1, 1), (1, 1)))), platforms=("cpu", "cuda"))(
        jax.ShapeDtypeStruct((batch, *x.shape[1:]), np.float32)
    )
    for images in (x[:1], x):
        expected = reference.conv(images, w, 1, ((1, 1), (1, 1)))
        assert np.abs(convolution.call(images) - expected).max() < 2e-5 * np.abs(expected).max()


def test_bfloat16_stays_so_and_is_computed_in_float32():
    random = np.random.default_rng(2)
    x, w = (jnp.bfloat16(random.standard_normal(shape)) for shape in ((2, 9, 9, 64), (5, 5, 64, 64)))
    padding = ((2, 2), (2, 2))
    y = winograd.conv(x, w, 1, padding)
    expected = PLAIN.conv(x.astype(jnp.float32), w.astype(jnp.float32), 1, padding)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("side,shape,stride,padding", [
    (224, (11, 11, 3, 96), 4, ((0, 3), (0, 3))), (27, (5, 5, 48, 128), 1, ((2, 2), (2, 2))),
    (13, (3, 3, 192, 192), 1, ((1, 1), (1, 1))),
])  # fmt: skip
@pytest.mark.parametrize("sharded", [False, True])
def test_the_papers_layers_are_the_same_in_both_implementations(side, shape, stride, padding, sharded):
    random = np.random.default_rng(3)
    x, w = random.standard_normal((4, side, side, shape[2])), random.standard_normal(shape)
    x, w = jnp.float32(x), jnp.float32(w)
    assert winograd.pays(x[:2], w, stride)

    def results(conv):
        def loss(x, w):
            y = conv(x, w, stride, padding)
            return (y * jnp.cos(jnp.arange(y.size // len(y)).reshape(y.shape[1:]))).sum(), y

        def all_of(x, w):
            (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
            return y, gradients

        if sharded:  # the kernel on both devices, so that its gradient is a sum over them
            mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
            by_image = P("data")
            all_of = jax.shard_map(
                all_of, mesh=mesh, in_specs=(by_image, P()), out_specs=(by_image, (by_image, P()))
            )  # fmt: skip
        return jax.jit(all_of)(x, w)

    computed, expected = results(ops.conv), results(PLAIN.conv)
    scaled = jax.tree.map(lambda f, e: f / jnp.abs(e).max(), computed, expected)
    chex.assert_trees_all_close(scaled, jax.tree.map(lambda e: e / jnp.abs(e).max(), expected), atol=3e-5)


@pytest.mark.parametrize("stride", [1, 4])
def test_an_empty_batch_stays_empty(stride):
    x, kernel = jnp.zeros((0, 24, 24, 8)), jnp.ones((3 * stride, 3 * stride, 8, 4))
    side = 24 // stride - 2
    assert winograd.conv(x, kernel, stride, ((0, 0), (0, 0))).shape == (0, side, side, 4)
