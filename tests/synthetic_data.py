"""Images that need no download: drawn ones, and two small data sets of TFDS that a network can learn."""

import atexit
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

DATA_DIR = Path(tempfile.mkdtemp(prefix="alexnet-jax-tests-"))  # removed when the tests end
atexit.register(shutil.rmtree, DATA_DIR, ignore_errors=True)

# The shapes of Fashion-MNIST and of CIFAR-10.
SHAPES = {"synthetic": (28, 28, 1), "synthetic_rgb": (32, 32, 3)}
SIZES = {"train": 1_200, "test": 200}
CLASSES = [f"pattern {i}" for i in range(10)]


def photograph(seed, width, height):
    """Return smooth colors, as uint8 [height, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, file_format="JPEG", **options):
    """Return an image as a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def examples(shape, count, seed):
    """Return images uint8 [N, H, W, C] and labels [N]: the smooth pattern of each class with noise, on black."""
    random = np.random.default_rng(seed)
    patterns = np.stack([photograph(i, *shape[1::-1])[..., : shape[2]] for i in range(len(CLASSES))])
    labels = random.integers(0, len(CLASSES), count)
    pixels = np.clip(patterns[labels] / 2 + 64 + random.normal(0, 30, (count, *shape)), 0, 255).astype(np.uint8)
    images = np.zeros_like(pixels)
    images[:, 2:-2, 2:-2] = pixels[:, 2:-2, 2:-2]
    return images, labels


def write(name):
    """Write the data set `name` below `DATA_DIR`, in ArrayRecord, unless it is there, and return its builder."""
    shape = SHAPES[name]
    with tfds.core.registered.skip_registration():

        class Synthetic(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = DATA_DIR  # TFDS looks there for a README of the data set

            def _info(self):
                features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(names=CLASSES)}
                return self.dataset_info_from_configs(
                    features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(seed, split) for seed, split in enumerate(SIZES)}

            def _generate_examples(self, seed, split):
                for i, (image, label) in enumerate(zip(*examples(shape, SIZES[split], seed), strict=True)):
                    yield i, {"image": Image.fromarray(image.squeeze()), "label": int(label)}

    Synthetic.name = name
    tfds.disable_progress_bar()
    builder = Synthetic(data_dir=DATA_DIR, file_format="array_record")
    builder.download_and_prepare()
    return builder
