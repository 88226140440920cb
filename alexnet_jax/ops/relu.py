"""ReLU (section 3.1) whose gradient needs its result alone."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
@jax.jit
def relu(x: jax.Array) -> jax.Array:
    """Return max(x, 0), with the gradient of `jax.nn.relu`, of reverse mode only.

    Where ReLU is a part of a convolution's kernel, its input is then never written.
    """
    return jnp.maximum(x, 0)


def _forward(x):
    y = relu(x)
    return y, y


def _backward(y, g):
    return (jnp.where(y != 0, g, jnp.zeros((), g.dtype)),)  # XLA would replace y > 0 by x > 0


relu.defvjp(_forward, _backward)
