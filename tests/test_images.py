"""Image files of every kind as arrays: for a data set, for a prediction, and from a data set's records."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from runners import PHOTOGRAPHS, ROOT
from synthetic_data import encoded, photograph

from alexnet_jax.augment import center_crop
from alexnet_jax.data.images import RESIZINGS, decode, read_image, to_square

GRAY, COLOR = (28, 28, 1), (32, 32, 3)


def exact_square(image):
    """Bicubic (a = −1/2) with its kernel widened to the scale, in float64, then the central 256×256."""

    def weights(size, target):
        scale = size / target
        center = (np.arange(target)[:, None] + 0.5) * scale
        x = np.abs((np.arange(size) + 0.5 - center) / max(scale, 1))
        w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return w / w.sum(1, keepdims=True)

    height, width = image.shape[:2]
    rows, columns = (round(side * 256 / min(width, height)) for side in (height, width))
    across = np.einsum("cw,hwk->hck", weights(width, columns), image.astype(np.float64), optimize=True)
    out = np.einsum("rh,hck->rck", weights(height, rows), across, optimize=True)
    top, left = (rows - 256) // 2, (columns - 256) // 2
    return np.clip(out, 0, 255)[top : top + 256, left : left + 256]


@pytest.mark.parametrize("width,height", [(700, 512), (400, 611), (256, 256), (180, 120)])
def test_shorter_side_to_256_then_the_center(width, height):
    image = photograph(0, width, height)
    square = to_square(encoded(Image.fromarray(image), "PNG"))
    assert square.shape == (256, 256, 3) and square.dtype == np.uint8
    worst = np.abs(square - exact_square(image)).max()
    assert worst < 1.2  # Pillow rounds after each axis, and its kernel overshoots


def test_fine_stripes_do_not_alias():
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_square(encoded(Image.fromarray(stripes), "PNG"))[:, 2:-2].astype(int) - 128).max() < 8


@pytest.mark.parametrize("mode,file_format", [
    ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("RGB", "WEBP"),
])  # fmt: skip
def test_every_mode_becomes_rgb(mode, file_format):
    image = Image.fromarray(photograph(1, 256, 256))
    gray = np.asarray(image.convert("1" if mode == "1" else "L"), np.float64) * (255 if mode == "1" else 1)
    expected = gray[..., None] if mode in ("L", "LA", "1") else np.asarray(image, np.float64)
    if mode == "P":  # of 256 colors
        expected = np.asarray(image.convert("P").convert("RGB"), np.float64)
    options = {} if file_format == "PNG" else {"quality": 95}
    square = to_square(encoded(image.convert(mode), file_format, **options))
    wrong = np.abs(square - expected).mean()
    assert wrong < 2


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(file_format):
    gray = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    square = to_square(encoded(Image.fromarray(gray), file_format))
    np.testing.assert_array_equal(square, np.round(gray[..., None] / 257).repeat(3, 2))


def test_twelve_bits_become_eight():
    gray = np.linspace(0, 4095, 256 * 256).astype(np.int64)
    pairs = (gray[::2] << 12) | gray[1::2]  # three bytes, the higher first
    pixels = np.stack([pairs >> 16, pairs >> 8, pairs], axis=1).astype(np.uint8).tobytes()
    fields = {256: 256, 257: 256, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 256, 279: len(pixels)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    file = struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(fields)) + directory
    square = to_square(file + bytes(4))
    np.testing.assert_array_equal(square[..., 0].ravel(), np.round(gray * 255 / 4095))


def of_many_pixels():
    return encoded(Image.new("1", (10_000, 9_000)), "PNG")


@pytest.mark.parametrize("file,words", [
    (lambda: encoded(Image.new("F", (300, 300), 0.5), "TIFF"), "mode F have no known range"),
    (lambda: encoded(Image.new("I", (300, 300), 70_000), "TIFF"), "mode I have no known range"),
    (of_many_pixels, "90000000 pixels"),
    (lambda: b"", "empty"),
    (lambda: b"text", "not an image"),
])  # fmt: skip
def test_files_without_a_known_range_are_refused(file, words):
    with pytest.raises(Exception, match=words):
        to_square(file())


def test_transparency_is_dropped_without_a_warning(recwarn):
    image = Image.fromarray(photograph(1, 300, 280)).convert("P")
    to_square(encoded(image, "PNG", transparency=bytes(range(256))))
    assert not recwarn.list


def test_gray_and_color_become_each_other(tmp_path):
    colors = np.zeros((32, 32, 3), np.uint8)
    colors[:] = (255, 0, 0)
    Image.fromarray(colors).save(tmp_path / "red.bmp")
    np.testing.assert_array_equal(read_image(tmp_path / "red.bmp", COLOR), colors)
    assert (read_image(tmp_path / "red.bmp", GRAY) == 76).all()  # 0.299 of 255
    assert (read_image(tmp_path / "red.bmp", GRAY, invert=True) == 179).all()
    gray = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png", COLOR), gray[..., None].repeat(3, axis=2))


def test_the_shorter_side_and_the_center_count(tmp_path):
    wide = np.zeros((64, 256), np.uint8)
    wide[:, 96:160] = 200  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", GRAY)[:, 1:-1] > 190).all()
    Image.new("L", (3, 1), 70).save(tmp_path / "tiny.png")
    assert (read_image(tmp_path / "tiny.png", GRAY) == 70).all()


def test_sixteen_bits_transparency_and_exif_orientation(tmp_path):
    Image.fromarray(np.full((28, 28), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", GRAY) == 100).all()
    palette = Image.new("P", (28, 28))
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert (read_image(tmp_path / "clear.gif", COLOR) == 255).all()
    upper = np.zeros((32, 32), np.uint8)
    upper[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise
    Image.fromarray(upper).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", (32, 32, 1))[..., 0]
    np.testing.assert_array_equal(turned, np.rot90(upper, -1))


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_what_can_be_decoded_and_what_cannot(gray, file_format):
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((40, 30)).convert("L" if gray else "RGB")
    file = io.BytesIO()
    image.save(file, file_format)
    out = np.empty((30, 40, 1 if gray else 3), np.uint8)
    decode(file.getvalue(), out)
    np.testing.assert_array_equal(out, np.asarray(Image.open(file)).reshape(out.shape))
    for broken in (b"", b"not an image", file.getvalue()[: len(file.getvalue()) // 2]):
        with pytest.raises(ValueError):
            decode(broken, out)
    with pytest.raises(ValueError, match="30×40; expected 30×41"):
        decode(file.getvalue(), np.empty((30, 41, out.shape[2]), np.uint8))


def test_the_real_photographs():
    if not PHOTOGRAPHS.exists():
        pytest.skip("no photographs in $ALEXNET_TEST_DATA")
    gray = 0
    for path in sorted(PHOTOGRAPHS.iterdir()):
        square = to_square(path.read_bytes())
        assert square.shape == (256, 256, 3)
        gray += (square == square[..., :1]).all()
    assert gray == 3


def test_a_long_strip_is_cropped_before_it_is_enlarged():
    strip = encoded(Image.fromarray(np.arange(60_000, dtype=np.uint32).astype(np.uint8)[None].repeat(3, 0)), "PNG")
    code = (
        "import resource, sys; from alexnet_jax.data.images import to_square; to_square(PNG)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "square = to_square(sys.stdin.buffer.read()); assert square.shape == (256, 256, 3), square.shape\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    ).replace("PNG", repr(encoded(Image.new("L", (9, 9)), "PNG")))
    done = subprocess.run([sys.executable, "-c", code], input=strip, capture_output=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10_000  # kB


def test_a_small_image_is_enlarged_as_the_formula_says():
    for size in ((200, 3), (3, 200), (180, 120)):
        image = photograph(0, *size)
        worst = np.abs(to_square(encoded(Image.fromarray(image), "PNG")) - exact_square(image)).max()
        assert worst < 1.2


def metadata(**options):
    """A PNG with metadata."""
    info = PngImagePlugin.PngInfo()
    for key, (value, compressed) in options.pop("text", {}).items():
        info.add_text(key, value, zip=compressed)
    return encoded(Image.fromarray(photograph(2, 256, 256)), "PNG", pnginfo=info, **options)


@pytest.mark.parametrize("file", [
    lambda: metadata(text={"Comment": ("x" * 2_000_000, False)}),
    lambda: metadata(text={"Comment": ("x" * 2_000_000, True)}),
    lambda: metadata(icc_profile=np.random.default_rng(0).bytes(2_000_000)),
    lambda: metadata(text={"Raw profile type exif": ("\nexif\n  12\nnot hexadecimal", False)}),
    lambda: metadata(text={"Raw profile type exif": ("", True)}),
    lambda: metadata(exif=b"Exif\0\0MM\0*\0\0\xff\xff broken"),
], ids=["text", "compressed text", "ICC", "EXIF text", "empty EXIF text", "EXIF"])  # fmt: skip
def test_a_png_is_read_whatever_its_metadata(file, tmp_path):
    pixels, out = photograph(2, 256, 256), np.empty((256, 256, 3), np.uint8)
    np.testing.assert_array_equal(to_square(file()), pixels)
    (tmp_path / "image.png").write_bytes(file())
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", (256, 256, 3)), pixels)
    decode(file(), out)
    np.testing.assert_array_equal(out, pixels)


@pytest.mark.parametrize("stray", [b"\n", b"\0", b"\xef\xbb\xbf"])
def test_stray_bytes_before_the_header_of_a_jpeg(stray, tmp_path):
    sound, out = encoded(Image.fromarray(photograph(3, 256, 256))), np.empty((256, 256, 3), np.uint8)
    np.testing.assert_array_equal(to_square(stray + sound), to_square(sound))
    decode(stray + sound, out)
    np.testing.assert_array_equal(out, to_square(sound))
    (tmp_path / "stray.jpg").write_bytes(stray + sound)
    (tmp_path / "sound.jpg").write_bytes(sound)
    np.testing.assert_array_equal(*(read_image(tmp_path / f"{x}.jpg", (256, 256, 3)) for x in ("stray", "sound")))
    with pytest.raises(ValueError, match="not an image"):
        to_square(b"text " * 100 + sound)


def test_a_record_of_a_data_set_is_read_without_its_orientation():
    exif, pixels, out = Image.Exif(), photograph(4, 32, 32), np.empty((32, 32, 3), np.uint8)
    exif[0x0112] = 6
    for file_format in ("PNG", "JPEG"):
        file = encoded(Image.fromarray(pixels), file_format, exif=exif)
        decode(file, out)
        np.testing.assert_array_equal(out, np.asarray(Image.open(io.BytesIO(file))))


# What torchvision 0.28's Resize(256) and CenterCrop(224) give of a file of these sizes (made by `stripes`): CRC-32.
TORCHVISION = {
    (500, 375): 0x214B6FE1,
    (375, 500): 0x49DF22F8,
    (333, 500): 0xBE1CE9AA,
    (256, 256): 0x367E4253,
    (257, 301): 0x632A0B48,
    (100, 87): 0x90F4DAFC,
    (1024, 683): 0x0DFA71D6,
    (640, 257): 0xCC865D62,
    (1001, 100): 0xBA9F8716,
    (224, 300): 0xDF2453F5,
    (3001, 2003): 0xC19BC97E,
}


def stripes(width, height):
    """Colors of integers alone, the same on every machine, with fine and coarse structure: uint8 [height, width, 3]."""
    rows, columns = np.arange(height)[:, None], np.arange(width)
    return np.stack([rows * 7 + columns * 3, rows * columns // 5, (rows // 9) * 40 + columns * 11], -1).astype(np.uint8)


@pytest.mark.parametrize("size", TORCHVISION, ids=str)
def test_torchvision_bit_for_bit(size, tmp_path):
    Image.fromarray(stripes(*size)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", (256, 256, 3), resizing="torchvision")
    assert zlib.crc32(np.asarray(center_crop(image[None], 224)).tobytes()) == TORCHVISION[size]


def test_caffe_stretches_to_the_shape(tmp_path):
    pixels = stripes(301, 190)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", (256, 256, 3), resizing="caffe")
    np.testing.assert_array_equal(image, cv2.resize(cv2.imread(str(tmp_path / "a.png")), (256, 256))[..., ::-1])
    y, x = (np.clip((np.arange(256) + 0.5) * n / 256 - 0.5, 0, n - 1) for n in (190, 301))  # two pixels a side
    top, left = np.minimum(y.astype(int), 188), np.minimum(x.astype(int), 299)
    down, across = (y - top)[:, None, None], (x - left)[None, :, None]
    corners = [[pixels[top + i][:, left + j] for j in (0, 1)] for i in (0, 1)]
    exact = sum(
        (down if i else 1 - down) * (across if j else 1 - across) * corners[i][j] for i in (0, 1) for j in (0, 1)
    )
    assert np.abs(image - exact).max() < 1


@pytest.mark.parametrize("resizing", RESIZINGS)
@pytest.mark.parametrize("size", [(1, 1), (60_000, 1), (3, 9_000), (255, 257)])
@pytest.mark.parametrize("shape", [(256, 256, 3), (28, 28, 1)])
def test_every_size_takes_the_shape(resizing, size, shape, tmp_path):
    Image.fromarray(np.full((*size[::-1], 3), 77, np.uint8)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", shape, resizing=resizing)
    np.testing.assert_array_equal(image, np.full(shape, 77, np.uint8))
