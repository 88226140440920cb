import io
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT
from PIL import Image

from alexnet_jax import data, prepare, recipe
from alexnet_jax.configs import imagenet2012
from alexnet_jax.images import to_jpeg, to_square
from alexnet_jax.prepare import PrepareError

SHARD = 8


def photograph(seed, width, height):
    """Smooth colours, as uint8 [height, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, file_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 images to train in three classes, 10 to validate, and three files that are none."""
    root = tmp_path_factory.mktemp("images")
    for i in range(70):
        image = Image.fromarray(photograph(i, 300 + 10 * (i % 5), 280 + i))
        file = root / ("train" if i < 60 else "validation") / "abc"[i % 3] / f"{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        if i % 10 == 1:
            file.write_bytes(encoded(image.convert("L")))
        elif i % 10 == 2:
            file.write_bytes(encoded(image.convert("CMYK"), quality=95))
        elif i % 10 == 3:
            file.write_bytes(encoded(image.convert("RGBA"), "PNG"))
        else:
            file.write_bytes(encoded(image))
    (root / "train" / "a" / "notes.JPEG").write_text("not an image")
    (root / "train" / "b" / "half.JPEG").write_bytes((root / "train" / "b" / "4.JPEG").read_bytes()[:3000])
    (root / "validation" / "c" / "empty.JPEG").write_bytes(b"")
    (root / "train" / "a" / ".hidden").write_text("not looked at")
    return root


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    return prepare.prepare("small", folder, tmp_path_factory.mktemp("out"), workers=3, shard_size=SHARD)


def exact_square(image):
    """Bicubic (a = −1/2) with its kernel widened to the scale, in float64, then the central 256×256."""

    def weights(size, target):
        scale = size / target
        centre = (np.arange(target)[:, None] + 0.5) * scale
        x = np.abs((np.arange(size) + 0.5 - centre) / max(scale, 1))
        w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return w / w.sum(1, keepdims=True)

    height, width = image.shape[:2]
    rows, columns = (round(side * 256 / min(width, height)) for side in (height, width))
    across = np.einsum("cw,hwk->hck", weights(width, columns), image.astype(np.float64), optimize=True)
    out = np.einsum("rh,hck->rck", weights(height, rows), across, optimize=True)
    top, left = (rows - 256) // 2, (columns - 256) // 2
    return np.clip(out, 0, 255)[top : top + 256, left : left + 256]


@pytest.mark.parametrize("width,height", [(700, 512), (400, 611), (256, 256), (180, 120)])
def test_shorter_side_to_256_then_the_centre(width, height):
    image = photograph(0, width, height)
    square = to_square(encoded(Image.fromarray(image), "PNG"))
    assert square.shape == (256, 256, 3) and square.dtype == np.uint8
    worst = np.abs(square - exact_square(image)).max()
    assert worst < 1.2  # Pillow rounds after each axis, and its kernel overshoots


def test_fine_stripes_do_not_alias():
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_square(encoded(Image.fromarray(stripes), "PNG"))[:, 2:-2].astype(int) - 128).max() < 8


@pytest.mark.parametrize("mode,file_format", [
    ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("RGB", "WEBP"),
])  # fmt: skip
def test_every_mode_becomes_rgb(mode, file_format):
    image = Image.fromarray(photograph(1, 256, 256))
    grey = np.asarray(image.convert("1" if mode == "1" else "L"), np.float64) * (255 if mode == "1" else 1)
    expected = grey[..., None] if mode in ("L", "LA", "1") else np.asarray(image, np.float64)
    if mode == "P":  # of 256 colours
        expected = np.asarray(image.convert("P").convert("RGB"), np.float64)
    options = {} if file_format == "PNG" else {"quality": 95}
    square = to_square(encoded(image.convert(mode), file_format, **options))
    wrong = np.abs(square - expected).mean()
    assert wrong < 2


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(file_format):
    grey = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    square = to_square(encoded(Image.fromarray(grey), file_format))
    np.testing.assert_array_equal(square, np.round(grey[..., None] / 257).repeat(3, 2))


def test_twelve_bits_become_eight():
    grey = np.linspace(0, 4095, 256 * 256).astype(np.int64)
    pairs = (grey[::2] << 12) | grey[1::2]  # three bytes, the higher first
    pixels = np.stack([pairs >> 16, pairs >> 8, pairs], axis=1).astype(np.uint8).tobytes()
    fields = {256: 256, 257: 256, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 256, 279: len(pixels)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    file = struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(fields)) + directory
    square = to_square(file + bytes(4))
    np.testing.assert_array_equal(square[..., 0].ravel(), np.round(grey * 255 / 4095))


def of_many_pixels():
    return encoded(Image.new("1", (10_000, 9_000)), "PNG")


@pytest.mark.parametrize("file,words", [
    (lambda: encoded(Image.new("F", (300, 300), 0.5), "TIFF"), "mode F have no known range"),
    (lambda: encoded(Image.new("I", (300, 300), 70_000), "TIFF"), "mode I have no known range"),
    (of_many_pixels, "90000000 pixels"),
    (lambda: b"", "empty"),
    (lambda: b"text", "not an image"),
])  # fmt: skip
def test_what_cannot_be_decoded_is_not_guessed(file, words):
    with pytest.raises(Exception, match=words):
        to_square(file())


def test_transparency_is_dropped_without_a_warning(recwarn):
    image = Image.fromarray(photograph(1, 300, 280)).convert("P")
    to_square(encoded(image, "PNG", transparency=bytes(range(256))))
    assert not recwarn.list


def test_what_is_stored(folder, prepared):
    builder = tfds.builder_from_directory(prepared)
    assert tfds.builder("small_256", data_dir=prepared.parents[1]).info.full_name == "small_256/1.0.0"
    assert builder.info.features["label"].names == ["a", "b", "c"]
    for split, size in (("train", 60), ("validation", 10)):
        assert data.split_size(builder, split) == size
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        names = [example["file_name"].decode() for example in source]
        assert sorted(names) == sorted(
            f"{p.parent.name}/{p.name}" for p in folder.glob(f"{split}/*/*") if p.stem.isdigit()
        )
        assert names != sorted(names)
        for example, name in zip(source, names, strict=True):
            assert example["image"] == to_jpeg(to_square((folder / split / name).read_bytes()))
            assert "abc"[example["label"]] == name[0]
    images, labels = data.load(builder, "train[:20]")
    assert images.shape == (20, 256, 256, 3) and len(labels) == 20
    assert "tensorflow" not in sys.modules


def test_mean_image_and_covariance_are_those_of_the_training_images(folder, prepared):
    paths = [path for path in (folder / "train").glob("*/*") if path.stem.isdigit()]
    images = np.stack([to_square(path.read_bytes()) for path in paths]).astype(np.float64)
    covariance = np.cov(images.reshape(-1, 3).T, bias=True)
    with np.load(prepared / "statistics.npz") as found:
        assert {x.dtype for x in found.values()} == {np.dtype(np.float64)}
        np.testing.assert_allclose(found["mean_image"], images.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found["covariance"], covariance, rtol=1e-9)
        vectors = found["eigenvectors"]
        np.testing.assert_allclose(vectors @ np.diag(found["eigenvalues"]) @ vectors.T, covariance, rtol=1e-9)
        assert (np.diff(found["eigenvalues"]) < 0).all()


def test_a_killed_preparation_goes_on_to_the_same_bytes_with_other_workers(folder, prepared, tmp_path):
    call = f"prepare.prepare('small', {str(folder)!r}, {str(tmp_path)!r}, 1, shard_size={SHARD})"
    (tmp_path / "start.py").write_text(f"from alexnet_jax import prepare\nif __name__ == '__main__': {call}")
    process = subprocess.Popen([sys.executable, tmp_path / "start.py"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    work, deadline = tmp_path / "small_256" / "incomplete.1.0.0", time.monotonic() + 120
    while len(list(work.glob("*.npz"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    time.sleep(0.5)  # its worker sees that it is alone
    done = {known.with_suffix("").name for known in work.glob("*.npz")}
    before = {name: (work / name).stat().st_mtime_ns for name in done}
    assert 3 <= len(done) < 10
    again = prepare.prepare("small", folder, tmp_path, workers=2, shard_size=SHARD)
    assert before == {name: (again / name).stat().st_mtime_ns for name in done}
    assert files_of(again) == files_of(prepared)
    assert [path.name for path in again.parent.iterdir()] == ["1.0.0"]


def test_files_that_cannot_be_decoded_are_named_and_their_number_is_limited(folder, prepared, tmp_path):
    lines = (prepared / "undecodable.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "train/a/notes.JPEG", "train/b/half.JPEG", "validation/c/empty.JPEG"
    ]  # fmt: skip
    assert "truncated" in next(line for line in lines if "half" in line)
    for i in range(5):
        (tmp_path / "images" / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "train" / "a" / f"{i}.png").write_text("not an image")
    (tmp_path / "images" / "train" / "b").symlink_to(folder / "train" / "a")
    with pytest.raises(PrepareError, match="6 files cannot be decoded, more than --max_undecodable=5; repair") as error:
        prepare.prepare("small", tmp_path / "images", tmp_path, workers=1, max_undecodable=5)
    names = tmp_path / "small_256" / "incomplete.1.0.0" / "undecodable.txt"
    first, *named, rest = str(error.value).splitlines()
    assert named[0] == "  train/a/0.png: not an image" and len(named) == 5 and rest == f"  and 1 more in {names}"
    assert len(names.read_text().splitlines()) == 6 and not (tmp_path / "small_256" / "1.0.0").exists()


def run_prepare(*flags, **popen):
    command = [sys.executable, "-m", "alexnet_jax.prepare", *map(str, flags)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, **popen
    )
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


def test_already_prepared(folder, prepared, tmp_path, caplog):
    caplog.set_level("INFO")
    copy = tmp_path / "small_256" / "1.0.0"
    shutil.copytree(prepared, copy)
    assert prepare.prepare("small", folder, tmp_path) == copy
    assert "60 train, 10 validation, 3 files undecodable; delete the folder to make it anew" in caplog.text
    with pytest.raises(PrepareError, match=f"3 files .*=2; repair or remove them, delete {copy}, and run"):
        prepare.prepare("small", folder, tmp_path, max_undecodable=2)
    shard = copy / "small_256-train.array_record-00002-of-00008"
    os.truncate(shard, 1000)
    with pytest.raises(PrepareError, match="1.0.0, train: files are not whole; delete the folder"):
        prepare.prepare("small", folder, tmp_path)
    shard.unlink()
    with pytest.raises(PrepareError, match=f"{shard} is missing; delete {copy}"):
        prepare.prepare("small", folder, tmp_path)


def test_a_prepared_set_without_its_statistics_is_measured_and_said(prepared, tmp_path, caplog):
    copy = tmp_path / "small_256" / "1.0.0"
    shutil.copytree(prepared, copy)
    (copy / "statistics.npz").unlink()
    config = imagenet2012.get_config()
    images = np.zeros((2, 256, 256, 3), np.uint8)
    recipe.build_preprocess(config, tfds.builder_from_directory(copy), images)
    assert f"{copy}/statistics.npz is missing" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("values,words", [
    ({"workers": -3}, "--workers=-3: expected 0 or more"),
    ({"max_undecodable": -1}, "--max_undecodable=-1: expected 0 or more"),
    ({"dataset": ""}, "--dataset='': expected a name"),
    ({"dataset": "a/b"}, "--dataset='a/b': expected a name"),
])  # fmt: skip
def test_values_that_cannot_work(folder, tmp_path, values, words):
    with pytest.raises(PrepareError, match=words):
        prepare.prepare(**{"dataset": "small", "data_dir": folder, "out": tmp_path / "out"} | values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [".", "out", "train"])
def test_out_inside_a_folder_of_images(folder, out):
    with pytest.raises(PrepareError, match="name an --out outside of it"):
        prepare.prepare("small", folder, folder / out)
    assert not list(folder.rglob("*256*"))


@pytest.mark.parametrize("out", ["/proc/x", "/dev/null"])
def test_out_that_cannot_be_written(folder, out):
    with pytest.raises(PrepareError, match=f"--out: {out}/small_256/.* cannot be written .*name a folder") as error:
        prepare.prepare("small", folder, out)
    assert "\n" not in str(error.value)


def test_what_is_passed_over_is_named(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    class_folder = tmp_path / "train" / "a"
    (class_folder / "deeper").mkdir(parents=True)
    (class_folder / "deeper" / "1.png").write_bytes(b"")
    (class_folder / "2.png").write_bytes(b"")
    (class_folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train" / "b").symlink_to(folder / "train" / "b")  # a class
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "loose.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    (tmp_path / "val").mkdir()
    (tmp_path / ".hidden" / "a").mkdir(parents=True)
    (tmp_path / ".hidden" / "a" / "3.png").write_bytes(b"")
    parts, label = prepare.find_parts("small", tmp_path, SHARD)
    assert label.names == ["a", "b"] and sum(part.size for part in parts["train"]) == 22
    assert caplog.messages == [
        "passed over, as no split/class/image: notes.txt, train/a/deeper, train/a/gone.png, train/empty, "
        "train/loose.png and 1 more"
    ]


@pytest.mark.parametrize("size", [20_000, 700_000])  # too little for a shard; for the sums beside it
def test_a_full_disk_is_one_line(folder, tmp_path, size):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    flags = ("--dataset=small", f"--data_dir={folder}", f"--out={tmp_path}", "--workers=1")
    code, output = run_prepare(*flags, preexec_fn=limit)
    assert code == 1 and output.count("\n") == 1, output
    assert "cannot be written (" in output and "File too large" in output and "the same command goes on" in output
    assert not list((tmp_path / "small_256" / "incomplete.1.0.0").glob("*.writing"))


def test_a_damaged_source_is_one_line(prepared, tmp_path):
    copy = tmp_path / "small_256" / "1.0.0"
    shutil.copytree(prepared, copy)
    shard = copy / "small_256-train.array_record-00002-of-00008"
    content = bytearray(shard.read_bytes())
    content[1000:-100] = bytes(len(content) - 1100)
    shard.write_bytes(content)
    with pytest.raises(data.DataError, match=f"{copy}, train: example 1. cannot be read .*restore its file") as error:
        prepare.prepare("small_256", tmp_path, tmp_path, workers=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(folder, tmp_path, number):
    command = [sys.executable, "-m", "alexnet_jax.prepare", "--dataset=small", f"--data_dir={folder}"]
    process = subprocess.Popen(
        [*command, f"--out={tmp_path}", "--workers=1"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "small_256").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and output.splitlines()[-1] == "stopped; the same command goes on", output
    assert "Traceback" not in output


def test_a_small_set_has_work_for_all_cores(folder):
    parts, _ = prepare.find_parts("small", folder, prepare.SHARD_SIZE)
    assert [part.size for part in parts["train"]] == [16, 16, 16, 14]


def test_beam_that_is_not_installed_is_one_line(tmp_path):
    (tmp_path / "apache_beam.py").write_text("raise ModuleNotFoundError(\"No module named 'apache_beam'\")")
    done = subprocess.run(
        [sys.executable, "-m", "alexnet_jax.prepare_beam", "--help"], cwd=ROOT, capture_output=True, text=True,
        timeout=60, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: ") and 'pip install -e ".[beam]"' in done.stderr


def test_a_prepared_tfds_data_set_as_the_source_and_the_command_line(prepared, tmp_path):
    command = [sys.executable, "-m", "alexnet_jax.prepare", "--dataset=small_256", f"--data_dir={prepared.parents[1]}"]
    command += [f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "0 files could not be decoded" in done.stdout and "--config.dataset=small_256_256" in done.stdout
    first, second = (
        tfds.builder_from_directory(f).as_data_source("validation")
        for f in (prepared, tmp_path / "small_256_256" / "1.0.0")
    )
    assert [(x["label"], x["file_name"]) for x in first] == [(x["label"], x["file_name"]) for x in second]
    assert max(np.abs(a["image"].astype(int) - b["image"]).mean() for a, b in zip(first, second, strict=True)) < 2


@pytest.mark.parametrize("dataset,words", [
    ("imagenet2012", r"\.\[tfds\]. && tfds build imagenet2012 .*--manual_dir=ARCHIVES .*ILSVRC2012_img_train.tar"),
    ("cifar10", "tfds build cifar10 --file_format=array_record --data_dir="),
    ("mine", "no 'mine'"),
])  # fmt: skip
def test_nothing_to_prepare_is_one_line(dataset, words, tmp_path):
    with pytest.raises(PrepareError, match=words) as error:
        prepare.prepare(dataset, tmp_path, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_the_real_photographs():
    folder = ROOT.parent / "shared" / "data" / "imagenet-samples"
    if not folder.exists():
        pytest.skip("no photographs beside this repository")
    grey = 0
    for path in sorted(Path(folder).iterdir()):
        square = to_square(path.read_bytes())
        assert square.shape == (256, 256, 3)
        grey += (square == square[..., :1]).all()
    assert grey == 3
