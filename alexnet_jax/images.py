"""Image files of any kind as arrays of one size (section 2): the shorter side to it, antialiased, then the centre."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SIDE = 256
# With colours at half resolution, Pillow's default. 200 photographs of ImageNet at quality 80, 90 and 95: 15, 22 and
# 31 KB an image, 33.9, 36.3 and 38.4 dB, and 0.28, 0.36 and 0.49 ms to decode (libjpeg-turbo, one core). Full colour
# resolution at 90: 28 KB, 38.2 dB and 0.47 ms.
JPEG_QUALITY = 90
BITS_PER_SAMPLE = 258  # TIFF's tag


def to_square(file: bytes) -> np.ndarray:
    """The stored form of an image file of ImageNet.

    The content tells the format, whatever the file's name says. Grey and CMYK become RGB, 16 bits 8; transparency is
    dropped, and a camera's note on how to turn the image is not followed, as by ImageNet's other readers.

    Returns:
      uint8 [256, 256, 3].

    Raises:
      Exception: of several types, for a file that is no image, not a whole one, one whose numbers have no known range
        (32-bit integers and floats), or one of more pixels than Pillow takes for honest.
    """
    if not file:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the transparency and the camera's notes, which are dropped
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(file)) as image:
                image = _eight_bits(image).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError("not an image") from None
    width, height = (max(SIDE, round(side * SIDE / min(image.size))) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)  # widens its kernel to the scale: antialiased
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def to_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def read_image(path: str | Path, shape: tuple[int, int, int], invert: bool = False) -> np.ndarray:
    """An image file as an image of a data set.

    A camera's note on how to turn the image is followed, what is transparent becomes white, of several frames the first
    counts.

    Args:
      shape: [H, W, C] of the data set's images; C is 1 or 3.
      invert: whether black and white are exchanged.

    Returns:
      uint8 [H, W, C].

    Raises:
      Exception: of several types, for a file that is no image, not a whole one, or one whose numbers have no known
        range (32-bit integers and floats), or of more than 178 million pixels.
    """
    height, width, channels = shape
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # of many pixels, of odd metadata
        ImageOps.exif_transpose(image, in_place=True)
        image = _eight_bits(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(shape)
    return 255 - pixels if invert else pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no known range; expected 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would cut off all above 255
        bits = image.tag_v2[BITS_PER_SAMPLE][0] if image.format == "TIFF" else 16  # of 12, too, Pillow makes 16
        largest = 2**bits - 1
        return Image.fromarray(((np.asarray(image, np.uint32) * 255 + largest // 2) // largest).astype(np.uint8))
    return image
