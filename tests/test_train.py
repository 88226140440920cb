"""Training runs: what they learn, and what they write."""

import json
import logging
import shutil
import time

import numpy as np
import pytest
import synthetic_data
from runners import assert_same_state, corrupt, largest_file, losses, saved_state, tiny_config
from tensorboardX.proto.event_pb2 import Event

from alexnet_jax import activations, data, report, train
from alexnet_jax.config import ConfigError
from alexnet_jax.configs import cifar10, fashion_mnist_224
from alexnet_jax.run import open_run
from alexnet_jax.train import DivergedError, train_and_evaluate


@pytest.fixture(scope="module")
def learned(synthetic, tmp_path_factory):
    """A network of half the width, trained on a sixth of the data: (folder, result)."""
    config = tiny_config(
        dataset="fashion_mnist", data_dir="",
        widths=(16, 48, 64, 64, 64, 256, 256), kernel_std=(0.28, 0.1, 0.068, 0.084, 0.084, 0.09, 0.09, 0.05),
        train_split="train[:10000]", validation_split="train[10000:12000]", test_split="test", num_train_steps=600,
        batch_size=64, learning_rate=0.05, warmup_steps=100, drop_at_epochs=(3.0,), plateau_patience=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("learned")
    return folder, train_and_evaluate(config, folder)


def test_it_learns_fashion_mnist(learned):
    _, result = learned
    assert result["test_top1_error"] < 0.20  # chance is 0.9
    assert result["test_top5_error"] < 0.01
    assert result["steps"] == 600


def read_events(path):
    """TFRecords: the length, its checksum, the event, its checksum."""
    content, place = path.read_bytes(), 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        yield Event.FromString(content[place + 12 : place + 12 + size])
        place += 12 + size + 4


def test_the_output_files_of_a_run(learned):
    folder, result = learned
    assert json.loads((folder / "result.json").read_text()) == result
    needed = {"test_top1_error", "test_top5_error", "steps", "seconds", "images_per_s", "device"}
    assert needed <= set(result)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == sorted(x["step"] for x in lines)
    rates = [x["learning_rate"] for x in lines if "learning_rate" in x]
    assert max(rates) == pytest.approx(0.05) and rates[-1] == pytest.approx(0.005)
    assert sum("validation_top1_error" in x for x in lines) == 4  # 156 steps an epoch
    events = [event for file in (folder / "tensorboard").glob("events.out.tfevents.*") for event in read_events(file)]
    shown = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    written = {(x["step"], k): v for x in lines for k, v in x.items() if k != "step"}
    assert shown == pytest.approx(written, rel=1e-6)  # a float32
    for name in ("filters.png", "feature_maps.png", "confusion.png", "curves.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [312, 468, 600]


def test_finished_folder_reports_its_result(learned, caplog):
    folder, result = learned
    config = tiny_config(**json.loads((folder / "config.json").read_text()))
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    with caplog.at_level(logging.INFO):
        assert train_and_evaluate(config, folder) == result
    config.mesh.tower = 3
    with pytest.raises(ConfigError, match="config.mesh.tower=3"):
        train_and_evaluate(config, folder)
    assert "is finished" in caplog.text
    assert before == sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))


def test_pictures_that_cannot_be_drawn_and_an_incomplete_line_cost_no_result(synthetic, tmp_path, monkeypatch, caplog):
    config = tiny_config(num_train_steps=2, log_every=1)
    monkeypatch.setattr(train, "final_test", lambda *arguments: None)  # interrupted after the last checkpoint
    train_and_evaluate(config, tmp_path)
    monkeypatch.undo()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('7\n{"step": 3, "train_lo')
    monkeypatch.setattr(report.plots, "plot_filters", lambda *arguments: 1 / 0)
    with caplog.at_level(logging.WARNING):
        result = train_and_evaluate(config, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert "filters.png cannot be drawn (division by zero)" in caplog.text
    assert caplog.text.count("metrics.jsonl is incomplete; dropped") == 2
    assert (tmp_path / "curves.png").exists() and (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize("mesh", [dict(data=1, tower=1), dict(data=2, tower=2)])
def test_the_feature_maps_are_those_of_the_first_test_image(synthetic, tmp_path, monkeypatch, mesh):
    drawn = []
    monkeypatch.setattr(report.plots, "plot_maps", lambda outputs, path, **options: drawn.append((outputs, options)))
    config = tiny_config(num_train_steps=2)
    config.mesh.update(mesh)
    train_and_evaluate(config, tmp_path)
    run = open_run(tmp_path)
    images = run.load("test[:1]").images
    expected = activations(run.model, run.params, run.preprocess.center_crop(images))
    ((outputs, options),) = drawn
    assert list(outputs) == ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"]
    for name, x in outputs.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(options.pop("image"), images[0])
    assert options == dict(towers=2, count=8)


def test_images_per_s_is_the_speed_of_the_steps_alone(synthetic, tmp_path, monkeypatch):
    config, validate = tiny_config(num_train_steps=5, eval_every=2, log_every=1), train._validate

    def slow_validation(*arguments):
        time.sleep(1)
        return validate(*arguments)

    monkeypatch.setattr(train, "_validate", slow_validation)
    result = train_and_evaluate(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["images_per_s"] for line in lines if "images_per_s" in line}
    steps = np.diff([0, *rates])
    seconds = sum(n * config.batch_size / rate for n, rate in zip(steps, rates.values(), strict=True))
    assert sum(steps) == 5
    assert 5 * config.batch_size / result["images_per_s"] == pytest.approx(seconds, rel=0.01)
    assert result["seconds"] > seconds + 3  # three validations
    assert "images/s in training" in report.result_table(result)


@pytest.mark.parametrize("fails_at", [3, 4])  # between two lines of metrics, at the end
def test_a_validation_that_fails_costs_no_step(synthetic, tmp_path, monkeypatch, fails_at):
    config = tiny_config(num_train_steps=4, eval_every=1, log_every=2, plateau_patience=1)
    train_and_evaluate(config, tmp_path / "uninterrupted")
    validate, steps = train._validate, []

    def validation(run, state, step, *arguments):
        steps.append(step)
        if steps.count(fails_at) == 1 and step == fails_at:
            raise data.DataError("a worker died")
        return validate(run, state, step, *arguments)

    monkeypatch.setattr(train, "_validate", validation)
    with pytest.raises(data.DataError):
        train_and_evaluate(config, tmp_path / "failed")
    result = train_and_evaluate(config, tmp_path / "failed")
    assert steps == [*range(1, fails_at + 1), *range(fails_at, 5)]  # validated again, and no step trained again
    assert result["images_per_s"] > 0
    for step in (2, 3, 4):
        assert_same_state(tmp_path / "failed", tmp_path / "uninterrupted", step)
    assert losses(tmp_path / "failed") == losses(tmp_path / "uninterrupted")
    assert not (tmp_path / "failed" / "unvalidated").exists()


def test_parameters_that_were_killed_in_their_validation_and_are_corrupt_fall_back(synthetic, tmp_path, caplog):
    config = tiny_config(num_train_steps=2, eval_every=1)
    train_and_evaluate(config, tmp_path / "uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "final_test", lambda *arguments: None)
        patch.setattr(train.shutil, "rmtree", lambda *arguments, **options: None)
        train_and_evaluate(config, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "2")
    corrupt(largest_file(tmp_path / "stopped" / "unvalidated" / "2"))
    train_and_evaluate(config, tmp_path / "stopped")
    assert "unvalidated/2 is corrupt" in caplog.text
    assert_same_state(tmp_path / "stopped", tmp_path / "uninterrupted", 2)


def test_same_seed_same_parameters_bit_for_bit(synthetic, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_and_evaluate(tiny_config(seed=seed), tmp_path / name)
    a, b, c = (saved_state(tmp_path / name, 6) for name in "abc")
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path], path)
    assert any((leaf != c[path]).any() for path, leaf in a.items())


def test_a_loss_that_is_not_finite_stops_the_run(synthetic, tmp_path):
    with pytest.raises(DivergedError, match=r"step \d+, with learning rate 1e\+06"):
        train_and_evaluate(tiny_config(learning_rate=1e6, num_train_steps=30), tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def on_synthetic(config, name, **fields):
    """A config on one device and a synthetic data set, with some fields changed."""
    config.mesh.data = 1
    config.update(dataset=name, data_dir=str(synthetic_data.DATA_DIR), **fields)
    return config


def test_full_size_config_runs(synthetic, tmp_path):
    config = on_synthetic(
        fashion_mnist_224.get_config(), "synthetic", train_split="train[:8]", validation_split="train[8:12]",
        test_split="test[:4]", batch_size=4, num_train_steps=2, ten_crop=False,
    )  # fmt: skip
    result = train_and_evaluate(config, tmp_path)
    assert result["steps"] == 2
    state = saved_state(tmp_path, 2)
    assert sum(v.size for k, v in state.items() if k.startswith("/params/")) == 60_965_224 - 2 * 121 * 96 - 990 * 4097


def test_cifar10_config_runs_with_lighting(synthetic_rgb, tmp_path):
    config = on_synthetic(
        cifar10.get_config(), "synthetic_rgb", train_split="train[:500]", validation_split="train[500:600]",
        test_split="test[:100]", batch_size=50, num_train_steps=5,
    )  # fmt: skip
    assert train_and_evaluate(config, tmp_path)["steps"] == 5
