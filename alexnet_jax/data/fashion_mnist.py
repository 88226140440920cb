"""Fashion-MNIST, prepared as a TFDS data set in ArrayRecord without TensorFlow, from the first source that has it."""

import gzip
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax.errors import UserError, one_line
from alexnet_jax.runtime.files import user_path

log = logging.getLogger(__name__)

# Of the uncompressed files: the gzip bytes differ from one distributor to the next.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
MIRROR = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
DOWNLOAD_TIMEOUT_S = 20


class NoSourceError(UserError):
    """No source has the data set; the message lists the sources that were tried."""


def _checked(name: str, content: bytes) -> bytes:
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name} cannot be unpacked: {error}") from None
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"{name} is not the published file (SHA-256 differs)")
    return content


def _from_folder(folder: Path) -> dict[str, bytes]:
    files = {}
    for name in SHA256:
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"it has no {name} or {name}.gz")
        files[name] = _checked(name, path.read_bytes())
    return files


def from_url(base: str) -> dict[str, bytes]:
    """Return the four files, downloaded from the folder `base`; raises OSError, HTTPException or ValueError."""

    def fetch(name):
        with urllib.request.urlopen(f"{base}{name}.gz", timeout=DOWNLOAD_TIMEOUT_S) as response:
            return _checked(name, response.read())

    return {name: fetch(name) for name in SHA256}


def from_apt() -> dict[str, bytes]:
    """Return the four files of Debian's package; apt's state is in a temporary folder, so no root is needed."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise FileNotFoundError("this machine has no apt-get")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("state/lists/partial", "cache/archives/partial"):
            (Path(folder) / name).mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State={folder}/state", "-o", f"Dir::Cache={folder}/cache"]
        apt += ["-o", "Dir::State::status=/var/lib/dpkg/status", "-o", "APT::Sandbox::User="]
        for command in (
            [*apt, "update"],
            [*apt, "download", DEBIAN_PACKAGE],
            ["sh", "-c", f"dpkg -x {DEBIAN_PACKAGE}_*.deb unpacked"],
        ):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise OSError(f"{' '.join(command[:1] + command[-2:])}: {last}")
        return _from_folder(Path(folder) / "unpacked" / DEBIAN_FOLDER.relative_to("/"))


def find_files(source_dir: str = "") -> dict[str, bytes]:
    """Return the four uncompressed IDX files by name, from the first source that has them; each attempt is logged.

    Args:
      source_dir: a folder with the four files, gzipped or not; "" for none.

    Raises:
      NoSourceError: no source had them; the message lists what was tried.
    """
    official = tfds.builder_cls("fashion_mnist").URL
    sources: list[tuple[str, Callable[[], dict[str, bytes]]]] = [
        (f"Debian's {DEBIAN_FOLDER}", lambda: _from_folder(DEBIAN_FOLDER)),
        (f"the official download {official}", lambda: from_url(official)),
        (f"the mirror {MIRROR}", lambda: from_url(MIRROR)),
        (f"apt-get download {DEBIAN_PACKAGE}", from_apt),
    ]
    if source_dir:
        folder = user_path(source_dir, "config.source_dir")
        sources.insert(0, (f"config.source_dir={source_dir}", lambda: _from_folder(folder)))
    tried = []
    for name, read in sources:
        try:
            files = read()
        except (OSError, HTTPException, ValueError, subprocess.TimeoutExpired) as error:
            tried.append(f"{name}: {one_line(error, 500)}")
            log.info("Fashion-MNIST: no files from %s", tried[-1])
        else:
            log.info("Fashion-MNIST: files from %s", name)
            return files
    raise NoSourceError(
        "Fashion-MNIST was not found. Tried: " + "; ".join(tried) + ". Put the four IDX files (gzipped or not) into a "
        "folder and name it: --config.source_dir=FOLDER"
    )


def prepare(data_dir: str | Path | None, source_dir: str = "") -> None:
    """Write the TFDS data set `fashion_mnist` below `data_dir`, the complete set or nothing.

    TFDS writes into a folder `incomplete.…` and renames it at the end.

    Args:
      data_dir: None is TFDS's default.
      source_dir: as in `find_files`.

    Raises:
      NoSourceError: no source has the files.
      OSError, RuntimeError: the folder cannot be written.
    """
    files = find_files(source_dir)
    official: Any = tfds.builder_cls("fashion_mnist")
    with tfds.core.registered.skip_registration():

        class FashionMNIST(official):
            """TFDS's builder with files in memory; its own extraction and PNG encoding need TensorFlow."""

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples("train"), "test": self._generate_examples("t10k")}

            def _generate_examples(self, prefix):
                images = np.frombuffer(files[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28)
                labels = np.frombuffer(files[f"{prefix}-labels-idx1-ubyte"], np.uint8, offset=8)
                for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield index, {"image": Image.fromarray(image), "label": int(label)}

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = FashionMNIST(data_dir=data_dir, file_format="array_record")
    for leftover in Path(builder.data_path).parent.glob("incomplete.*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    builder.download_and_prepare()
