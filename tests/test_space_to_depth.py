"""A convolution with a stride as one of stride 1 over blocks of pixels, against float64 and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from alexnet_jax import PLAIN, ops
from alexnet_jax.ops.space_to_depth import space_to_depth, zero_pad

NONE = ((0, 0), (0, 0))
each_layer = pytest.mark.parametrize("shape,side,stride,padding", [
    ((2, 224, 224, 3), 11, 4, ((0, 3), (0, 3))),  # conv1 of section 3.5: rounded up
    ((2, 227, 227, 3), 11, 4, NONE),  # of Caffe
    ((1, 28, 28, 1), 5, 2, ((2, 3), (2, 3))),
    ((3, 23, 30, 2), 7, 3, ((3, 1), (0, 2))),
    ((2, 13, 9, 4), 4, 4, NONE),  # a kernel of one block
    ((2, 12, 17, 3), 3, 4, ((1, 0), (2, 4))),  # a stride larger than the kernel
    ((2, 9, 11, 3), 3, 1, ((1, 2), (0, 1))),
    ((1, 11, 15, 3), 11, 4, NONE),  # one row of outputs
])  # fmt: skip


def over_blocks(x, kernel, stride, padding):
    return PLAIN.conv(*space_to_depth(x, kernel, stride, padding), 1, NONE)


def arrays(shape, side, features=5):
    random = np.random.default_rng(0)
    return random.standard_normal(shape), random.standard_normal((side, side, shape[3], features))


@each_layer
def test_values_and_gradients_are_those_of_float64(shape, side, stride, padding):
    x, kernel = arrays(shape, side)
    expected = reference.conv(x, kernel, stride, padding)
    g = np.random.default_rng(1).standard_normal(expected.shape)
    y, vjp = jax.vjp(lambda x, k: over_blocks(x, k, stride, padding), jnp.float32(x), jnp.float32(kernel))
    results = (y, *vjp(jnp.float32(g)))
    for result, exact in zip(results, (expected, *reference.conv_gradient(x, kernel, g, stride, padding)), strict=True):
        assert result.shape == exact.shape and result.dtype == jnp.float32
        assert np.abs(result - exact).max() < 1e-5 * np.abs(exact).max()


@each_layer
def test_the_blocks_hold_the_strided_convolution(shape, side, stride, padding):
    x, kernel = arrays(shape, side, features=2)
    with jax.enable_x64(True):
        blocks, block_kernel = space_to_depth(jnp.asarray(x), jnp.asarray(kernel), stride, padding)
    assert blocks.dtype == block_kernel.dtype == np.float64
    assert blocks.shape[3] == block_kernel.shape[2] == stride**2 * shape[3]
    assert block_kernel.shape[:2] == (-(-side // stride),) * 2
    y = reference.scipy_conv(blocks, block_kernel)
    np.testing.assert_allclose(y, reference.conv(x, kernel, stride, padding), atol=1e-10)


def test_bfloat16_stays_so():
    x, kernel = (jnp.bfloat16(a) for a in arrays((1, 24, 24, 3), 11))
    assert {a.dtype for a in space_to_depth(x, kernel, 4, ((0, 3), (0, 3)))} == {jnp.dtype(jnp.bfloat16)}


def test_zero_pad_cuts_what_is_past_the_sizes():
    x = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
    np.testing.assert_array_equal(zero_pad(x, (1, 0), (3, 6))[0, :, :, 0], np.pad(x[0, :2, :, 0], ((1, 0), (0, 2))))


def test_an_nvidia_gpu_reads_conv1_over_blocks_and_a_cpu_does_not():
    x, kernel = jnp.ones((1, 40, 40, 3)), jnp.ones((11, 11, 3, 8))
    program = jax.jit(lambda x, k: ops.conv(x, k, 4, ((0, 3), (0, 3)))).trace(x, kernel)
    over_blocks = {
        platform: "3x3x48x8" in program.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu")
    }
    assert over_blocks == {"cuda": True, "cpu": False}
