"""The preparation of a data set: what is stored, interruptions, and what cannot be prepared."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from runners import ROOT, SHARD, blocked_workers, files_of, wait_for
from synthetic_data import encoded, photograph

from alexnet_jax import data
from alexnet_jax import prepare as prepare_command
from alexnet_jax.configs import imagenet2012
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.data.images import to_jpeg, to_square
from alexnet_jax.errors import UserError
from alexnet_jax.preparation.local import prepare
from alexnet_jax.preparation.shards import SHARD_SIZE
from alexnet_jax.preparation.sources import PrepareError, find_parts
from alexnet_jax.preprocess import measure
from alexnet_jax.setup import build_preprocess


@pytest.mark.parametrize("as_file", [True, False])
def test_a_script_without_a_main_guard_is_told_so(image_folder, tmp_path, as_file):
    call = f"prepare('x', {str(image_folder)!r}, {str(tmp_path)!r}, 1)"
    code = f"from alexnet_jax.preparation.local import prepare\n{call}"
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, str(tmp_path / "script.py") if as_file else "-"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=code, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]


def test_a_disk_that_fills_up_at_the_end_costs_no_shard(image_folder, prepared, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tfds.folder_dataset, "write_metadata", full)
        with pytest.raises(PrepareError, match="No space left on device"):
            prepare("small", image_folder, tmp_path, workers=1, shard_size=SHARD)
    work = tmp_path / "small_256" / "incomplete.1.0.0"
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.array_record-*")}
    assert sum(name.endswith(".npz") for name in before) == len(before) / 2 == 10  # each shard with its sums
    folder = prepare("small", image_folder, tmp_path, workers=1, shard_size=SHARD)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record-*")}
    assert written == {name: time for name, time in before.items() if not name.endswith(".npz")}
    assert files_of(folder) == files_of(prepared)


def test_what_is_stored(image_folder, prepared):
    builder = tfds.builder_from_directory(prepared)
    assert tfds.builder("small_256", data_dir=prepared.parents[1]).info.full_name == "small_256/1.0.0"
    assert builder.info.features["label"].names == ["a", "b", "c"]
    for split, size in (("train", 60), ("validation", 10)):
        assert data.split_size(builder, split) == size
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        names = [example["file_name"].decode() for example in source]
        assert sorted(names) == sorted(
            f"{p.parent.name}/{p.name}" for p in image_folder.glob(f"{split}/*/*") if p.stem.isdigit()
        )
        assert names != sorted(names)
        for example, name in zip(source, names, strict=True):
            assert example["image"] == to_jpeg(to_square((image_folder / split / name).read_bytes()))
            assert "abc"[example["label"]] == name[0]
    images, labels = data.load(builder, "train[:20]")
    assert images.shape == (20, 256, 256, 3) and len(labels) == 20
    assert "tensorflow" not in sys.modules


def test_mean_image_and_covariance_are_those_of_the_training_images(image_folder, prepared):
    paths = [path for path in (image_folder / "train").glob("*/*") if path.stem.isdigit()]
    images = np.stack([to_square(path.read_bytes()) for path in paths]).astype(np.float64)
    covariance = np.cov(images.reshape(-1, 3).T, bias=True)
    with np.load(prepared / "statistics.npz") as statistics:
        assert {x.dtype for x in statistics.values()} == {np.dtype(np.float64)}
        np.testing.assert_allclose(statistics["mean_image"], images.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics["covariance"], covariance, rtol=1e-9)
        vectors = statistics["eigenvectors"]
        np.testing.assert_allclose(vectors @ np.diag(statistics["eigenvalues"]) @ vectors.T, covariance, rtol=1e-9)
        assert (np.diff(statistics["eigenvalues"]) < 0).all()


def test_a_killed_preparation_resumes_to_the_same_bytes_with_other_workers(image_folder, prepared, tmp_path):
    call = f"prepare('small', {str(image_folder)!r}, {str(tmp_path)!r}, 1, shard_size={SHARD})"
    (tmp_path / "start.py").write_text(
        f"from alexnet_jax.preparation.local import prepare\nif __name__ == '__main__': {call}"
    )
    process = subprocess.Popen([sys.executable, tmp_path / "start.py"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    work, deadline = tmp_path / "small_256" / "incomplete.1.0.0", time.monotonic() + 120
    while len(list(work.glob("*.npz"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    time.sleep(0.5)  # its workers exit when they lose the parent
    done = {sums.with_suffix("").name for sums in work.glob("*.npz")}
    before = {name: (work / name).stat().st_mtime_ns for name in done}
    assert 3 <= len(done) < 10
    again = prepare("small", image_folder, tmp_path, workers=2, shard_size=SHARD)
    assert before == {name: (again / name).stat().st_mtime_ns for name in done}
    assert files_of(again) == files_of(prepared)
    assert [path.name for path in again.parent.iterdir()] == ["1.0.0"]


def test_files_that_cannot_be_decoded_are_named_and_their_number_is_limited(image_folder, prepared, tmp_path):
    lines = (prepared / "undecodable.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "train/a/notes.JPEG", "train/b/half.JPEG", "validation/c/empty.JPEG"
    ]  # fmt: skip
    assert "truncated" in next(line for line in lines if "half" in line)
    for i in range(5):
        (tmp_path / "images" / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "train" / "a" / f"{i}.png").write_text("not an image")
    (tmp_path / "images" / "train" / "b").symlink_to(image_folder / "train" / "a")
    with pytest.raises(PrepareError, match="6 files cannot be decoded, more than --max_undecodable=5; repair") as error:
        prepare("small", tmp_path / "images", tmp_path, workers=1, max_undecodable=5)
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


def test_already_prepared(image_folder, prepared, tmp_path, caplog):
    caplog.set_level("INFO")
    copy = tmp_path / "small_256" / "1.0.0"
    shutil.copytree(prepared, copy)
    assert prepare("small", image_folder, tmp_path) == copy
    assert "60 train, 10 validation, 3 files undecodable; delete the folder to prepare it again" in caplog.text
    with pytest.raises(PrepareError, match=f"3 files .*=2; repair or remove them, delete {copy}, and run"):
        prepare("small", image_folder, tmp_path, max_undecodable=2)
    shard = copy / "small_256-train.array_record-00002-of-00008"
    os.truncate(shard, 1000)
    with pytest.raises(PrepareError, match="1.0.0, train: files are truncated; delete the folder"):
        prepare("small", image_folder, tmp_path)
    shard.unlink()
    with pytest.raises(PrepareError, match=f"{shard} is missing; delete {copy}"):
        prepare("small", image_folder, tmp_path)


def test_a_prepared_set_without_its_statistics_is_measured_with_a_warning(prepared, tmp_path, caplog):
    copy = tmp_path / "small_256" / "1.0.0"
    shutil.copytree(prepared, copy)
    (copy / "statistics.npz").unlink()
    config = imagenet2012.get_config()
    images = np.zeros((2, 256, 256, 3), np.uint8)
    build_preprocess(config, Dataset(tfds.builder_from_directory(copy)), partial(measure, [images]))
    assert f"{copy}/statistics.npz is missing" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("values,words", [
    ({"workers": -3}, "--workers=-3: expected 0 or more"),
    ({"max_undecodable": -1}, "--max_undecodable=-1: expected 0 or more"),
    ({"dataset": ""}, "--dataset='': expected a name"),
    ({"dataset": "a/b"}, "--dataset='a/b': expected a name .*; for example a_b"),
    ({"dataset": "MyBirds"}, "--dataset='MyBirds': expected a name .*; for example my_birds"),
    ({"dataset": "2024birds"}, "--dataset='2024birds': expected a name .*; for example images_2024birds"),
    ({"dataset": "Vögel"}, "--dataset='Vögel': expected a name .*; for example vogel"),
    ({"data_dir": ""}, "--data_dir is empty"),
    ({"out": "gs://bucket/x"}, "--out=gs://bucket/x: expected a path on a disk"),
])  # fmt: skip
def test_values_that_cannot_work(image_folder, tmp_path, values, words):
    with pytest.raises(UserError, match=words):
        prepare(**{"dataset": "small", "data_dir": image_folder, "out": tmp_path / "out"} | values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [".", "out", "train"])
def test_out_inside_a_folder_of_images(image_folder, out):
    with pytest.raises(PrepareError, match="name an --out outside of it"):
        prepare("small", image_folder, image_folder / out)
    assert not list(image_folder.rglob("*256*"))


@pytest.mark.parametrize("out", ["/proc/x", "/dev/null"])
def test_out_that_cannot_be_written(image_folder, out):
    with pytest.raises(PrepareError, match=f"--out: {out}/small_256/.* cannot be written .*name a folder") as error:
        prepare("small", image_folder, out)
    assert "\n" not in str(error.value)


def test_what_is_skipped_is_named(image_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    class_folder = tmp_path / "train" / "a"
    (class_folder / "deeper").mkdir(parents=True)
    (class_folder / "deeper" / "1.png").write_bytes(b"")
    (class_folder / "2.png").write_bytes(b"")
    (class_folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train" / "b").symlink_to(image_folder / "train" / "b")  # a class
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "loose.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    (tmp_path / "val").mkdir()
    (tmp_path / ".hidden" / "a").mkdir(parents=True)
    (tmp_path / ".hidden" / "a" / "3.png").write_bytes(b"")
    parts, label = find_parts("small", tmp_path, SHARD)
    assert label.names == ["a", "b"] and sum(part.size for part in parts["train"]) == 22
    assert caplog.messages == [
        "skipped, no images at split/class/image: notes.txt, train/a/deeper, train/a/gone.png, train/empty, "
        "train/loose.png and 1 more"
    ]


@pytest.mark.parametrize("size", [20_000, 700_000])  # too little for a shard; for the sums next to it
def test_a_full_disk_is_one_line(image_folder, tmp_path, size):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    flags = ("--dataset=small", f"--data_dir={image_folder}", f"--out={tmp_path}", "--workers=1")
    code, output = run_prepare(*flags, preexec_fn=limit)
    assert code == 1 and output.count("\n") == 1, output
    assert (
        "cannot be written (" in output
        and "File too large" in output
        and "run the same command again to resume" in output
    )
    assert not list((tmp_path / "small_256" / "incomplete.1.0.0").glob("*.writing"))


def test_a_corrupt_source_is_one_line(prepared, tmp_path):
    copy = tmp_path / "small_256" / "1.0.0"
    shutil.copytree(prepared, copy)
    shard = copy / "small_256-train.array_record-00002-of-00008"
    content = bytearray(shard.read_bytes())
    content[1000:-100] = bytes(len(content) - 1100)
    shard.write_bytes(content)
    with pytest.raises(data.DataError, match=f"{copy}, train: example 1. cannot be read .*restore its file") as error:
        prepare("small_256", tmp_path, tmp_path, workers=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["/shards.", ".JPEG"])  # a worker that imports; one that reads an image
def test_a_signal_is_one_line_whatever_the_workers_do(image_folder, tmp_path, number, name):
    (tmp_path / "blocked").mkdir()
    environment, pids = blocked_workers(tmp_path / "blocked", name)
    command = [sys.executable, "-m", "alexnet_jax.prepare", "--dataset=small", f"--data_dir={image_folder}"]
    process = subprocess.Popen(
        [*command, f"--out={tmp_path}", "--workers=1"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: list(pids.iterdir()), process)
    os.killpg(process.pid, number)  # as a terminal does; the worker blocks for 1000 seconds
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert output == "stopped; run the same command again to resume\n"
    assert not any(Path(f"/proc/{pid.name}").exists() for pid in pids.iterdir())


def test_a_small_data_set_has_shards_for_all_cores(image_folder):
    parts, _ = find_parts("small", image_folder, SHARD_SIZE)
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
    ("imagenet2012", r"mlcroissant && tfds build imagenet2012 .*--manual_dir=ARCHIVES .*ILSVRC2012_img_train.tar"),
    ("cifar10", "tfds build cifar10 --file_format=array_record --data_dir="),
    ("mine", "no data set 'mine'"),
])  # fmt: skip
def test_nothing_to_prepare_is_one_line(dataset, words, tmp_path):
    with pytest.raises(PrepareError, match=words) as error:
        prepare(dataset, tmp_path, tmp_path / "out")
    assert "\n" not in str(error.value)


def images_in(*folders):
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / f"{i}.png").write_bytes(encoded(Image.fromarray(photograph(i, 300, 280)), "PNG"))


def test_files_of_the_system_are_skipped_and_named_and_make_no_class(tmp_path, caplog):
    caplog.set_level("INFO")
    images_in(tmp_path / "train" / "a", tmp_path / "train" / "b")
    (tmp_path / "train" / "empty").mkdir()
    for place in ("train/a/Thumbs.db", "train/b/.DS_Store", "train/empty/Thumbs.db", "desktop.ini"):
        (tmp_path / place).write_bytes(b"of the system")
    parts, label = find_parts("small", tmp_path, SHARD)
    assert label.names == ["a", "b"] and sum(part.size for part in parts["train"]) == 2
    assert caplog.messages == [
        "skipped, files of the operating system: desktop.ini, train/a/Thumbs.db, train/b/.DS_Store, "
        "train/empty/Thumbs.db",
        "skipped, no images at split/class/image: train/empty",
    ]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(PrepareError, match=f"--data_dir={tmp_path}/none: no such folder; expected"):
        prepare("small", tmp_path / "none", tmp_path / "out")


def test_classes_that_another_split_lacks_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    images_in(*(tmp_path / place for place in ("train/a", "train/b", "train/c", "validation/b")))
    find_parts("small", tmp_path, SHARD)
    assert caplog.messages == ["validation: no images of a, c"]


def test_a_class_that_has_no_images_to_train_is_refused_by_name(tmp_path):
    images_in(
        tmp_path / "train" / "a", tmp_path / "train" / "b", tmp_path / "test" / "a", tmp_path / "test" / "unknown"
    )
    with pytest.raises(PrepareError, match="^test/unknown: no images of this class in train/") as error:
        prepare("small", tmp_path, tmp_path.with_name("out"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
def test_names_that_are_not_utf8_and_outputs_of_other_encodings(tmp_path, encoding):
    images, latin = tmp_path / "images", os.fsdecode(b"caf\xe9")
    images_in(images / "train" / latin, images / "train" / "Vögel")
    for name in (f"{latin}.jpg", "Möwe.jpg"):
        (images / "train" / latin / name).write_text("not an image")
    flags = ("--dataset=small", f"--data_dir={images}", f"--out={tmp_path / 'out'}", "--workers=1")
    code, output = run_prepare(*flags, env={**os.environ, "PYTHONIOENCODING": encoding}, errors="replace")
    assert code == 0 and "Logging error" not in output, output
    folder = tmp_path / "out" / "small_256" / "1.0.0"
    builder = tfds.builder_from_directory(folder)
    assert builder.info.features["label"].names == ["Vögel", r"caf\xe9"]
    actual = {(x["file_name"].decode(), x["label"]) for x in builder.as_data_source("train")}
    assert actual == {("Vögel/1.png", 0), (r"caf\xe9/0.png", 1)}
    names = [line.split(":")[0] for line in (folder / "undecodable.txt").read_text("utf-8").splitlines()]
    assert sorted(names) == [r"train/caf\xe9/Möwe.jpg", r"train/caf\xe9/caf\xe9.jpg"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    images_in(tmp_path / "images" / "train" / "a", tmp_path / "images" / "train" / "b")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert prepare("small", "~/images", "~/out", workers=1) == tmp_path / "out" / "small_256" / "1.0.0"
    assert not Path("~").exists()


@pytest.mark.parametrize("program,expected", [
    ("/env/bin/alexnet-prepare", "usage: alexnet-prepare "),
    (str(ROOT / "alexnet_jax" / "prepare.py"), "usage: python -m alexnet_jax.prepare "),
])  # fmt: skip
def test_the_help_names_the_command_as_it_was_called(program, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit):
        prepare_command.main()
    assert capsys.readouterr().out.startswith(expected)
