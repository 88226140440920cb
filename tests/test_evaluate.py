import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import synthetic_data
from runners import ROOT, corrupt, largest_file, saved_state, tiny_config

from alexnet_jax import AlexNet, Stem, data
from alexnet_jax import evaluate as command
from alexnet_jax.checkpoint import CheckpointError
from alexnet_jax.data import DeviceBatches, Examples
from alexnet_jax.errors import UserError
from alexnet_jax.evaluate import evaluate_workdirs
from alexnet_jax.inference import Network, evaluate, predict
from alexnet_jax.preprocess import fit
from alexnet_jax.run import RunError
from alexnet_jax.setup import build_model
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.weights import read_workdir, write_native

MODEL = AlexNet(num_classes=7, stem=Stem(5, 2, 2), widths=(4, 4, 4, 4, 4, 8, 8), kernel_std=(0.4,) * 8)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (53, 30, 30, 1), dtype=np.uint8)
    labels = rng.integers(0, 7, 53).astype(np.int32)
    preprocess = fit(images, 0, 28, 0, True, False, scale=0.02)
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))["params"]
    return params, images, labels, preprocess


@pytest.mark.parametrize("ten_crop", [False, True])
@pytest.mark.parametrize("batch_size", [10, 53, 100])  # a partial last batch, all in one, more than there are
def test_each_example_is_counted_once(problem, ten_crop, batch_size):
    params, images, labels, preprocess = problem
    p = np.asarray(predict(MODEL, params, images, preprocess, ten_crop), np.float64)
    order = np.argsort(-p, axis=1)
    confusion = np.zeros((7, 7), int)
    np.add.at(confusion, (labels, order[:, 0]), 1)
    batches = DeviceBatches(Examples(images, labels), batch_size)
    assert len(list(batches)) == len(batches) == -(-53 // batch_size)
    result = evaluate([Network(MODEL, params, preprocess)], batches, ten_crop)
    assert result.top1_error == pytest.approx((order[:, 0] != labels).mean())
    assert result.top5_error == pytest.approx(1 - (order[:, :5] == labels[:, None]).any(1).mean())
    assert result.loss == pytest.approx(-np.log(p[np.arange(53), labels]).mean(), rel=1e-5)
    np.testing.assert_array_equal(result.confusion, confusion)


def test_ten_crop_is_the_mean_of_the_softmax(problem):
    params, images, _, preprocess = problem
    crops = np.asarray(preprocess.ten_crop(images[:4]))
    apply = jax.jit(lambda x: MODEL.apply({"params": params}, x))
    logits = [np.asarray(apply(crops[:, i]), np.float64) for i in range(10)]
    softmax = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in logits]
    np.testing.assert_allclose(predict(MODEL, params, images[:4], preprocess, True), np.mean(softmax, 0), rtol=1e-5)


def test_a_network_with_equal_outputs_is_wrong_every_time(problem):
    params, images, labels, preprocess = problem
    flat = jax.tree.map(np.zeros_like, params)  # every class is equally likely
    batches = DeviceBatches(Examples(images, labels), 53)
    result = evaluate([Network(MODEL, flat, preprocess)], batches)
    assert result.top1_error == 1 and result.top5_error == 1
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    assert evaluate([Network(MODEL, broken, preprocess)], batches).top1_error == 1


@pytest.fixture(scope="module")
def runs(synthetic, tmp_path_factory):
    """Two trainings that differ in their seed."""
    folders = [tmp_path_factory.mktemp(f"seed{seed}") for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        train_and_evaluate(tiny_config(seed=seed, learning_rate=0.02), folder)
    return folders


def test_the_command_averages_the_softmax_of_several_runs(runs, synthetic):
    command = [sys.executable, "-m", "alexnet_jax.evaluate", "--workdir", *map(str, runs), "--split=test[:151]"]
    before = {path: path.stat().st_mtime_ns for path in runs[0].rglob("*")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert before.items() <= {path: path.stat().st_mtime_ns for path in runs[0].rglob("*") if path != runs[0]}.items()
    result = json.loads((runs[0] / "evaluation_averaged.json").read_text())
    assert f"Written to {runs[0] / 'evaluation_averaged.json'}" in done.stdout
    assert not (runs[0] / "evaluation.json").exists()  # of one network alone
    assert result["examples"] == 151 and result["split"] == "test[:151]" and result["dataset"].startswith("synthetic/")
    assert result["networks"] == [{"workdir": str(run), "step": 6} for run in runs]
    assert "at step 6" in done.stdout and "paper" not in done.stdout

    images, labels = data.load(synthetic, "test[:151]")
    training = data.load(synthetic, "train[:1000]").images
    model, preprocess = build_model(tiny_config(), 10), fit(training, 1, 28, 0, False, False, 1 / 70)
    for crops, ten_crop in (("center", False), ("five", True)):
        p = []
        for run in runs:
            state, params = saved_state(run, 6), {}
            for path, leaf in state.items():
                if path.startswith("/params/"):
                    params.setdefault(path.split("/")[2], {})[path.split("/")[3]] = leaf
            p.append(np.asarray(predict(model, params, images, preprocess, ten_crop), np.float64))
        mean = np.mean(p, axis=0)
        assert (mean.argmax(1) != p[0].argmax(1)).any() and (mean.argmax(1) != p[1].argmax(1)).any()
        assert result[crops]["top1_error"] == pytest.approx((mean.argmax(1) != labels).mean())
        fifth = np.sort(mean, axis=1)[:, -5]
        assert result[crops]["top5_error"] == pytest.approx((mean[np.arange(151), labels] < fifth).mean())
        assert result[crops]["loss"] == pytest.approx(-np.log(mean[np.arange(151), labels]).mean(), rel=1e-4)


def test_what_cannot_be_evaluated_is_one_line(runs, tmp_path):
    def fails(error, words, *workdirs, **fields):
        with pytest.raises(error, match=words) as raised:
            evaluate_workdirs(workdirs, **fields)
        assert "\n" not in str(raised.value)

    fails(RunError, "no_such holds no run", tmp_path / "no_such")
    fails(data.DataError, "split 'exam'", runs[0], split="exam")
    (tmp_path / "link").symlink_to(runs[0])
    fails(RunError, "link is given twice", runs[0], runs[1], tmp_path / "link")
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    corrupt(largest_file(copy / "checkpoints" / "6"))
    fails(CheckpointError, "checkpoints/6 is corrupt.*remove it", copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    fails(RunError, "holds no checkpoint", copy)
    (copy / "config.json").write_text("{")
    fails(RunError, "config.json is not a config", copy)


def test_what_cannot_be_written_is_printed(runs, monkeypatch, capsys):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        evaluate_workdirs(runs[:1], split="test[:50]")
    assert "top-1 error" in (printed := capsys.readouterr().out) and "Written" not in printed


def test_a_relative_data_dir_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints" / "6").mkdir(parents=True)
    config = tiny_config(dataset="mine_256", data_dir="sets")
    (tmp_path / "run" / "config.json").write_text(config.to_json_best_effort())
    with pytest.raises(data.DataError, match=f"config.data_dir='{tmp_path}/sets': it has no prepared data set"):
        evaluate_workdirs([tmp_path / "run"])


def test_files_of_weights_count_as_the_runs_that_they_are_of(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run, name in zip(runs, "ab", strict=True):
        weights = dataclasses.replace(read_workdir(run), class_names=None if name == "b" else data_names())
        write_native(weights, tmp_path / f"{name}.safetensors")
    write_native(dataclasses.replace(weights, dataset=""), tmp_path / "c.safetensors")
    where = dict(split="test[:151]", data_dir=str(synthetic_data.DATA_DIR))
    expected = evaluate_workdirs(runs, **where)
    for networks in (("a.safetensors", "b.safetensors"), ("a.safetensors", runs[1]), (runs[0], "c.safetensors")):
        result = evaluate_workdirs(networks, **where)
        assert (result["center"], result["five"]) == (expected["center"], expected["five"])
    assert {p.name for p in tmp_path.iterdir()} == {*(f"{x}.safetensors" for x in "abc"), "a.evaluation_averaged.json"}
    alone = evaluate_workdirs(["c.safetensors"], dataset="synthetic", **where)
    assert json.loads((tmp_path / "c.evaluation.json").read_text())["networks"] == [{"file": "c.safetensors"}]
    assert alone["center"] == evaluate_workdirs(runs[1:], **where)["center"]
    assert evaluate_workdirs(["a.safetensors"], data_dir=where["data_dir"])["split"] == "train[1000:1200]"  # the run's


def data_names():
    return tuple(synthetic_data.CLASSES)


@pytest.mark.parametrize("fields,arguments,words", [
    (dict(dataset=""), dict(), "names no data set; give one as TFDS names it"),
    (dict(dataset="", test_split=""), dict(dataset="synthetic"), "names no split of synthetic/1.0.0; give one"),
    (dict(), dict(dataset="synthetic_rgb"), "takes images of 28×28×1, and those of synthetic_rgb/1.0.0 are 32×32×3"),
    (dict(class_names=data_names()[::-1]), dict(), "has the classes of synthetic/1.0.0 in another order"),
    (dict(dataset="none"), dict(), "TFDS has no such data set"),
])  # fmt: skip
def test_a_file_of_weights_without_its_data_set_is_one_line(runs, synthetic_rgb, tmp_path, fields, arguments, words):
    write_native(dataclasses.replace(read_workdir(runs[0]), **fields), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words) as error:
        evaluate_workdirs([tmp_path / "a.safetensors"], data_dir=str(synthetic_data.DATA_DIR), **arguments)
    assert "\n" not in str(error.value)
