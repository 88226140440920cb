"""Fashion-MNIST, prepared as a TFDS data set in ArrayRecord without TensorFlow, from the first source that has it."""

import gzip
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax.data.original_files import Files, Source, check_sha256, download, from_first_source, write

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


def _checked(name: str, content: bytes) -> bytes:
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name} cannot be unpacked: {error}") from None
    check_sha256(name, content, SHA256[name])
    return content


def _from_folder(folder: Path) -> Files:
    files = {}
    for name in SHA256:
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"it has no {name} or {name}.gz")
        files[name] = _checked(name, path.read_bytes())
    return files


def from_url(base: str) -> Files:
    """Return the four files, downloaded from the folder `base`; raises OSError, HTTPException or ValueError."""
    return {name: _checked(name, download(f"{base}{name}.gz")) for name in SHA256}


def from_apt() -> Files:
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


def find_files(source_dir: str = "") -> Files:
    """Return the four uncompressed IDX files by name, from the first source that has them; each attempt is logged.

    Args:
      source_dir: a folder with the four files, gzipped or not; "" for none.

    Raises:
      NoSourceError: no source had them; the message lists what was tried.
    """
    official = tfds.builder_cls("fashion_mnist").URL
    sources: list[Source] = [
        (f"Debian's {DEBIAN_FOLDER}", lambda: _from_folder(DEBIAN_FOLDER)),
        (f"the official download {official}", lambda: from_url(official)),
        (f"the mirror {MIRROR}", lambda: from_url(MIRROR)),
        (f"apt-get download {DEBIAN_PACKAGE}", from_apt),
    ]
    advice = "Put the four IDX files (gzipped or not) into a folder and name it: --config.source_dir=FOLDER"
    return from_first_source("Fashion-MNIST", sources, source_dir, _from_folder, advice)


def prepare(data_dir: str | Path | None, source_dir: str = "") -> None:
    """Write the TFDS data set `fashion_mnist` below `data_dir`, the complete set or nothing.

    Args:
      data_dir: None is TFDS's default.
      source_dir: as in `find_files`.

    Raises:
      NoSourceError: no source has the files.
      OSError, RuntimeError: the folder cannot be written.
    """
    files = find_files(source_dir)

    def examples(prefix: str) -> Iterator[dict[str, Any]]:
        images = np.frombuffer(files[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(files[f"{prefix}-labels-idx1-ubyte"], np.uint8, offset=8)
        for image, label in zip(images, labels, strict=True):
            yield {"image": Image.fromarray(image), "label": int(label)}

    write("fashion_mnist", data_dir, {"train": examples("train"), "test": examples("t10k")})
