import logging
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from runners import corrupt, largest_file

from alexnet_jax import sharding
from alexnet_jax.checkpoint import CheckpointError, Checkpoints, MismatchError, fingerprint, ocp, read_checkpoint
from alexnet_jax.runtime.signals import Stopped, raised_signals

TREE = {"step": jnp.int32(7), "params": {"kernel": jnp.arange(30_000, dtype=jnp.float32).reshape(100, 300) * 0.1}}


def fill(folder, steps):
    checkpoints = Checkpoints(folder, keep=2)
    for step in steps:
        checkpoints.save(step, {**TREE, "step": jnp.int32(step)}, {"seconds": step / 2})
    checkpoints.close()


def test_round_trip_and_the_newest_are_kept(tmp_path):
    fill(tmp_path / "c", [1, 2, 3])
    checkpoints = Checkpoints(tmp_path / "c")
    step, tree, extra = checkpoints.restore(TREE)
    assert step == 3 and extra == {"seconds": 1.5}
    chex.assert_trees_all_equal(tree, {**TREE, "step": np.int32(3)})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]


def test_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "c").restore(TREE) is None


@pytest.mark.parametrize("how", ["truncated", "a bit flipped", "removed"])
def test_a_corrupt_newest_checkpoint_is_renamed_and_the_previous_one_is_read(tmp_path, how, caplog):
    fill(tmp_path / "c", [1, 2])
    corrupt(largest_file(tmp_path / "c" / "2"), how)
    with caplog.at_level(logging.WARNING):
        step, tree, _ = Checkpoints(tmp_path / "c").restore(TREE)
    assert step == 1 and int(tree["step"]) == 1
    assert str(tmp_path / "c" / "2") in caplog.text and "2.corrupt" in caplog.text
    assert (tmp_path / "c" / "2.corrupt").exists()


def test_all_corrupt_is_an_error_and_nothing_is_lost(tmp_path):
    fill(tmp_path / "c", [1, 2])
    for step in (1, 2):
        corrupt(largest_file(tmp_path / "c" / str(step)))
    for _ in range(2):  # the second time there are only the renamed ones
        with pytest.raises(CheckpointError, match="every checkpoint"):
            Checkpoints(tmp_path / "c").restore(TREE)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1.corrupt", "2.corrupt"]


@pytest.mark.parametrize("name,array,words", [
    ("step", np.float64(7), r"step: 'int32\[\]' in the checkpoint, 'float64\[\]' in this run.*JAX_ENABLE_X64"),
    ("step", np.zeros(4, np.int32), r"step: 'int32\[\]' in the checkpoint, 'int32\[4\]'.*JAX_DEFAULT_PRNG_IMPL"),
    ("key", np.int32(7), r"key: None in the checkpoint, 'int32\[\]' in this run"),
])  # fmt: skip
def test_other_arrays_are_no_corruption_and_nothing_is_moved(tmp_path, name, array, words):
    fill(tmp_path / "c", [1, 2])
    with jax.enable_x64(True):
        other = {**TREE, name: jnp.asarray(array)}
        for read in (Checkpoints(tmp_path / "c").restore, lambda like: read_checkpoint(tmp_path / "c" / "2", like)):
            with pytest.raises(MismatchError, match=words) as error:
                read(other)
            assert "\n" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "2"]
    assert Checkpoints(tmp_path / "c").restore(TREE)[0] == 2


def test_a_signal_while_a_checkpoint_is_read_is_no_corruption(tmp_path, monkeypatch):
    checkpoints, restore = Checkpoints(tmp_path), ocp.Checkpointer.restore
    checkpoints.save(1, TREE, {})
    checkpoints.wait()

    def interrupted(*arguments, **options):
        try:
            signal.raise_signal(signal.SIGTERM)
            return restore(*arguments, **options)
        except BaseException as error:  # as Orbax does
            raise RuntimeError(str(error)) from None

    monkeypatch.setattr(ocp.Checkpointer, "restore", interrupted)
    for read in (lambda: checkpoints.restore(TREE), lambda: read_checkpoint(tmp_path / "1", TREE)):
        with pytest.raises(Stopped), raised_signals():
            read()
    assert checkpoints.newest() == 1
    checkpoints.close()


def test_donated_buffers_do_not_reach_the_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    kernel = np.ones((300, 300), np.float32)
    checkpoints.save(1, {"kernel": kernel}, {})
    kernel[:] = 2  # as a donated buffer is overwritten while Orbax still writes
    checkpoints.wait()
    assert (checkpoints.restore({"kernel": jnp.asarray(kernel)})[1]["kernel"] == 1).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_the_fingerprint_depends_on_every_bit_and_not_on_the_mesh(dtype):
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (8, 4)) * 50).astype(dtype)
    expected = int(fingerprint({"kernel": kernel, "step": np.int32(7)}))
    for bit in range(kernel.nbytes * 8):
        content = bytearray(kernel.tobytes())
        content[bit // 8] ^= 1 << bit % 8
        flipped = np.frombuffer(content, kernel.dtype).reshape(kernel.shape)
        assert int(fingerprint({"kernel": flipped, "step": np.int32(7)})) != expected
    for other in ({"kernel": kernel[::-1]}, {"bias": kernel}, {"kernel": kernel.reshape(4, 8)}):
        assert int(fingerprint({**other, "step": np.int32(7)})) != expected
    mesh = sharding.make_mesh(4, 2)
    split = sharding.place({"kernel": kernel, "step": np.int32(7)}, mesh, {"kernel": P("data", "tower"), "step": P()})
    assert int(fingerprint(split)) == expected
