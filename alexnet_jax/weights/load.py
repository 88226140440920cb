"""Files of weights of every format, recognized by their content."""

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from alexnet_jax.errors import one_line
from alexnet_jax.runtime.files import user_path
from alexnet_jax.weights.description import CORRUPT, Source, Weights, WeightsError
from alexnet_jax.weights.native import is_native, native_weights
from alexnet_jax.weights.read_caffe import is_caffe, read_caffe, read_mean
from alexnet_jax.weights.read_matconvnet import read_matconvnet
from alexnet_jax.weights.read_onnx import is_onnx, read_onnx
from alexnet_jax.weights.read_torch import is_torch_legacy, read_torch_legacy, read_torch_safetensors, read_torch_zip
from alexnet_jax.weights.read_toronto import read_toronto
from alexnet_jax.weights.safetensors_file import read_safetensors, starts_as_safetensors
from alexnet_jax.weights.stored import File, Region, whole
from alexnet_jax.weights.wire import read_message
from alexnet_jax.weights.workdir import read_workdir

log = logging.getLogger(__name__)

FORMATS = "torch's .pth, .safetensors, .caffemodel, .onnx, .npy, .mat, or a run's workdir"
PROTOBUF = (0x08, 0x0A, 0x12, 0x1A, 0x22, 0x3A, 0xA2)  # the first bytes of a ModelProto or a NetParameter
# The files in circulation whose name does not hold the start of their SHA-256, with their hash.
KNOWN = {"bvlc_alexnet.caffemodel": ("sha1", "9116a64c0fbe4459d18f4bb6b56d647b63920377")}


def load_weights(path: str | Path, mean: str | Path | None = None) -> Weights:
    """Return the network, the parameters and the image preparation of a file of weights, or of a run's workdir.

    Reads this project's .safetensors; torchvision's `alexnet` as .pth or .safetensors; Caffe's `bvlc_alexnet` as
    .caffemodel, the ONNX zoo's .onnx, Toronto's .npy and MatConvNet's .mat. The content decides, not the name. Nothing
    of a file is executed. A file in circulation with another hash than its own is named in a warning.

    Args:
      mean: Caffe's `imagenet_mean.binaryproto`, for a .caffemodel, .onnx or .npy; None: Caffe's mean color.

    Raises:
      WeightsError: no such file, one of another format, of another network, or a corrupt one; a mean for a format that
        has its own.
    """
    path = user_path(path, "the file of weights")
    mean_image = None if mean is None else read_mean_file(user_path(mean, "the mean image"))
    if path.is_dir():
        if mean is not None:
            raise WeightsError(f"{path}: a run has its own mean image; expected no other")
        return read_workdir(path)
    with np.errstate(all="ignore"), opened(path, FORMATS) as file:  # values that are not finite are refused by Weights
        return _read(whole(file), Source(file=path.name, sha256=_sha256(file, path.name)), mean_image)


def read_mean_file(path: Path) -> np.ndarray:
    """Return the mean image of a .binaryproto file in RGB, [H, W, 3]; raises WeightsError."""
    with opened(path, FORMATS) as file:
        return read_mean(whole(file))


@contextlib.contextmanager
def opened(path: Path, expected: str) -> Iterator[File]:
    """Open a file to read; whatever a corrupt file raises in the block becomes a WeightsError that names the file."""
    try:
        if path.exists() and not path.is_file():
            raise WeightsError(f"not a file; expected {expected}")
        with open(path, "rb") as file:
            yield file
    except WeightsError as error:
        raise WeightsError(f"{path}: {one_line(error, 500)}") from None
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: {error.strerror}; expected {expected}") from None
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or one_line(error)}") from None
    except CORRUPT as error:
        raise WeightsError(f"{path}: it is corrupt ({type(error).__name__}: {one_line(error)})") from None


def _read(file: Region, source: Source, mean: np.ndarray | None) -> Weights:
    """Return the weights of a file, which starts with what its format's files start with."""
    head = file.bytes(0, min(512, file.size))
    if head.startswith(b"MATLAB 7.3") or head[:8] == b"\x89HDF\r\n\x1a\n":
        raise WeightsError("an HDF5 file; expected a MAT-file of version 5, as save(…, '-v7') writes it")
    if head.startswith(b"PK\3\4"):
        reader: Callable[[], Weights] = partial(read_torch_zip, file, source)
    elif is_torch_legacy(file):
        reader = partial(read_torch_legacy, file, source)
    elif head.startswith(b"MATLAB 5.0"):
        reader = partial(read_matconvnet, file, source)
    elif starts_as_safetensors(file):
        reader = partial(_read_safetensors, file, source)
    else:
        return _read_caffes(file, head, source, mean)
    if mean is not None:
        raise WeightsError(
            "this format has its own mean; a mean image is for Caffe's network as .caffemodel, .onnx or .npy"
        )
    return reader()


def _read_safetensors(file: Region, source: Source) -> Weights:
    metadata, arrays = read_safetensors(file)
    if is_native(metadata):
        return native_weights(metadata, arrays)
    return read_torch_safetensors(metadata, arrays, file.size, source)


def _read_caffes(file: Region, head: bytes, source: Source, mean: np.ndarray | None) -> Weights:
    """Return the weights of a file of Caffe's network that may come with a mean image."""
    if head.startswith((b"\x93NUMPY", b"\x80")):
        return read_toronto(file, source, mean)
    if head[:1] and head[0] in PROTOBUF:
        message = read_message(file)
        if is_onnx(message):
            return read_onnx(message, file.size, source, mean)
        if is_caffe(message):
            return read_caffe(message, file.size, source, mean)
    raise WeightsError(f"not a file of weights, or a truncated one; expected {FORMATS}")


def _sha256(file: File, name: str) -> str:
    """Return a file's SHA-256; a known file with another hash is named in a warning."""
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    kind, expected, actual = "SHA-256", None, found
    if match := re.fullmatch(r"alexnet\b.*-([0-9a-f]{8})\.pth", name):  # torch's files in circulation
        expected = match[1]
    elif name in KNOWN:
        kind, expected = KNOWN[name]
        file.seek(0)
        actual = hashlib.file_digest(file, kind).hexdigest()
    if expected and not actual.startswith(expected):
        log.warning("Warning: %s has the %s %s; expected %s: not the file in circulation", name, kind, actual, expected)
    return found
