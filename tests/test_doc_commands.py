"""Every command of the docs runs as it is written there, on less data: in order, in one directory."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import weight_files
from pages import BLOCKS, SHELL, commands_of
from PIL import Image
from runners import ROOT, TINY
from synthetic_data import photograph

# What the docs mark a block with that needs more than this machine. `test_imagenet.py`, `test_compiled.py`
# and `test_finetuning.py` run the last four, where they can.
ELSEWHERE = {
    "cluster", "GPU", "an environment with PyTorch", "Apache Beam and ImageNet", "ImageNet", "photographs",
    "the extras compile-gpu and compile-tpu", "a folder of images and a file of weights", "minutes and real weights",
}  # fmt: skip
LESS = {  # flags that are added to each command of a module
    "alexnet_jax.main": (*TINY, "--config.num_train_steps=4", "--config.eval_every=2"),
    "alexnet_jax.prepare": ("--workers=1",),
    "alexnet_jax.predict": (),
    "alexnet_jax.evaluate": (),
    "alexnet_jax.convert": (),
    "alexnet_jax.export": (),
    "alexnet_jax.features": (),
    "experiments.benchmark": ("--quick", "--parts=growth", "--batches=2"),
    "experiments.loader": ("--rounds=1", "--seconds=0.2", "--workers=1"),
    "experiments.sharding": ("--devices=2", "--batch=4", "--steps=1", "--layouts=tower"),
    "experiments.projection": (),
}
READS_A_RUN = {f"alexnet_jax.{name}" for name in ("evaluate", "export", "features", "predict")}
LESS_DATA = {"NAME": "small", "test[:1000]": "test[:100]"}
COMMANDS = [
    pytest.param(words[words.index("-m") + 1 :], id=f"{block}-{words[words.index('-m') + 1]}")
    for block in SHELL
    if block.needs not in ELSEWHERE
    for words in commands_of(block.text)
    if words[0] == "python" and "-m" in words
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, synthetic, synthetic_rgb, image_folder):
    """The current directory of the commands, with the files that they read."""
    folder = tmp_path_factory.mktemp("docs")
    for directory in ("photographs", "PHOTOGRAPHS"):
        (folder / directory).mkdir(exist_ok=True)
    for name in ("shirt.jpg", "boot.png", "cat.jpg", "dog.jpg", "photographs/cat.jpg", "PHOTOGRAPHS/shirt.jpg"):
        Image.fromarray(photograph(0, 40, 50)).save(folder / name)
    torchvision = weight_files.random_params(weight_files.FULL_TORCH_WIDTHS, towers=1)  # as --keys=torch requires
    weight_files.torch_zip(folder / "alexnet-owt-7be5be79.pth", torchvision)
    weight_files.caffe(folder / "bvlc_alexnet.caffemodel", weight_files.random_params())
    weight_files.caffe_mean(folder / "imagenet_mean.binaryproto", np.full((3, 256, 256), 100, np.float32))
    heads = {
        f"lin{i}.model.1.weight": np.ones((1, n, 1, 1), np.float32) for i, n in enumerate((64, 192, 384, 256, 256))
    }
    weight_files.torch_legacy(folder / "alex.pth", heads, keys=dict)
    (folder / "IMAGES").symlink_to(image_folder)
    (folder / "alexnet_jax").symlink_to(ROOT / "alexnet_jax")  # for `python -m`
    return folder


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_docs(folder, words, trained):
    module, *arguments = [LESS_DATA.get(word, word) for word in words]
    for word in arguments:
        run = folder / word
        if word.startswith("runs/") and module in READS_A_RUN and not (run / "config.json").exists():
            shutil.copytree(trained, run, dirs_exist_ok=True)
    flags = list(LESS[module])
    if any("cifar10" in word for word in arguments):
        flags += ["--config.dataset=synthetic_rgb"]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, *flags], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_examples_on_the_files_of_these_commands(folder, monkeypatch):
    monkeypatch.chdir(folder)
    blocks = [b for b in BLOCKS if b.language == "python" and b.needs in ("a download", "features.npz")]
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block.text, str(block), "exec"), {})
