"""A split in the devices' memory: divided over the devices, with the batches of plain NumPy on every mesh."""

import logging
import re

import jax
import numpy as np
import pytest

from alexnet_jax import data, sharding
from alexnet_jax.data import DataError, DeviceBatches, DeviceData, Examples, in_memory
from alexnet_jax.data.dataset import Dataset

MESHES = [(1, 1), (1, 2), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2)]
KEY = jax.random.key(7)


def numbered(count, shape=(6, 5, 3)):
    """Images of random pixels; the label is the position."""
    images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
    return Examples(images, np.arange(count, dtype=np.int32))


def expected(examples, batch_size, step):
    """The rows of a step by the definition: its part of the epoch's permutation."""
    epoch, position = divmod(step, len(examples.labels) // batch_size)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(KEY, epoch), len(examples.labels)))
    return order[position * batch_size : (position + 1) * batch_size]


def assert_batch(batch, examples, chosen, parts):
    np.testing.assert_array_equal(batch.labels, chosen)
    np.testing.assert_array_equal(batch.images, examples.images[chosen])
    for shard in batch.images.addressable_shards:  # each device has its part, in order
        part = (shard.index[0].start or 0) * parts // len(chosen)
        np.testing.assert_array_equal(shard.data, examples.images[np.split(chosen, parts)[part]])


@pytest.fixture(params=["the epoch", "shares", "a step"])
def share(request, monkeypatch):
    """How much of an epoch is fetched at a time."""
    if request.param != "the epoch":
        monkeypatch.setattr(in_memory, "SMALL_SHARE", 0)
        monkeypatch.setattr(in_memory, "SHARE", 0.3 if request.param == "shares" else 0)


@pytest.mark.parametrize("data_axis,tower", MESHES)
def test_batches_are_those_of_the_permutation_on_every_mesh(share, data_axis, tower):
    examples, mesh = numbered(203), sharding.make_mesh(data_axis, tower)  # 12 steps of 16, 11 examples are left
    ours = DeviceData(examples, 16, mesh)
    for step in range(26):  # two epochs and the begin of a third
        assert_batch(ours.batch(KEY, step), examples, expected(examples, 16, step), data_axis)
    for shard in ours._rows.images.addressable_shards:
        assert shard.data.shape == (-(-203 // data_axis), 6, 5, 3)


@pytest.mark.parametrize("step", [5, 11, 12, 17])
def test_a_run_that_resumes_in_the_middle_gets_the_same_batches(share, step):
    examples, mesh = numbered(203), sharding.make_mesh(4, 2)
    resumed = DeviceData(examples, 16, mesh)
    for s in (step, step + 1):
        assert_batch(resumed.batch(KEY, s), examples, expected(examples, 16, s), 4)
    assert_batch(resumed.batch(KEY, 0), examples, expected(examples, 16, 0), 4)  # back


@pytest.mark.parametrize("size", [32, 33, 39])  # one or two steps, with padding of the last device or all of it
def test_small_sets(size):
    examples = numbered(size)
    ours = DeviceData(examples, 16, sharding.make_mesh(8, 1))
    for step in range(5):
        assert_batch(ours.batch(KEY, step), examples, expected(examples, 16, step), 8)


def test_an_order_that_needs_most_rounds_is_exact(share):
    """In the order of the rows all images of a share come from one device or two."""
    examples, mesh = numbered(256), sharding.make_mesh(4, 1)
    ours = DeviceData(examples, 16, mesh)
    ours._permutation = lambda key, epoch, size: jax.device_put(
        np.arange(size, dtype=np.int32), jax.NamedSharding(mesh, sharding.REPLICATED)
    )
    share_steps, capacity = in_memory._share(256, 90, 16, 4)
    if share_steps > 1:  # what a device needs from another is more than usually fits in the rounds
        assert share_steps * 16 / 4 > in_memory.ROUNDS * capacity or share_steps == 16
    for step in range(16):
        assert_batch(ours.batch(KEY, step), examples, np.arange(16) + 16 * step, 4)


@pytest.mark.parametrize("data_axis,tower", [(8, 1), (4, 2)])
def test_the_fetch_is_an_all_to_all_and_a_batch_needs_no_communication(data_axis, tower):
    ours = DeviceData(numbered(203), 16, sharding.make_mesh(data_axis, tower))
    ours.batch(KEY, 0)
    fetch = ours._fetch.lower(ours._rows, ours._order, ours._share, 0).compile()
    kinds = set(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-[a-z]+)(?:-start)?\(", fetch.as_text()))
    assert kinds == {"all-to-all"}
    held = sum(x.addressable_shards[0].data.nbytes for x in (ours._rows.images, ours._share.images))
    sent = fetch.memory_analysis().temp_size_in_bytes
    assert held < in_memory.train_bytes(203, 90, 16, data_axis) < held + sent
    batch = ours._slice.lower(ours._share, 0).compile().as_text()
    assert not re.search(r" (all-|reduce-scatter|collective-)", batch)


def test_memory_of_imagenet():
    """By hand: 1,281,167 images of 196,608 bytes, on the GPUs of a node and on a slice of TPUs."""
    size, image = 1_281_167, 256 * 256 * 3
    shard = -(-size // 8) * image
    assert shard == pytest.approx(31.5e9, rel=0.001)
    assert shard * 1.15 < in_memory.train_bytes(size, image, 1024, 8) < shard * 1.2  # a share, and a half on its way
    assert in_memory.train_bytes(size, image, 1024, 256) < 3e9
    assert in_memory.train_bytes(size, image, 1024, 1) == size * image


@pytest.mark.parametrize("data_axis,tower", MESHES)
def test_a_split_in_order_has_each_example_once(data_axis, tower):
    examples = numbered(53)
    batches = DeviceBatches(examples, 16, sharding.make_mesh(data_axis, tower))
    assert len(batches) == 4
    for _ in range(2):  # again and again
        images, labels = (np.concatenate(x) for x in zip(*batches, strict=True))
        assert labels.tolist() == [*range(53), *[-1] * 11]
        np.testing.assert_array_equal(images[:53], examples.images)
    for shard in next(iter(batches)).images.addressable_shards:
        assert len(shard.data) == 16 // data_axis


@pytest.mark.parametrize("data_axis,tower", MESHES)
def test_statistics_are_the_same_on_every_mesh(data_axis, tower):
    examples = numbered(45)
    ours = DeviceData(examples, 16, sharding.make_mesh(data_axis, tower)).measure(colors=True)
    np.testing.assert_array_equal(ours.mean_image, examples.images.astype(np.int64).sum(0) / 45)
    pixels = examples.images.reshape(-1, 3).astype(np.float64)
    covariance = pixels.T @ pixels / len(pixels) - np.outer(pixels.mean(0), pixels.mean(0))
    np.testing.assert_allclose(covariance @ ours.eigenvectors, ours.eigenvalues * ours.eigenvectors, atol=1e-8)
    one = DeviceData(examples, 16).measure(colors=True)
    for array, same in zip(ours, one, strict=True):
        np.testing.assert_array_equal(array, same)
