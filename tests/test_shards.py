"""A split in the devices' memory: divided over the devices, with the batches of plain NumPy on every mesh."""

import logging
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import synthetic_data
from runners import ENVIRONMENT, ROOT, tiny_config

from alexnet_jax import data, sharding
from alexnet_jax.data import DataError, DeviceBatches, DeviceData, Examples, in_memory
from alexnet_jax.data import dataset as dataset_module
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.preprocess import measure
from alexnet_jax.runtime import memory
from alexnet_jax.setup import setup

MESHES = [(1, 1), (1, 2), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2)]
KEY = jax.random.key(7)


# One of two processes: it saves its parts of all batches, the positions that it decoded, and the statistics.
PROCESS = """
import sys
import jax, numpy as np
from alexnet_jax import data, sharding
from alexnet_jax.data import in_memory
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.runtime import distributed

address, process, devices, tower, folder, out = sys.argv[1:]
distributed.start(address, 2, int(process))
mesh, decoded, read = sharding.make_mesh(-1, int(tower), int(devices)), [], in_memory.read

def counted(builder, split, positions, labeled):
    decoded.extend(positions.tolist())
    return read(builder, split, positions, labeled)

in_memory.read = counted
dataset = Dataset(data.open_builder("synthetic_rgb", folder))
train = dataset.training("train[:203]", 16, mesh)
arrays = {"decoded": decoded.copy()}
for step in range(13):
    batch = train.batch(jax.random.key(7), step)
    for i, (images, labels) in enumerate(zip(*(x.addressable_shards for x in batch))):
        arrays |= {f"{step}/{i}/rows": np.arange(16)[images.index[0]], f"{step}/{i}/images": images.data}
        arrays[f"{step}/{i}/labels"] = labels.data
decoded.clear()
(batch,) = dataset.batches("test[:15]", 16, mesh)
arrays |= {"test/decoded": decoded, "test/labels": np.concatenate([x.data for x in batch.labels.addressable_shards])}
arrays |= train.measure(True)._asdict()
np.savez(out, **arrays)
distributed.barrier()
"""


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


def test_an_order_that_needs_more_rounds_than_usual_is_exact(monkeypatch):
    """In the order of the rows one device holds all images of a share."""
    monkeypatch.setattr(in_memory, "SMALL_SHARE", 0)
    monkeypatch.setattr(in_memory, "SHARE", 0.3)
    examples, mesh = numbered(256), sharding.make_mesh(4, 1)
    share_steps, capacity = in_memory._share(256, 6 * 5 * 3, 16, 4)
    assert share_steps == 4 and share_steps * 16 / 4 > in_memory.ROUNDS * capacity
    ours = DeviceData(examples, 16, mesh)
    replicated = jax.NamedSharding(mesh, sharding.REPLICATED)
    ours._permutation = lambda key, epoch, size: jax.device_put(np.arange(size, dtype=np.int32), replicated)
    for step in range(16):
        assert_batch(ours.batch(KEY, step), examples, np.arange(16) + 16 * step, 4)


@pytest.mark.parametrize("data_axis,tower", [(8, 1), (4, 2)])
def test_the_fetch_is_an_all_to_all_and_a_batch_needs_no_communication(data_axis, tower):
    ours = DeviceData(numbered(203), 16, sharding.make_mesh(data_axis, tower))
    ours.batch(KEY, 0)
    fetch = ours._fetch.lower(ours._rows, ours._order, ours._share, 0).compile()
    kinds = set(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-[a-z]+)(?:-start)?\(", fetch.as_text()))
    assert kinds == {"all-to-all"}
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


@pytest.mark.parametrize("devices,tower", [(2, 1), (2, 2), (1, 2)])
def test_two_processes_have_the_same_batches_and_each_decodes_its_own_rows(synthetic_rgb, tmp_path, devices, tower):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = [str(devices), str(tower), str(synthetic_data.DATA_DIR)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), *shared, str(tmp_path / f"{i}.npz")],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    saved = [dict(np.load(tmp_path / f"{i}.npz")) for i in range(2)]

    parts = 2 * devices // tower
    held = -(-203 // parts) * max(1, parts // 2)  # with one part, both processes hold all of it
    for i, arrays in enumerate(saved):
        first = i * held if parts > 1 else 0
        assert arrays["decoded"].tolist() == [*range(first, first + held)]
        assert len(arrays["test/decoded"]) == (8 if parts > 1 else 16)
    train, test = data.load(synthetic_rgb, "train[:203]"), data.load(synthetic_rgb, "test[:15]")
    for step in range(13):
        chosen = expected(train, 16, step)
        rows = []
        for arrays in saved:
            for i in range(devices):
                rows += (own := arrays[f"{step}/{i}/rows"]).tolist()
                np.testing.assert_array_equal(arrays[f"{step}/{i}/images"], train.images[chosen[own]])
                np.testing.assert_array_equal(arrays[f"{step}/{i}/labels"], train.labels[chosen[own]])
        assert sorted(rows) == sorted([*range(16)] * tower)
    if tower == 1:
        assert [*saved[0]["test/labels"], *saved[1]["test/labels"]] == [*test.labels, -1]
    for arrays in saved:
        for name, value in measure([train.images], colors=True)._asdict().items():
            np.testing.assert_array_equal(arrays[name], value, name)


def test_worker_processes_read_a_large_set_as_this_process_does(prepared, monkeypatch, caplog):
    dataset, mesh = Dataset(data.open_builder("small_256", str(prepared.parents[1])), workers=2), sharding.make_mesh(4)
    monkeypatch.setattr(in_memory, "FIRST_PROGRESS_S", 0)
    monkeypatch.setattr(in_memory, "PROGRESS_S", 0)
    with caplog.at_level(logging.INFO, "alexnet_jax"):
        alone = dataset.training("train", 8, mesh), dataset.batches("train", 8, mesh)
    size = dataset.size("train")
    assert f"small_256, train: {size} of " in caplog.text and "images read, 0 s left" in caplog.text
    monkeypatch.setattr(dataset_module, "WORKERS_FROM", 0)
    workers = dataset.training("train", 8, mesh), dataset.batches("train", 8, mesh)
    for step in range(2 * (size // 8)):
        for array, other in zip(alone[0].batch(KEY, step), workers[0].batch(KEY, step), strict=True):
            np.testing.assert_array_equal(array, other)
    for batch, others in zip(alone[1], workers[1], strict=True):
        for array, other in zip(batch, others, strict=True):
            np.testing.assert_array_equal(array, other)


def test_memory_is_stated_before_anything_is_read_and_one_line_says_that_it_does_not_fit(
    synthetic, monkeypatch, caplog
):
    """1,000 and 200 images of 784 bytes on 4 devices; the share is all of the epoch, and a half of it is on its way."""

    def read(*arguments, **options):
        raise AssertionError("read too early")

    monkeypatch.setattr(in_memory, "read", read)
    config = tiny_config(batch_size=40)
    config.mesh.data = 4
    with caplog.at_level(logging.INFO, "alexnet_jax"), pytest.raises(AssertionError, match="read too early"):
        setup(config)
    match = re.search(
        r"synthetic/1.0.0: ([\d.]+) MB of images on each of 4 devices, of [\d.,]+ GB that are", caplog.text
    )
    capacity = 22  # images that a device sends to another in a round: (62.5 + 3 √62.5) / 4
    assert float(match[1]) == pytest.approx((250 + 250 + 2 * 4 * capacity + 50) * 784 / 1e6, abs=0.06)
    monkeypatch.setattr(dataset_module, "free_bytes", lambda devices: 10_000)
    with pytest.raises(DataError) as error:
        setup(config)
    assert re.fullmatch(
        r"synthetic/1.0.0: 0.6 MB of images on each of 4 devices, which has 0.0 MB free; expected more devices "
        r"\(config.mesh.data\), or --config.streaming=True", str(error.value)
    )  # fmt: skip


def test_free_memory_of_a_machine_and_of_a_container(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  24683656 kB\nMemAvailable:   1000 kB\n")
    assert memory._machine_bytes(tmp_path / "meminfo") == 1_024_000
    assert memory._machine_bytes(tmp_path / "none") == float("inf") == memory._container_bytes(tmp_path)
    (tmp_path / "memory").mkdir()
    for name, content in (("limit_in_bytes", "1000"), ("usage_in_bytes", "700"), ("stat", "total_inactive_file 50")):
        (tmp_path / "memory" / f"memory.{name}").write_text(f"{content}\n")
    assert memory._container_bytes(tmp_path) == 350  # cgroup v1
    for name, content in (("max", "2000"), ("current", "700"), ("stat", "anon 1\ninactive_file 60")):
        (tmp_path / f"memory.{name}").write_text(f"{content}\n")
    assert memory._container_bytes(tmp_path) == 1360  # cgroup v2
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory" / "memory.stat").unlink()
    assert memory._container_bytes(tmp_path) == float("inf")
    devices = jax.devices()
    assert memory.free_bytes(devices[:4]) == pytest.approx(2 * memory.free_bytes(devices), rel=0.2)


def test_a_device_with_memory_of_its_own():
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    full, empty = Device({"bytes_limit": 100, "bytes_in_use": 70}), Device({"bytes_limit": 100, "bytes_in_use": 10})
    assert memory.free_bytes([empty, full]) == 30
    assert memory.free_bytes([empty, Device(None)]) is None
