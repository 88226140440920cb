"""Image files as arrays of one size, as section 2 makes them, and as torchvision and Caffe do."""

import contextlib
import io
import warnings
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

SIDE = 256
RESIZINGS = ("fit", "torchvision", "caffe")  # how `read_image` gives a file the shape of a data set's images
# Chroma is stored at half resolution, Pillow's default, which is faster to decode (docs/performance.md).
JPEG_QUALITY = 90
BITS_PER_SAMPLE = 258  # TIFF's tag
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTATION_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
LARGEST_SIDE = 64 * SIDE  # of a resized image that is held in memory before it is cropped
STRAY_BYTES = 64  # before a JPEG's header, at most


def to_square(file: bytes) -> np.ndarray:
    """Return an image file of ImageNet at 256×256 in RGB.

    The format is detected from the content, not from the file's name. Gray and CMYK are converted to RGB, and 16 bits
    to 8. Transparency is dropped, and EXIF orientation is ignored, as by ImageNet's other readers.

    Returns:
      uint8 [256, 256, 3].

    Raises:
      Exception: of several types, for a file that is no image, a truncated one, one whose pixels have no known range
        (32-bit integers and floats), or one that Pillow takes for a decompression bomb.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of transparency and EXIF data, which are dropped
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with _open(file) as opened:
            image = _eight_bits(opened).convert("RGB")
    width, height = (max(SIDE, round(side * SIDE / min(image.size))) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    if min(image.size) < SIDE:  # cropped first: 60,000×1 pixels would grow to 16 GB
        across, down = image.width / width, image.height / height
        box = left * across, top * down, (left + SIDE) * across, (top + SIDE) * down
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box))
    image = image.resize((width, height), Image.Resampling.BICUBIC)  # its kernel widens with the scale: antialiased
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def to_jpeg(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def decode(file: bytes, out: np.ndarray) -> None:
    """Decode a JPEG or a PNG into `out`, uint8 [H, W, C].

    JPEG is decoded by simplejpeg (libjpeg-turbo), which is the fastest; PNG by OpenCV.

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
        image = cv2.imdecode(np.frombuffer(file, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION) if file else None
        if image is None and (start := _stray_bytes(file)):
            return decode(file[start:], out)
        if image is None:
            raise ValueError("neither a JPEG nor a PNG")
        height, width = image.shape[:2]
        if (height, width) == out.shape[:2]:
            out[:] = image.reshape(out.shape)
    if (height, width) != out.shape[:2]:
        raise ValueError(f"it is {height}×{width}; expected {out.shape[0]}×{out.shape[1]}")


def read_image(path: str | Path, shape: tuple[int, ...], invert: bool = False, resizing: str = "fit") -> np.ndarray:
    """Return an image file in the shape of a data set's images.

    EXIF orientation is applied, transparent pixels become white, and only the first frame of several is read.

    Args:
      shape: [H, W, C] of the data set's images; C is 1 or 3.
      invert: whether to exchange black and white.
      resizing: a name in `RESIZINGS`.
        "fit": the largest center crop of the shape's proportions, then resized (bicubic, antialiased).
        "torchvision": bit for bit its `Resize` of the shorter side (bilinear, antialiased), then its `CenterCrop`. An
        image of more than 64:1 is cropped first, with differences of rounding.
        "caffe": stretched to the shape by OpenCV (bilinear, not antialiased), as Caffe's `convert_imageset` does.

    Returns:
      uint8 [H, W, C].

    Raises:
      Exception: of several types, for a file that is no image, a truncated one, one whose pixels have no known range
        (32-bit integers and floats), or one of more than 178 million pixels.
    """
    height, width, channels = shape
    file = Path(path).read_bytes()
    with warnings.catch_warnings(action="ignore"), _open(file) as opened:  # of many pixels and of unusual metadata
        with contextlib.suppress(Exception):  # of metadata that is broken; that of pixels is raised below
            ImageOps.exif_transpose(opened, in_place=True)
        image = _eight_bits(opened)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    if resizing == "torchvision":
        image = _resize_and_center_crop(image, width, height)
    elif resizing == "fit":
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if resizing == "caffe":
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    pixels = pixels.reshape(shape)
    return 255 - pixels if invert else pixels


def _resize_and_center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return torchvision's Resize(max(width, height)) and CenterCrop((height, width)) of an image."""
    side, shorter = max(width, height), min(image.size)
    columns, rows = (int(side * length / shorter) for length in image.size)  # rounded down, as torchvision does
    left, top = round((columns - width) / 2), round((rows - height) / 2)
    box = left, top, left + width, top + height
    if max(columns, rows) > LARGEST_SIDE:
        across, down = image.width / columns, image.height / rows
        source = box[0] * across, box[1] * down, box[2] * across, box[3] * down
        return image.resize((width, height), Image.Resampling.BILINEAR, source)
    return image.resize((columns, rows), Image.Resampling.BILINEAR).crop(box)


def _open(file: bytes) -> ImageFile.ImageFile:
    """Open an image as other readers do: a PNG with metadata of any size, a JPEG with some bytes before its header."""
    if not file:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(_without_metadata(file)))
    except UnidentifiedImageError:
        if not (start := _stray_bytes(file)):
            raise ValueError("not an image") from None
    return _open(file[start:])


def _stray_bytes(file: bytes) -> int:
    """Return the number of bytes before the header of a JPEG; 0 also for another file."""
    return max(0, file[:STRAY_BYTES].find(b"\xff\xd8\xff"))


def _without_metadata(file: bytes) -> bytes:
    """Return a PNG without the chunks that Pillow refuses if they are large; other files as they are.

    Kept are those that may hold the orientation, up to 64 kB each.
    """
    if not file.startswith(PNG_SIGNATURE):
        return file
    parts, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(file):
        end = start + 12 + int.from_bytes(file[start : start + 4])  # length, type and checksum take 12 bytes
        kind, keyword = file[start + 4 : start + 8], file[start + 8 : start + 80].split(b"\0")[0]
        text = kind in (b"tEXt", b"zTXt", b"iTXt") and (keyword not in ORIENTATION_TEXTS or end - start > 1 << 16)
        if not text and kind != b"iCCP":
            parts.append(file[start:end])
        start = end
    return b"".join(parts)


def _eight_bits(image: ImageFile.ImageFile) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no known range; expected 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        bits = image.tag_v2[BITS_PER_SAMPLE][0] if isinstance(image, TiffImageFile) else 16  # Pillow reads 12 as 16
        largest = 2**bits - 1
        return Image.fromarray(((np.asarray(image, np.uint32) * 255 + largest // 2) // largest).astype(np.uint8))
    return image
