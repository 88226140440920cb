"""A run opened from its working directory, and what its network computes."""

import json
import shutil

import jax
import numpy as np
import pytest
from runners import TRAINED, corrupt, largest_file, saved_state, tiny_config

from alexnet_jax import activations, run
from alexnet_jax.checkpoint import CheckpointError
from alexnet_jax.data import DataError
from alexnet_jax.preprocess import fit
from alexnet_jax.setup import preprocess_fields
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.weights import WeightsError, read_workdir, workdir, write_native


def test_a_run_opens_as_it_was_saved(trained, opened):
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*"))
    state = saved_state(trained, 40)
    for layer, leaves in opened.params.items():
        for name, x in leaves.items():
            np.testing.assert_array_equal(x, state[f"/params/{layer}/{name}"])
    assert opened.step == 40 and opened.names[9] == "pattern 9"
    train_images = opened.load("train[:1000]").images
    np.testing.assert_allclose(opened.preprocess.mean, train_images.mean(0), rtol=1e-5, atol=1e-4)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*"))


def test_its_error_is_that_of_the_training(trained, opened):
    result = train_and_evaluate(tiny_config(**TRAINED), trained)
    assert opened.error(opened.load("test[:200]")) == pytest.approx(result["test_top1_error"])
    p = opened.predict(opened.load("test[:7]").images)
    assert p.shape == (7, 10)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)


def test_activations_in_batches_are_those_of_one_batch(opened, monkeypatch):
    images = opened.load("test[:23]").images
    exact = activations(opened.model, opened.params, opened.preprocess.center_crop(images))
    monkeypatch.setattr(run, "AT_A_TIME", 10)  # the last part is padded
    np.testing.assert_allclose(opened.activations(images), exact["fc7"], rtol=1e-4, atol=1e-5)
    assert opened.activations(images, "conv4").shape == exact["conv4"].shape


def test_equal_calls_compile_once_and_an_empty_batch_is_empty(trained, opened):
    images, again = opened.load("test[:17]").images, run.open_run(trained)
    opened.predict(images), opened.activations(images, "conv5")
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.inference, "predict", lambda *arguments: compiled.append("predict"))
        patch.setattr(run, "activations", lambda *arguments: compiled.append("activations"))
        for same in (opened, again):
            assert same.predict(images).shape == (17, 10)
            assert same.activations(images, "conv5").shape[0] == 17
    assert not compiled
    assert opened.predict(images[:0]).shape == opened.predict(images[:0], ten_crop=True).shape == (0, 10)
    assert opened.activations(images[:0]).shape == (0, 32)


def test_the_parameters_may_be_read_first_in_a_jitted_function(trained):
    opened = run.open_run(trained)
    images = opened.load("test[:3]").images

    @jax.jit
    def logits(images):
        return opened.model.apply({"params": opened.params}, opened.preprocess.center_crop(images))

    np.testing.assert_allclose(jax.nn.softmax(logits(images)), opened.predict(images), rtol=1e-4, atol=1e-6)


def test_a_corrupt_checkpoint_is_named_and_left_alone(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    corrupt(largest_file(copy / "checkpoints" / "40"))
    with pytest.raises(CheckpointError, match="checkpoints/40 is corrupt") as error:
        run.open_run(copy)
    assert "\n" not in str(error.value) and (copy / "checkpoints" / "40").exists()


@pytest.mark.parametrize("content,words", [
    ("{", "not a config"), ('{"widht": 3}', "widht"), ("{}", "it has no dataset"), (None, "no checkpoint yet"),
])  # fmt: skip
def test_a_folder_that_holds_no_run_to_read(synthetic, tmp_path, content, words):
    text = tiny_config(train_split="train[:50]").to_json_best_effort() if content is None else content
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(run.RunError, match=words):
        run.open_run(tmp_path)


def test_nearest_against_numpy(monkeypatch):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(25, 3, 4)), rng.normal(size=(60, 3, 4))
    distance = np.linalg.norm((queries[:, None] - keys[None]).reshape(25, 60, -1), axis=-1)
    monkeypatch.setattr(run, "AT_A_TIME", 10)
    np.testing.assert_array_equal(run.nearest(queries, keys, 5), np.argsort(distance, axis=1)[:, :5])
    assert run.precision([1, 2], np.array([[1, 1, 2], [1, 2, 2]])) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="expected at least 61"):
        run.nearest(queries, keys, 61)


def test_the_towers_influence_each_other_from_conv3_on(opened):
    images = opened.preprocess.center_crop(opened.load("test[:5]").images)
    influence = run.tower_influence(opened.model, opened.params, images)
    assert {name for name, change in influence.items() if change == 0} == {
        "conv1", "norm1", "pool1", "conv2", "norm2", "pool2"
    }  # fmt: skip
    assert list(influence)[-1] == "fc8" and jax.tree.all(jax.tree.map(np.isfinite, influence))


@pytest.mark.parametrize("shape, dtype", [((28, 28, 1), np.uint8), ((2, 40, 40, 1), np.uint8), ((2, 28, 28, 1), float)])
def test_other_images_are_refused(opened, shape, dtype):
    for call in (opened.predict, opened.activations):
        with pytest.raises(ValueError, match=r"expected uint8 \[N, 28, 28, 1\]"):
            call(np.zeros(shape, dtype))


def test_an_unknown_layer_is_refused(opened):
    with pytest.raises(ValueError, match="layer='fc9': expected one of conv1, norm1"):
        opened.activations(np.zeros((1, 28, 28, 1), np.uint8), "fc9")


@pytest.fixture
def without_data(trained, tmp_path):
    """A copy of a run whose data set is not there any more."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"data_dir": str(tmp_path / "deleted")}))
    return copy


def test_a_run_predicts_without_its_data(opened, without_data):
    images = opened.load("test[:9]").images
    alone = run.open_run(without_data)
    np.testing.assert_array_equal(alone.predict(images), opened.predict(images))
    assert alone.names == opened.names and jax.tree.structure(alone.preprocess) == jax.tree.structure(opened.preprocess)
    with pytest.raises(DataError, match="TFDS has no such data set.*deleted contains none"):
        alone.load("test")


def test_an_older_run_reads_its_data_set(trained, opened, without_data):
    (without_data / "preprocess.npz").write_bytes(b"PK")
    with pytest.raises(run.RunError, match="preprocess.npz is corrupt.*delete it") as error:
        run.open_run(without_data)
    assert "\n" not in str(error.value)
    (without_data / "preprocess.npz").unlink()
    with pytest.raises(DataError, match="TFDS has no such data set.*deleted contains none"):
        run.open_run(without_data)
    old = run.open_run(without_data, opened.config.data_dir)
    np.testing.assert_array_equal(old.preprocess.mean, opened.preprocess.mean)
    assert old.names == opened.names


def test_lighting_is_kept(tmp_path):
    config = tiny_config(lighting=True, lighting_exponent=0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    preprocess = fit(pixels, lighting=True, lighting_exponent=0.5, **preprocess_fields(config))
    workdir.write_preprocess(tmp_path, preprocess, ["a", "ä"])
    read, names = workdir.read_preprocess(tmp_path, config, "")
    jax.tree.map(np.testing.assert_array_equal, read, preprocess)
    assert jax.tree.structure(read) == jax.tree.structure(preprocess) and names == ("a", "ä")


def test_a_file_of_weights_opens_as_its_run(trained, opened, tmp_path):
    write_native(read_workdir(trained), tmp_path / "a.safetensors")
    file = run.open_run(tmp_path / "a.safetensors", opened.config.data_dir)
    images = file.load("test[:9]").images
    np.testing.assert_array_equal(file.predict(images, ten_crop=True), opened.predict(images, ten_crop=True))
    np.testing.assert_array_equal(file.activations(images, "conv3"), opened.activations(images, "conv3"))
    assert file.names == opened.names and (file.step, file.config, opened.step) == (None, None, 40)
    (tmp_path / "a.txt").write_text("no weights")
    with pytest.raises(WeightsError, match="a.txt"):
        run.open_run(tmp_path / "a.txt")
