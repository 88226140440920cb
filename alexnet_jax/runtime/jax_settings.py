"""Settings of JAX that a run fixes, so that it does not depend on the user's environment."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def run_settings() -> Iterator[None]:
    """Fix the settings of JAX that would change or stop a run, during the block or a decorated function.

    A run's parameters and counters have 32 bits and its keys are Threefry's, so that a checkpoint is read under any
    `JAX_ENABLE_X64`, `JAX_DEFAULT_PRNG_IMPL` and `JAX_THREEFRY_PARTITIONABLE`. A run needs NumPy's broadcasting and
    promotion, implicit copies between host and device, and an infinite lowest error before the first validation.
    """
    with (
        jax.enable_x64(False),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
        jax.debug_infs(False),
    ):
        yield
