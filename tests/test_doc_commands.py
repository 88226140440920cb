"""Every command of the docs runs as it is written there, on less data: in order, in one directory."""

import os
import subprocess
import sys

import pytest
from pages import SHELL, commands_of
from PIL import Image
from runners import ROOT, TINY
from synthetic_data import photograph

# What the docs mark a block with that needs more than this machine; `test_imagenet.py` runs the last two.
ELSEWHERE = {
    "cluster", "GPU", "an environment with PyTorch", "Apache Beam and ImageNet", "ImageNet", "photographs"
}  # fmt: skip
LESS = {  # flags that are added to each command of a module
    "alexnet_jax.main": (*TINY, "--config.num_train_steps=4", "--config.eval_every=2"),
    "alexnet_jax.prepare": ("--workers=1",),
    "alexnet_jax.predict": (),
    "alexnet_jax.evaluate": (),
    "experiments.benchmark": ("--quick", "--parts=growth", "--batches=2"),
    "experiments.loader": ("--rounds=1", "--seconds=0.2", "--workers=1"),
    "experiments.sharding": ("--devices=2", "--batch=4", "--steps=1", "--layouts=tower"),
    "experiments.projection": (),
}
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
    for name in ("shirt.jpg", "boot.png"):
        Image.fromarray(photograph(0, 40, 50)).save(folder / name)
    (folder / "IMAGES").symlink_to(image_folder)
    (folder / "alexnet_jax").symlink_to(ROOT / "alexnet_jax")  # for `python -m`
    return folder


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_docs(folder, words):
    module, *arguments = ["small" if word == "NAME" else word for word in words]
    flags = list(LESS[module])
    if any("cifar10" in word for word in arguments):
        flags += ["--config.dataset=synthetic_rgb"]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, *flags], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
