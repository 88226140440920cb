"""XLA's plain forms of the operations that `alexnet_jax.ops` writes by hand, to be measured in their place."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax import AlexNet, ops


def local_response_norm(x: jax.Array, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    """`ops.local_response_norm` as its formula stands there, with autodiff's gradient."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    window = (1,) * (x.ndim - 1) + (n,)
    sums = lax.reduce_window(x32 * x32, 0.0, lax.add, window, (1,) * x.ndim, "SAME")
    return (x32 * (k + alpha * sums) ** -beta).astype(x.dtype)


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """`ops.max_pool` by `lax.reduce_window`, whose gradient is select-and-scatter."""
    return nn.max_pool(x, (window, window), (stride, stride))


PLAIN = {"conv": ops.convolve, "max_pool": max_pool, "local_response_norm": local_response_norm}


@contextlib.contextmanager
def plain(model: AlexNet, *names: str) -> Iterator[AlexNet]:
    """The network with these of its operations in XLA's form, for as long as it is traced here."""
    others = {name: PLAIN[name] for name in names if name != "conv"}
    with mock.patch.multiple("alexnet_jax.model", **others) if others else contextlib.nullcontext():
        yield model.clone(conv=PLAIN["conv"]) if "conv" in names else model
