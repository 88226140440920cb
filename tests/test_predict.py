"""The prediction command on real files."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from runners import ROOT, corrupt

from alexnet_jax.data.images import read_image
from alexnet_jax.weights import read_workdir, write_native


def predict(folder, *flags):
    command = [sys.executable, "-m", "alexnet_jax.predict", f"--workdir={folder}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_files_of_any_kind(trained, opened, tmp_path):
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
    done = predict(trained, f"--out={tmp_path / 'out.png'}", *(tmp_path / name for name in names))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name in ("text.png", "half.png", "none.gif"):
        assert f"Error: {tmp_path / name}: " in done.stderr
    assert done.stderr.count("Error") == 3
    large = read_image(tmp_path / "large.webp", (28, 28, 1))
    assert np.abs(large.astype(float) - test.images[1]).mean() < 12  # resized there and back
    for name, image in (("boot.png", test.images[0]), ("large.webp", large)):
        p = opened.predict(image[None])[0]
        shown = done.stdout.split(f"\n{name}\n")[1].splitlines()[2:7]
        for line, place in zip(shown, np.argsort(-p)[:5], strict=True):
            assert line.startswith(opened.names[place]) and f"{100 * p[place]:.1f} %" in line
    assert "transparent.png: on a light background" in done.stdout and "boot.png: on" not in done.stdout
    assert Image.open(tmp_path / "out.png").size[0] > 300


def test_a_missing_folder_and_a_wrong_out_are_named(tmp_path):
    assert f"{tmp_path / 'none'}" in (done := predict(tmp_path / "none", "x.png")).stderr and "--out" not in done.stderr
    done = predict(tmp_path, "x.png", f"--out={tmp_path / 'none' / 'o.png'}")
    assert done.returncode == 1 and done.stderr.startswith("Error: --out=") and done.stderr.count("\n") == 1


def test_no_run_is_one_line(tmp_path):
    done = predict(tmp_path, "x.png")
    assert done.returncode == 1 and "holds no run" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_names_and_outputs_that_are_not_utf8(trained, opened, tmp_path):
    image = Image.fromarray(opened.load("test[:1]").images[0, ..., 0])
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    image.save(path)
    for encoding in ("ascii", "iso-8859-1", "utf-8"):
        command = [sys.executable, "-m", "alexnet_jax.predict", f"--workdir={trained}", path]
        done = subprocess.run(
            [*command, f"--out={tmp_path / 'out.png'}"], cwd=ROOT, capture_output=True, timeout=300,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr == b"", done.stderr
        output = done.stdout.decode(encoding)
        assert r"caf\xe9.png" in output and (("█" if encoding == "utf-8" else "#") in output)


@pytest.mark.parametrize("command", [("predict", "x.png"), ("evaluate",)])
def test_a_corrupt_checkpoint_is_one_line(trained, tmp_path, command):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for how, checkpoint in zip(
        ("truncated", "missing", "a bit flipped"), (run / "checkpoints").iterdir(), strict=False
    ):
        for file in (path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size > 200):
            corrupt(file, how)
    module, *arguments = command
    done = subprocess.run(
        [sys.executable, "-m", f"alexnet_jax.{module}", f"--workdir={run}", *arguments], cwd=ROOT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"Error: checkpoint {run}/checkpoints/40 is corrupt (")


@pytest.mark.parametrize(
    "workdir,words", [("", "--workdir is empty"), ("s3://bucket/run", "expected a path on a disk")]
)
def test_a_workdir_that_is_no_folder_is_one_line(workdir, words, tmp_path):
    done = predict(workdir, "x.png")
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_file_of_weights_predicts_as_its_run(trained, opened, tmp_path):
    write_native(read_workdir(trained), tmp_path / "net.safetensors")
    Image.fromarray(opened.load("test[:1]").images[0, ..., 0]).save(tmp_path / "boot.png")
    command = [sys.executable, "-m", "alexnet_jax.predict", "--workdir=net.safetensors", "boot.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    expected = predict(trained, f"--out={tmp_path / 'run.png'}", tmp_path / "boot.png").stdout
    assert done.stdout.splitlines()[:8] == expected.splitlines()[:8]
    assert "Written to net.predictions.png" in done.stdout and (tmp_path / "net.predictions.png").exists()
