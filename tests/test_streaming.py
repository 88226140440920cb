import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from runners import (
    ENVIRONMENT,
    ROOT,
    assert_same_state,
    blocked_workers,
    end,
    follow,
    losses,
    run_main,
    start_main,
    start_processes,
    wait_for,
)

from alexnet_jax import AlexNet, Stem, inference, preprocess, sharding
from alexnet_jax.configs import imagenet2012
from alexnet_jax.data import DataError, streaming
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.evaluate import evaluate_workdirs
from alexnet_jax.preparation.local import prepare
from alexnet_jax.run import RunError
from alexnet_jax.setup import build_preprocess

TRAIN, VALIDATION = 62, 23
# A small network on 28×28 crops of the 256×256 images.
FLAGS = (
    "--config=alexnet_jax/configs/imagenet2012.py", "--config.dataset=small_256", "--config.image_size=28",
    "--config.stem=3,1,1", "--config.widths=8,16,16,16,16,32,32", "--config.input_scale=0.01",
    "--config.kernel_std=0.28,0.1,0.12,0.12,0.12,0.3,0.25,0.05", "--config.ten_crop=False", "--config.batch_size=20",
    "--config.num_train_steps=12", "--config.eval_every=4", "--config.log_every=2", "--config.learning_rate=0.005",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared data set of photograph-like images; the red of the first pixels identifies it."""
    root = tmp_path_factory.mktemp("images")
    for i in range(TRAIN + VALIDATION):
        small = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = np.array(Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC))
        image[:32, :32] = (3 * i, 128, 128)
        file = root / ("train" if i < TRAIN else "validation") / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file, compress_level=0)
    return prepare("small", root, tmp_path_factory.mktemp("out"), workers=1, shard_size=25)


@pytest.fixture(scope="module")
def builder(folder):
    return tfds.builder_from_directory(folder)


def which(images):
    return [round(image[4:28, 4:28, 0].mean() / 3) for image in np.asarray(images)]


def records(builder, split):
    """Images and labels as TFDS and Pillow read them."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [np.asarray(Image.open(io.BytesIO(x["image"]))) for x in source], [x["label"] for x in source]


def test_a_batch_is_a_function_of_key_and_step_with_any_number_of_workers(builder):
    images, labels = records(builder, "train")
    examples_in_memory = dict(zip(which(images), zip(images, labels, strict=True), strict=True))
    assert len(examples_in_memory) == TRAIN
    mesh, key = sharding.one_device(), jax.random.key(3)
    one = streaming.StreamedData(builder, "train", 20, mesh, workers=1)
    assert one.steps_per_epoch == 3
    batches = [one.batch(key, step) for step in range(6)]
    for images, labels in batches:
        for i, image, label in zip(which(images), images, labels, strict=True):
            np.testing.assert_array_equal(image, examples_in_memory[i][0])
            assert label == examples_in_memory[i][1]
    epochs = [sum((which(b.images) for b in batches[start : start + 3]), []) for start in (0, 3)]
    assert [len(set(epoch)) for epoch in epochs] == [60, 60] and epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    two = streaming.StreamedData(builder, "train", 20, mesh, workers=2)
    for step in (2, 3, 4):  # from the middle on, over the end of an epoch
        for ours, theirs in zip(two.batch(key, step), batches[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert which(one.batch(jax.random.key(4), 0).images) != which(batches[0].images)
    one.close()
    two.close()


def test_a_split_in_order_has_each_example_once_and_is_evaluated_as_in_memory(builder):
    images, labels = records(builder, "validation")
    mesh = sharding.make_mesh(4, 2)
    assert inference.batch_size(VALIDATION, True, mesh, crops=100) == 12
    batches = list(streaming.StreamedBatches(builder, "validation", 12, mesh, workers=2))
    assert [len(b.labels) for b in batches] == [12, 12]
    assert batches[0].images.sharding.spec == sharding.BATCH and not batches[0].images.is_fully_replicated
    np.testing.assert_array_equal(np.concatenate([b.images for b in batches])[:VALIDATION], images)
    assert np.concatenate([b.labels for b in batches]).tolist() == [*labels, -1]

    model = AlexNet(num_classes=3, stem=Stem(3, 1, 1), widths=(4,) * 5 + (8, 8), kernel_std=(0.4,) * 8)
    model = model.clone(num_classes=4)  # even, for two towers
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 28, 28, 3), np.float32))["params"]
    network = inference.Network(model, params, preprocess.fit(np.stack(images), 0, 28, 0, False, False, 0.01))
    before = inference._predict_program()._cache_size(), inference._count._cache_size()
    streamed = inference.evaluate([network], batches, True, mesh)
    assert (inference._predict_program()._cache_size(), inference._count._cache_size()) == (
        before[0] + 1,
        before[1] + 1,
    )
    p = np.asarray(inference.predict(model, params, np.stack(images), network.preprocess, True), np.float64)
    assert streamed.confusion.sum() == VALIDATION
    assert streamed.top1_error == pytest.approx((p.argmax(1) != labels).mean())
    assert streamed.loss == pytest.approx(-np.log(p[np.arange(VALIDATION), labels]).mean(), rel=1e-4)


def test_a_process_reads_its_rows_alone():
    mesh = sharding.make_mesh(4, 2)
    np.testing.assert_array_equal(streaming._rows(mesh, 24), np.arange(24))
    assert streaming._rows(sharding.one_device(), 5).tolist() == [0, 1, 2, 3, 4]


def test_a_corrupt_record_is_named_in_one_line(folder, tmp_path):
    copy = tmp_path / "small_256" / "1.0.0"
    shutil.copytree(folder, copy)
    file = sorted(copy.glob("*train*"))[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    batches = streaming.StreamedBatches(
        tfds.builder_from_directory(copy), "train", 20, sharding.one_device(), workers=1
    )
    with pytest.raises(DataError, match=r"small_256/1.0.0, train: example \d\d cannot be read") as error:
        list(batches)
    assert "\n" not in str(error.value)


def test_stored_statistics_are_used_and_missing_ones_are_measured(folder, tmp_path):
    copy = tmp_path / "small_256" / "1.0.0"
    shutil.copytree(folder, copy)
    builder, config = tfds.builder_from_directory(copy), imagenet2012.get_config()
    dataset = Dataset(builder, streaming=True, workers=1)
    stored = dict(np.load(copy / "statistics.npz"))
    prepared = build_preprocess(config, dataset)
    np.testing.assert_allclose(prepared.mean, stored["mean_image"], rtol=1e-6)
    np.testing.assert_allclose(prepared.lighting[0], stored["eigenvalues"] / 255, rtol=1e-6)
    (copy / "statistics.npz").unlink()
    measured = build_preprocess(config, dataset)
    pixels = np.stack(records(builder, "train")[0]).astype(np.float64)
    np.testing.assert_allclose(measured.mean, pixels.mean(0), rtol=1e-6)
    values = np.linalg.eigvalsh(np.cov(pixels.reshape(-1, 3).T, bias=True))[::-1]
    np.testing.assert_allclose(measured.lighting[0], values / 255, rtol=1e-5)
    (copy / "statistics.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="statistics.npz is corrupt"):
        build_preprocess(config, dataset)


def workers_of(process):
    """The processes that a run has started, but for Python's own tracker of shared memory."""
    processes = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == process.pid and b"spawn_main" in command:
            processes.append(int(path.name))
    return processes


def have_exited(pids, within=20):
    deadline = time.monotonic() + within
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def flags(folder, workers):
    return (*FLAGS, f"--config.data_dir={folder.parents[1]}", f"--config.loader_workers={workers}")


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    code, output = run_main(run, *flags(folder, 2), env=ENVIRONMENT)
    assert code == 0 and "62 to train, 23 to validate, 23 to test; 256×256×3" in output, output
    return run


def test_after_a_lost_worker_and_a_kill_other_workers_resume_to_the_same_state(folder, uninterrupted, tmp_path):
    process = start_main(tmp_path, *flags(folder, 2), env=ENVIRONMENT)
    follow(process, "epoch ")  # it is validated, and saved next
    workers = workers_of(process)
    assert len(workers) >= 2
    process.send_signal(signal.SIGSTOP)  # so that it does not end before its workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert output.splitlines()[-1].startswith("Error: a process that decodes images died: killed (out of memory?)"), (
        output
    )
    assert "Traceback" not in output

    process = start_main(tmp_path, *flags(folder, 3), env=ENVIRONMENT)
    follow(process, "epoch ")
    workers = workers_of(process)
    process.kill()
    process.wait()
    assert workers and have_exited(workers)

    code, output = run_main(tmp_path, *flags(folder, 1), env=ENVIRONMENT)
    assert code == 0 and "resuming from the checkpoint of step" in output and "Traceback" not in output, output
    assert_same_state(tmp_path, uninterrupted, 12)


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process_group_saves_a_checkpoint_and_ends_all_processes(folder, tmp_path, number, code):
    process = start_main(tmp_path, *flags(folder, 2), env=ENVIRONMENT, start_new_session=True)
    follow(process, "step 2/")
    workers = workers_of(process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code and output.splitlines()[-1].endswith(
        "checkpoint saved, run the same command to resume"
    ), output
    assert "Traceback" not in output and "Warning" not in output
    assert workers and have_exited(workers)


def test_a_signal_ends_a_run_whose_workers_do_not_answer(folder, tmp_path):
    process = start_main(tmp_path, *flags(folder, 2), "--config.num_train_steps=10000", env=ENVIRONMENT)
    follow(process, "step 2/")
    workers = workers_of(process)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(3)  # the batches that were decoded are used up
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "checkpoint saved, run the same command to resume" in output, output
    assert workers and have_exited(workers)


def test_a_signal_ends_a_run_whose_workers_do_not_start(folder, tmp_path):
    environment, pids = blocked_workers(tmp_path, "/streaming.")
    process = start_main(tmp_path / "run", *flags(folder, 2), env=environment)
    wait_for(lambda: list(pids.iterdir()), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and output.endswith("stopped by SIGTERM; run the same command to resume\n"), output
    assert have_exited([pid.name for pid in pids.iterdir()]) and not list((tmp_path / "run" / "checkpoints").iterdir())


def test_two_processes_read_the_batches_of_one(folder, uninterrupted, tmp_path):
    own = (*flags(folder, 1), "--config.mesh.data=2")
    processes = start_processes(tmp_path, *own)
    codes, outputs = end(processes)
    assert codes == [0, 0], outputs
    np.testing.assert_allclose(losses(tmp_path), losses(uninterrupted), rtol=1e-5)


def test_evaluation_with_the_streaming_input_pipeline(uninterrupted):
    command = [sys.executable, "-m", "alexnet_jax.evaluate", "--workdir", str(uninterrupted)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    evaluation = json.loads((uninterrupted / "evaluation.json").read_text())
    tested = json.loads((uninterrupted / "result.json").read_text())
    assert evaluation["center"]["top1_error"] == tested["test_top1_error"] and evaluation["examples"] == VALIDATION


def test_runs_of_different_data_sets_are_not_averaged(folder, uninterrupted, tmp_path):
    config = json.loads((uninterrupted / "config.json").read_text())
    for name, words in (("small_256", "has other classes"), ("other_256", r"another data set \(other_256/1.0.0\)")):
        copy = tmp_path / name / "1.0.0"
        shutil.copytree(folder, copy)
        (copy / "label.labels.txt").write_text("a\nb\nother\n")
        info = (copy / "dataset_info.json").read_text()
        (copy / "dataset_info.json").write_text(info.replace("small_256", name))
        for file in copy.glob("small_256-*"):
            file.rename(copy / file.name.replace("small_256", name))
        run = tmp_path / f"run_{name}"
        shutil.copytree(uninterrupted, run)
        (run / "config.json").write_text(json.dumps(config | {"dataset": name, "data_dir": str(tmp_path)}))
        with pytest.raises(RunError, match=words) as error:
            evaluate_workdirs([uninterrupted, run])
        assert "\n" not in str(error.value)


def test_a_batch_in_parts_is_the_same_and_its_memory_is_bounded(builder, monkeypatch):
    images, labels = records(builder, "validation")
    mesh, decoders = sharding.one_device(), []
    monkeypatch.setattr(streaming, "PART_BYTES", 5 * 256 * 256 * 3)
    for workers in (1, 2):
        data = streaming.StreamedBatches(builder, "validation", 12, mesh, workers)
        batches = [(np.asarray(b.images), np.asarray(b.labels)) for b in data]
        np.testing.assert_array_equal(np.concatenate([b for b, _ in batches])[:VALIDATION], images)
        assert np.concatenate([b for _, b in batches]).tolist() == [*labels, -1]
        decoders.append(data._decoder)
    buffers, workers = streaming._allocate((decoders[0].part_size, 256, 256, 3), 2)
    assert workers == 2 and buffers._memory.size <= 2 * 2 * streaming.PART_BYTES + 4096
    buffers.close()
    train = streaming.StreamedData(builder, "train", 20, mesh, workers=2)
    actual = [which(train.batch(jax.random.key(3), step).images) for step in (4, 5)]
    train.close()
    monkeypatch.setattr(streaming, "PART_BYTES", 20 * 256 * 256 * 3)
    train = streaming.StreamedData(builder, "train", 20, mesh, workers=1)
    assert actual == [which(train.batch(jax.random.key(3), step).images) for step in (4, 5)]
    train.close()


@pytest.mark.parametrize("parts,processes", [(3, "1 processes decode"), (1, "this process decodes")])
def test_a_small_dev_shm_is_a_warning_and_fewer_processes(builder, tmp_path, parts, processes):
    """A limit of the size of files acts on shared memory as a full /dev/shm does."""
    code = (
        "import logging, resource, sys; logging.basicConfig(format='%(message)s', stream=sys.stdout)\n"
        "import tensorflow_datasets as tfds, numpy as np\n"
        "from alexnet_jax.data import streaming\n"
        "if __name__ == '__main__':\n"
        f"    limit = {parts} * 20 * 256 * 256 * 3; resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        f"    builder = tfds.builder_from_directory({str(builder.data_path)!r})\n"
        "    data = streaming.StreamedBatches(builder, 'train', 20, streaming.sharding.one_device(), workers=4)\n"
        "    print(sum(len(b.labels) for b in data))\n"
    )
    (tmp_path / "start.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, tmp_path / "start.py"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0 and done.stdout.endswith("\n80\n"), done.stdout + done.stderr
    assert f"/dev/shm is full: {processes} images instead of 4 workers; give it" in done.stdout


def test_batches_on_a_cpu_keep_their_images_when_the_memory_of_the_next_is_aligned():
    """JAX takes memory at a multiple of 64 bytes as it is, and then a later batch would appear in an earlier one."""
    memory = np.empty(10 * 64 * 64 * 3 + 64, np.uint8)
    images = memory[-memory.ctypes.data % 64 :][: 10 * 64 * 64 * 3].reshape(10, 64, 64, 3)

    def host_batches():
        for value in range(6):
            images[:] = value
            yield images, np.full(10, value, np.int32)

    batches = list(streaming._on_devices(host_batches(), 10, sharding.one_device()))
    assert [(np.asarray(b.images) == b.labels[0]).all() for b in batches] == [True] * 6


def test_one_batch_needs_no_shared_memory(builder, monkeypatch):
    monkeypatch.setattr(streaming.shared_memory, "SharedMemory", None)
    (batch,) = streaming.StreamedBatches(builder, "validation", 24, sharding.one_device(), workers=2)
    np.testing.assert_array_equal(batch.images[:VALIDATION], records(builder, "validation")[0])


@pytest.mark.parametrize("limits,code,words", [((24, 400), 0, "62\n"), ((24, 24), 1, "too many open files; raise")])
def test_a_limit_of_open_files_is_raised_or_named(tmp_path, builder, limits, code, words):
    root = tmp_path / "images"
    for i, (image, label) in enumerate(zip(*records(builder, "train"), strict=True)):
        file = root / "train" / "abc"[label] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file, compress_level=0)
    folder = prepare("many", root, tmp_path, workers=1, shard_size=1)
    start = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits})\n"
        "from alexnet_jax.data.source import DataError\n"
        "try: print(len(load(builder, 'train').labels))\n"
        "except DataError as error: raise SystemExit(str(error))\n"
    )
    program = (
        "import tensorflow_datasets as tfds; from alexnet_jax.data import load\n"
        f"builder = tfds.builder_from_directory({str(folder)!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program + start], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and words in done.stdout + done.stderr, done.stdout + done.stderr
    assert "restore its file" not in done.stderr and "Traceback" not in done.stderr
