"""A run under other settings of JAX than the usual ones: real processes."""

import jax
import numpy as np
from runners import ENVIRONMENT, TINY, assert_same_state, run_main

from alexnet_jax.run import open_run

SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_DEBUG_INFS": "1",
}


def test_a_run_is_the_same_under_any_settings_and_is_read_under_others(synthetic, tmp_path):
    steps = ("--config.num_train_steps=10", "--config.mesh.data=1")
    for name, environment in (("usual", {}), ("other", SETTINGS)):
        code, output = run_main(tmp_path / name, *TINY, *steps, env=ENVIRONMENT | environment)
        assert code == 0, output
    assert_same_state(tmp_path / "usual", tmp_path / "other", 10)
    images = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28, 1)
    expected = open_run(tmp_path / "usual").predict(images)
    with jax.enable_x64(True), jax.default_prng_impl("rbg"), jax.numpy_rank_promotion("raise"):
        run = open_run(tmp_path / "usual")
        assert {x.dtype for x in jax.tree.leaves(run.params)} == {np.dtype("float32")}
        np.testing.assert_array_equal(run.predict(images), expected)
        code, output = run_main(tmp_path / "other", *TINY, *steps)  # finished
    assert code == 0 and "is finished" in output
