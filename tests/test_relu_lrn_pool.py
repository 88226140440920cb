"""`relu_lrn_pool` of GPUs and of TPUs against loops in float64, in Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from alexnet_jax.ops import relu_lrn_pool_gpu as gpu
from alexnet_jax.ops import relu_lrn_pool_tpu as tpu

K, N, ALPHA, BETA = 2.0, 5, 1e-4, 0.75
on_both = pytest.mark.parametrize("platform", [gpu, tpu], ids=["gpu", "tpu"])


def check(x, towers, bias=None, function=None, **constants):
    constants = dict(k=K, n=N, alpha=ALPHA, beta=BETA) | constants
    bias = np.zeros(x.shape[-1], np.float32) if bias is None else bias

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is most of the time
    def pull(x, bias, dy):
        y, pullback = jax.vjp(lambda x, b: function(x, b, towers, **constants), x, bias)
        return y, *pullback(dy)

    shape = (x.shape[0], (x.shape[1] - 1) // 2, (x.shape[2] - 1) // 2, x.shape[3])
    dy = jnp.asarray(np.random.default_rng(1).normal(size=shape), x.dtype)
    y, dx, dbias = pull(x, bias, dy)
    assert (y.dtype, dx.dtype, y.shape, dx.shape) == (x.dtype, x.dtype, shape, x.shape)
    tolerance = 1e-5 if x.dtype == jnp.float32 else 2**-7
    want_y, want_dx = reference.relu_lrn_pool(np.asarray(x, np.float64) + bias, dy, towers, **constants)
    for got, want in ((y, want_y), (dx, want_dx)):
        error = abs(np.asarray(got, np.float64) - want)
        assert (error <= tolerance * np.maximum(abs(want), 1)).all(), error.max()
    np.testing.assert_allclose(dbias, want_dx.sum((0, 1, 2)), rtol=tolerance, atol=tolerance * 10)


def images(shape, dtype, scale=50.0):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) * scale, dtype)


def interpreted(platform, inputs=1, outputs=1):
    """Return the kernels as a function of one array, which goes in and comes out as so many."""
    if platform is tpu:
        return partial(tpu.fused_relu_lrn_pool, interpret=True)
    return in_arrays(partial(gpu.fused_relu_lrn_pool, interpret=True), inputs, outputs)


def in_arrays(function, inputs, outputs):
    def joined(x, bias, towers, **constants):
        y = function(jnp.split(x, inputs, axis=-1), bias, towers, outputs=outputs, **constants)
        assert len(y) == outputs and len({part.shape for part in y}) == 1
        return jnp.concatenate(y, axis=-1)

    return joined


@on_both
@pytest.mark.parametrize(
    "shape, dtype, with_bias", [((1, 55, 55, 96), jnp.float32, True), ((1, 27, 27, 256), jnp.bfloat16, False)]
)
def test_result_and_gradient(platform, shape, dtype, with_bias):
    bias = np.random.default_rng(2).normal(size=shape[-1]).astype(np.float32) * 30 * with_bias
    check(images(shape, dtype), 2, bias, interpreted(platform))


@pytest.mark.parametrize("inputs, outputs", [(1, 2), (2, 1), (2, 2)])
def test_an_array_for_each_tower_on_a_gpu(inputs, outputs):
    bias = np.random.default_rng(2).normal(size=32).astype(np.float32) * 30
    check(images((2, 9, 7, 32), jnp.bfloat16), 2, bias, interpreted(gpu, inputs, outputs))


@on_both
@pytest.mark.parametrize("inputs, outputs", [(1, 2), (2, 1)])
def test_an_array_for_each_tower_without_the_kernels(platform, inputs, outputs):
    check(images((2, 9, 9, 12), jnp.float32), 2, None, in_arrays(platform.relu_lrn_pool, inputs, outputs))


@on_both
def test_one_tower_other_constants_and_edges_without_a_window(platform):
    shape = (2, 4, 6, 24 if platform is gpu else 16)
    check(images(shape, jnp.float32), 1, None, interpreted(platform), n=7, beta=1.0, k=1.0, alpha=1e-3)


@on_both
def test_first_of_equal_maxima_gets_the_gradient(platform):
    values = jnp.asarray([3.0, 0.0, -1.0], jnp.bfloat16)
    check(jnp.broadcast_to(values[:, None, None, None], (3, 9, 9, 32)), 2, None, interpreted(platform))


def test_a_last_block_of_images_that_is_not_full_on_a_tpu():
    check(images((tpu.LANES + 2, 5, 5, 16), jnp.float32), 1, np.full(16, 3.0, np.float32), interpreted(tpu))


@pytest.mark.parametrize(
    "shape, dtype, change, message",
    [
        ((1, 9, 9, 16), jnp.float16, {}, "float16"),
        ((1, 9, 9, 16), jnp.float32, dict(window=2), "window=2"),
        ((1, 9, 9, 16), jnp.float32, dict(n=4), "n=4"),
        ((1, 9, 9, 16), jnp.float32, dict(alpha=0.0), "alpha=0.0"),
        ((1, 9, 9, 16), jnp.float32, dict(bias=jnp.zeros(8)), "bias"),
        ((1, 9, 9, 12), jnp.float32, {}, "multiple of 8"),
        ((1, 2, 9, 16), jnp.float32, {}, "from 3"),
    ],
)
def test_what_it_does_not_take(shape, dtype, change, message):
    arguments = dict(bias=jnp.zeros(shape[-1]), towers=1, k=K, n=N, alpha=ALPHA, beta=BETA) | change
    with pytest.raises(ValueError, match=message):
        gpu.fused_relu_lrn_pool([jnp.zeros(shape, dtype)], **arguments)


@pytest.mark.parametrize(
    "shape, dtype, change, message",
    [
        ((1, 9, 9, 16), jnp.float16, {}, "float16"),
        ((1, 9, 9, 16), jnp.float32, dict(window=2), "window=2"),
        ((1, 9, 9, 16), jnp.float32, dict(n=4), "n=4"),
        ((1, 9, 9, 16), jnp.float32, dict(bias=jnp.zeros(8)), "bias"),
        ((1, 9, 9, 24), jnp.float32, {}, "multiple of 16"),
        ((1, 2, 9, 16), jnp.float32, {}, "from 3"),
        ((128, 9, 999, 96), jnp.float32, {}, "vector memory"),
    ],
)
def test_what_the_tpu_kernels_do_not_take(shape, dtype, change, message):
    arguments = dict(bias=jnp.zeros(shape[-1]), towers=1, k=K, n=N, alpha=ALPHA, beta=BETA) | change
    with pytest.raises(ValueError, match=message):
        tpu.fused_relu_lrn_pool(jnp.zeros(shape, dtype), **arguments)


@on_both
def test_channels_that_the_kernels_do_not_take(platform):
    check(images((2, 9, 9, 12), jnp.float32), 2, np.full(12, 3.0, np.float32), in_arrays(platform.relu_lrn_pool, 1, 1))
