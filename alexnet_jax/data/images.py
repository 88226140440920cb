"""Image files as arrays of one size (section 2): the shorter side resized, antialiased, then a center crop."""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

SIDE = 256
# Chroma is stored at half resolution, Pillow's default: faster to decode, and at 90 above 36 dB.
JPEG_QUALITY = 90
BITS_PER_SAMPLE = 258  # TIFF's tag


def to_square(file: bytes) -> np.ndarray:
    """Return an image file of ImageNet at 256×256 in RGB.

    The format is detected from the content, not from the file's name. Gray and CMYK become RGB, and 16 bits 8;
    transparency is dropped, and EXIF orientation is ignored, as ImageNet's other readers do.

    Returns:
      uint8 [256, 256, 3].

    Raises:
      Exception: of several types, for a file that is no image, a truncated one, one whose pixels have no known range
        (32-bit integers and floats), or one that Pillow takes for a decompression bomb.
    """
    if not file:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of transparency and EXIF data, which are dropped
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(file)) as opened:
                image = _eight_bits(opened).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError("not an image") from None
    width, height = (max(SIDE, round(side * SIDE / min(image.size))) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)  # its kernel widens with the scale: antialiased
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def to_jpeg(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def decode(file: bytes, out: np.ndarray) -> None:
    """Decode a JPEG or a PNG into `out`, uint8 [H, W, C].

    JPEG is decoded by simplejpeg (libjpeg-turbo), the fastest of three decoders; PNG by OpenCV.

    Raises:
      ValueError: not a complete image, or one of another shape.
    """
    gray = out.shape[2] == 1
    if file[:2] == b"\xff\xd8":
        height, width, *_ = simplejpeg.decode_jpeg_header(file)
        if (height, width) == out.shape[:2]:
            simplejpeg.decode_jpeg(file, "GRAY" if gray else "RGB", buffer=out)
    else:
        mode = cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR_RGB
        image = cv2.imdecode(np.frombuffer(file, np.uint8), mode) if file else None
        if image is None:
            raise ValueError("neither a JPEG nor a PNG")
        height, width = image.shape[:2]
        if (height, width) == out.shape[:2]:
            out[:] = image.reshape(out.shape)
    if (height, width) != out.shape[:2]:
        raise ValueError(f"it is {height}×{width}; expected {out.shape[0]}×{out.shape[1]}")


def read_image(path: str | Path, shape: tuple[int, ...], invert: bool = False) -> np.ndarray:
    """Return an image file in the shape of a data set's images: center crop, then resized.

    EXIF orientation is applied, transparent pixels become white, and only the first frame of several is read.

    Args:
      shape: [H, W, C] of the data set's images; C is 1 or 3.
      invert: whether to exchange black and white.

    Returns:
      uint8 [H, W, C].

    Raises:
      Exception: of several types, for a file that is no image, a truncated one, one whose pixels have no known range
        (32-bit integers and floats), or one of more than 178 million pixels.
    """
    height, width, channels = shape
    with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:  # of unusual metadata
        ImageOps.exif_transpose(opened, in_place=True)
        image = _eight_bits(opened)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(shape)
    return 255 - pixels if invert else pixels


def _eight_bits(image: ImageFile.ImageFile) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no known range; expected 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        bits = image.tag_v2[BITS_PER_SAMPLE][0] if isinstance(image, TiffImageFile) else 16  # Pillow reads 12 as 16
        largest = 2**bits - 1
        return Image.fromarray(((np.asarray(image, np.uint32) * 255 + largest // 2) // largest).astype(np.uint8))
    return image
