"""The prediction command on real files, and what it is made of: a run opened again, files read, neighbours found."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, saved_state
from PIL import Image
from test_checkpoint import damage, largest_file
from test_train import tiny_config

from alexnet_jax import AlexNet, activations, run, train
from alexnet_jax.images import read_image

GREY, COLOUR = (28, 28, 1), (32, 32, 3)


@pytest.fixture(scope="module")
def folder(fashion_mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(tiny_config(num_train_steps=40, eval_every=20, learning_rate=0.02), folder)
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    return run.open_run(folder)


def predict(folder, *flags):
    command = [sys.executable, "-m", "alexnet_jax.predict", f"--workdir={folder}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_run_opens_as_it_was_saved(folder, opened):
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    state = saved_state(folder, 40)
    for layer, leaves in opened.params.items():
        for name, x in leaves.items():
            np.testing.assert_array_equal(x, state[f"/params/{layer}/{name}"])
    assert opened.step == 40 and opened.names[9] == "Ankle boot"
    train_images = opened.load("train[:1000]").images
    np.testing.assert_allclose(opened.preprocess.mean, train_images.mean(0), rtol=1e-5, atol=1e-4)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))


def test_its_error_is_the_one_that_training_found(folder, opened):
    result = train.train_and_evaluate(tiny_config(num_train_steps=40, eval_every=20, learning_rate=0.02), folder)
    assert opened.error(opened.load("test[:200]")) == pytest.approx(result["test_top1_error"])
    p = opened.predict(opened.load("test[:7]").images)
    assert p.shape == (7, 10)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)


def test_activations_in_parts_are_those_of_the_whole(opened, monkeypatch):
    images = opened.load("test[:23]").images
    exact = activations(opened.model, opened.params, opened.preprocess.center_crop(images))
    monkeypatch.setattr(run, "AT_A_TIME", 10)  # the last part is filled up
    np.testing.assert_allclose(opened.activations(images), exact["fc7"], rtol=1e-4, atol=1e-5)
    assert opened.activations(images, "conv4").shape == exact["conv4"].shape


def test_files_of_any_kind(folder, opened, tmp_path):
    test = opened.load("test[:2]")
    Image.fromarray(test.images[0, ..., 0]).save(tmp_path / "boot.png")
    Image.fromarray(test.images[1, ..., 0]).convert("RGB").resize((280, 280), Image.Resampling.NEAREST).save(
        tmp_path / "large.webp", lossless=True
    )
    rgba = Image.new("RGBA", (5, 90), (200, 0, 0, 0))
    rgba.save(tmp_path / "transparent.png")
    (tmp_path / "text.png").write_text("no image")
    half = (tmp_path / "boot.png").read_bytes()
    (tmp_path / "half.png").write_bytes(half[: len(half) // 2])
    names = "boot.png", "text.png", "large.webp", "half.png", "transparent.png", "none.gif"
    done = predict(folder, f"--out={tmp_path / 'out.png'}", *(tmp_path / name for name in names))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name in ("text.png", "half.png", "none.gif"):
        assert f"Error: {tmp_path / name}: " in done.stderr
    assert done.stderr.count("Error") == 3
    large = read_image(tmp_path / "large.webp", GREY)
    assert np.abs(large.astype(float) - test.images[1]).mean() < 12  # resized there and back
    for name, image in (("boot.png", test.images[0]), ("large.webp", large)):
        p = opened.predict(image[None])[0]
        shown = done.stdout.split(f"\n{name}\n")[1].splitlines()[2:7]
        for line, place in zip(shown, np.argsort(-p)[:5], strict=True):
            assert line.startswith(opened.names[place]) and f"{100 * p[place]:.1f} %" in line
    assert "transparent.png: on a light ground" in done.stdout and "boot.png: on" not in done.stdout
    assert Image.open(tmp_path / "out.png").size[0] > 300


def test_a_folder_that_is_not_there_and_a_wrong_out_are_named(tmp_path):
    assert f"{tmp_path / 'none'}" in (done := predict(tmp_path / "none", "x.png")).stderr and "--out" not in done.stderr
    done = predict(tmp_path, "x.png", f"--out={tmp_path / 'none' / 'o.png'}")
    assert done.returncode == 1 and done.stderr.startswith("Error: --out=") and done.stderr.count("\n") == 1


def test_no_run_is_one_line(tmp_path):
    done = predict(tmp_path, "x.png")
    assert done.returncode == 1 and "holds no run" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_damaged_checkpoint_is_named_and_left_alone(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(largest_file(copy / "checkpoints" / "40"), "truncated")
    with pytest.raises(run.RunError, match="checkpoints/40 is damaged") as error:
        run.open_run(copy)
    assert "\n" not in str(error.value) and (copy / "checkpoints" / "40").exists()


@pytest.mark.parametrize("content,words", [
    ("{", "not a config"), ('{"widht": 3}', "widht"), (None, "no checkpoint yet"),
])  # fmt: skip
def test_a_folder_that_holds_no_run_to_read(fashion_mnist, tmp_path, content, words):
    text = '{"train_split": "train[:50]"}' if content is None else content
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(run.RunError, match=words):
        run.open_run(tmp_path)


def test_grey_and_colour_become_each_other(tmp_path):
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:] = (255, 0, 0)
    Image.fromarray(colours).save(tmp_path / "red.bmp")
    np.testing.assert_array_equal(read_image(tmp_path / "red.bmp", COLOUR), colours)
    assert (read_image(tmp_path / "red.bmp", GREY) == 76).all()  # 0.299 of 255
    assert (read_image(tmp_path / "red.bmp", GREY, invert=True) == 179).all()
    grey = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", COLOUR), grey[..., None].repeat(3, axis=2))


def test_the_shorter_side_and_the_centre_count(tmp_path):
    wide = np.zeros((64, 256), np.uint8)
    wide[:, 96:160] = 200  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", GREY)[:, 1:-1] > 190).all()
    Image.new("L", (3, 1), 70).save(tmp_path / "tiny.png")
    assert (read_image(tmp_path / "tiny.png", GREY) == 70).all()


def test_sixteen_bits_transparency_and_the_camera(tmp_path):
    Image.fromarray(np.full((28, 28), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", GREY) == 100).all()
    palette = Image.new("P", (28, 28))
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert (read_image(tmp_path / "clear.gif", COLOUR) == 255).all()
    upper = np.zeros((32, 32), np.uint8)
    upper[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise
    Image.fromarray(upper).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", (32, 32, 1))[..., 0]
    np.testing.assert_array_equal(turned, np.rot90(upper, -1))


def test_nearest_against_numpy(monkeypatch):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(25, 3, 4)), rng.normal(size=(60, 3, 4))
    distance = np.linalg.norm((queries[:, None] - keys[None]).reshape(25, 60, -1), axis=-1)
    monkeypatch.setattr(run, "AT_A_TIME", 10)
    np.testing.assert_array_equal(run.nearest(queries, keys, 5), np.argsort(distance, axis=1)[:, :5])
    assert run.precision([1, 2], np.array([[1, 1, 2], [1, 2, 2]])) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="expected at least 61"):
        run.nearest(queries, keys, 61)


def test_the_layers_of_the_paper_as_a_table():
    lines = run.layer_summary(AlexNet(), (224, 224, 3)).splitlines()
    assert lines[2].split() == ["conv1", "55×55×96", "11×11×3×96", "34,944"]
    assert lines[-1].split() == ["total", "60,965,224"]


def test_the_towers_influence_each_other_from_conv3_on(opened):
    images = opened.preprocess.center_crop(opened.load("test[:5]").images)
    influence = run.tower_influence(opened.model, opened.params, images)
    assert {name for name, change in influence.items() if change == 0} == {
        "conv1", "norm1", "pool1", "conv2", "norm2", "pool2"
    }  # fmt: skip
    assert list(influence)[-1] == "fc8" and jax.tree.all(jax.tree.map(np.isfinite, influence))
