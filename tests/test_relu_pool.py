"""`relu_pool` of GPUs against the definitions in float64, in Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from alexnet_jax.ops.relu_pool_gpu import fused_relu_pool, relu_pool

interpreted = partial(fused_relu_pool, interpret=True)


@pytest.mark.parametrize("shape, inputs, outputs, dtype, function", [
    ((2, 13, 13, 16), 2, 1, jnp.bfloat16, interpreted),
    ((2, 6, 9, 16), 1, 2, jnp.float32, interpreted),
    ((2, 7, 4, 8), 1, 1, jnp.float32, interpreted),
    ((2, 9, 9, 12), 2, 1, jnp.float32, relu_pool),  # channels that the kernels do not take
])  # fmt: skip
def test_result_and_gradient(shape, inputs, outputs, dtype, function):
    random = np.random.default_rng(0)  # small integers: many ties, and exact in every dtype
    x, bias = random.integers(-4, 5, shape), random.integers(-2, 3, shape[-1]).astype(np.float32)
    want = reference.max_pool(reference.relu(x + bias.astype(np.float64)))
    dy = random.integers(-4, 5, want.shape)

    def joined(x, bias):
        y = function(jnp.split(x, inputs, axis=-1), bias, 2 if shape[-1] > 8 else 1, outputs=outputs)
        assert len(y) == outputs and len({part.shape for part in y}) == 1
        return jnp.concatenate(y, axis=-1)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is most of the time
    def pull(x, bias, dy):
        y, pullback = jax.vjp(joined, x, bias)
        return y, *pullback(dy)

    y, dx, dbias = pull(jnp.asarray(x, dtype), bias, jnp.asarray(dy, dtype))
    want_dx = reference.relu_gradient(x + bias, reference.max_pool_gradient(reference.relu(x + bias), dy))
    assert y.dtype == dx.dtype == dtype and dbias.dtype == jnp.float32
    for got, exact in ((y, want), (dx, want_dx), (dbias, want_dx.sum((0, 1, 2)))):
        np.testing.assert_array_equal(np.asarray(got, np.float64), exact)


@pytest.mark.parametrize("shape, dtype, change, message", [
    ((1, 9, 9, 16), jnp.float16, {}, "float16"),
    ((1, 9, 9, 16), jnp.float32, dict(window=2), "window=2"),
    ((1, 9, 9, 16), jnp.float32, dict(bias=jnp.zeros(8)), "bias"),
    ((1, 9, 9, 12), jnp.float32, {}, "multiple of 8"),
    ((1, 2, 9, 16), jnp.float32, {}, "from 3"),
])  # fmt: skip
def test_what_it_does_not_take(shape, dtype, change, message):
    with pytest.raises(ValueError, match=message):
        fused_relu_pool([jnp.zeros(shape, dtype)], **(dict(bias=jnp.zeros(shape[-1]), towers=1) | change))
