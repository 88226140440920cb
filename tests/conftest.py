"""The process of the tests, and the data sets that several test files read."""

import os

import downloads
import jax
import pytest
import synthetic_data
from PIL import Image
from runners import SHARD, TRAINED, tiny_config
from synthetic_data import encoded, photograph

from alexnet_jax import data
from alexnet_jax.data.fashion_mnist import find_files
from alexnet_jax.data.original_files import NoSourceError
from alexnet_jax.preparation.local import prepare
from alexnet_jax.run import open_run
from alexnet_jax.train import train_and_evaluate

DEVICES = 8  # virtual ones, for the meshes of these tests
os.environ.setdefault("PJRT_NPROC", str(os.cpu_count() + DEVICES))  # as sharding.make_mesh does
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.devices()  # started now: the first config that a test trains may ask for fewer


@pytest.fixture(scope="session")
def synthetic():
    """A learnable data set of the shape of Fashion-MNIST, which `TINY` and `tiny_config` train on."""
    return synthetic_data.write("synthetic")


@pytest.fixture(scope="session")
def synthetic_rgb():
    """A learnable data set of the shape of CIFAR-10."""
    return synthetic_data.write("synthetic_rgb")


@pytest.fixture(scope="session")
def fashion_mnist():
    """The real data set, prepared on first use in TFDS's default folder; without it the test is skipped."""
    try:
        return data.open_builder("fashion_mnist")
    except data.DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def trained(synthetic, tmp_path_factory):
    """The working directory of a tiny run of 40 steps."""
    folder = tmp_path_factory.mktemp("run")
    train_and_evaluate(tiny_config(**TRAINED), folder)
    return folder


@pytest.fixture(scope="session")
def opened(trained):
    """The run of `trained`."""
    return open_run(trained)


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """A folder with the four original files of Fashion-MNIST; without any source of them the test is skipped."""
    try:
        files = find_files()
    except NoSourceError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("idx")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
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
    (root / "train" / "a" / ".hidden").write_text("ignored")
    return root


@pytest.fixture(scope="session")
def prepared(image_folder, tmp_path_factory):
    """The data set that is prepared from `image_folder`."""
    return prepare("small", image_folder, tmp_path_factory.mktemp("out"), workers=3, shard_size=SHARD)


@pytest.fixture(scope="session")
def convolutions(tmp_path_factory):
    """The real kernels, HWIO, and biases of torchvision's conv1 … conv5."""
    return downloads.torchvision_convolutions(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Photographs of scikit-image by name, uint8 [H, W, 3]."""
    return downloads.scikit_image_photographs(tmp_path_factory.mktemp("photographs"))
