"""Whatever opens an image goes through one door: the right values for every kind of file, one sentence for what cannot be read."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldm.images import image_size, load_image, open_image, to_uint8

GREY = np.tile(np.linspace(0, 255, 8, dtype=np.uint8), (6, 1))  # [6, 8]
PHOTO = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 1, "a description"
FUZZ = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def values(source, **options):
    return to_uint8(load_image(source, **options))[0].permute(1, 2, 0).numpy()  # [H, W, C]


# ---- the right values


def with_alpha(mode):
    return Image.merge(mode, [Image.fromarray(GREY)] * (len(mode) - 1) + [Image.new("L", (8, 6), 255)])


KINDS = {
    "grey": (Image.fromarray(GREY), "PNG"), "RGB": (Image.fromarray(GREY).convert("RGB"), "PNG"),
    "palette": (Image.fromarray(GREY).convert("P"), "PNG"), "palette, BMP": (Image.fromarray(GREY).convert("P"), "BMP"),
    "grey with alpha": (with_alpha("LA"), "PNG"), "RGB with alpha": (with_alpha("RGBA"), "WEBP"),
    "premultiplied": (with_alpha("RGBA").convert("RGBa"), "PIL"), "palette with alpha": (with_alpha("LA").convert("PA"), "PIL"),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "16 bits, TIFF": (Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    "16 bits, PGM": (Image.fromarray(GREY.astype(np.uint16) * 257), "PPM"),
    "32 bits to 255": (Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "32 bits to 65535": (Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),
    "32 bits to a million": (Image.fromarray(GREY.astype(np.int32) * 5000), "TIFF"),
    "floats to 1": (Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
    "floats to 255": (Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "floats, some negative": (Image.fromarray(np.where(GREY, GREY / 255, -3).astype(np.float32)), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_has_its_values(kind):
    image, format = KINDS[kind]
    options = {"lossless": True} if format == "WEBP" else {}
    source = image if format == "PIL" else encoded(image, format, **options)
    assert open_image(source).mode in ("L", "LA", "RGB", "RGBA")
    assert np.abs(values(source) - GREY[..., None].astype(int)).max() <= 1 and values(source).shape == (6, 8, 3)
    assert np.abs(values(source, channels=1) - GREY[..., None].astype(int)).max() <= 1
    assert load_image(source, size=(4, 5)).shape == (1, 3, 4, 5)


def test_dark_16_bits_stay_dark():
    for format in ("PNG", "TIFF", "PPM"):
        assert values(encoded(np.full((4, 4), 200, np.uint16), format)).max() == 1


@pytest.mark.parametrize("mode, color, expected", [
    ("1", 1, [255] * 3), ("CMYK", (0, 0, 0, 0), [255] * 3), ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ("YCbCr", (255, 128, 128), [255] * 3),
    ("HSV", (0, 255, 255), [255, 0, 0]), ("RGBA", (255, 0, 0, 0), [255] * 3), ("RGBA", (255, 0, 0, 128), [255, 127, 127]),
    ("LA", (0, 51), [204] * 3),
])  # fmt: skip
def test_colours(mode, color, expected):
    assert values(Image.new(mode, (4, 3), color))[0, 0].tolist() == expected
    if mode in ("1", "RGBA", "LA", "CMYK"):
        assert values(encoded(Image.new(mode, (4, 3), color), "TIFF"))[0, 0].tolist() == expected


@pytest.mark.parametrize("format", ["GIF", "PNG"])
def test_a_transparent_colour_is_white(format):
    image = Image.fromarray(GREY // 128).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    x = values(encoded(image, format, transparency=0))
    assert x[0, 0].tolist() == [255] * 3 and x[0, 7].tolist() == [0, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_every_orientation_is_upright(format, orientation, tmp_path):
    """The file holds the image turned or mirrored, and the EXIF tag that undoes it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    T = Image.Transpose
    undone = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_90,
        7: T.TRANSVERSE,
        8: T.ROTATE_270,
    }
    upright = Image.fromarray(PHOTO).resize((48, 32), Image.Resampling.BICUBIC)
    stored = upright.transpose(undone[orientation]) if orientation > 1 else upright
    path = tmp_path / "x"
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    path.write_bytes(encoded(stored, format, exif=exif, **options))
    difference = np.abs(values(path) - np.asarray(upright).astype(int))
    assert difference.mean() < (4 if format == "JPEG" else 1e-9)
    assert image_size(path) == (32, 48) and values(Image.open(path)).shape == (32, 48, 3)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame(format):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    x = values(encoded(frames[0], format, save_all=True, append_images=frames[1:])).astype(int)
    assert x.shape == (16, 16, 3) and np.abs(x - [255, 0, 0]).max() <= 3


def test_paths_bytes_and_pil_images(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = encoded(PHOTO, "WEBP", lossless=True)
    (tmp_path / "K\u00e4tzchen 1.jpg").write_bytes(data)  # WebP under another name
    for source in (data, Image.fromarray(PHOTO), tmp_path / "K\u00e4tzchen 1.jpg", "~/K\u00e4tzchen 1.jpg"):
        assert np.array_equal(values(source), PHOTO) and image_size(source) == (16, 24)


def test_metadata_of_any_size_or_none_that_is_whole():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "0123456789" * 300_000, zip=True)
    assert np.array_equal(values(encoded(PHOTO, pnginfo=info)), PHOTO)
    for exif in (b"Exif\0\0MM\0*\0\0", b"Exif\0\0" + bytes(range(200)), b"x"):
        assert np.array_equal(values(encoded(PHOTO, exif=exif)), PHOTO)
        assert image_size(encoded(PHOTO, "JPEG", exif=exif)) == (16, 24)


def test_only_the_middle():
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    assert (values(image, size=(10, 10), crop=True) == [0, 0, 255]).all()
    assert (values(image, size=(10, 10))[:, 0] == [255, 0, 0]).all()


# ---- one sentence


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    """A PNG with a header of any size and no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26 + 1)))
DAMAGED = {
    "empty.png": (b"", r"not a readable image \(it is empty\)"), 
    "text.png": (b"not an image", "its format is unknown"),
    "page.jpg": (b"<!DOCTYPE html>", "it is HTML"),
    "lfs.png": (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
    "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(20), "it is HEIC or a video"),
    "half.jpg": (encoded(PHOTO, "JPEG")[:-200], "truncated"), "half.png": (encoded(PHOTO)[:500], "not a readable image"),
    "crc.png": (encoded(PHOTO)[:60] + b"xxxx" + encoded(PHOTO)[64:], "not a readable image"),
    "huge.png": (png(20_000, 20_000), "more than 178 million pixels: reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS"),
    "none.png": (png(50, 50), "not a readable image"),
    "nan.tiff": (encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), "values that are NaN or infinite"),
    "figure.eps": (encoded(PHOTO, "EPS"), "EPS is a program"),
    "text-bomb.png": (encoded(PHOTO)[:33] + BOMB + encoded(PHOTO)[33:], "not a readable image"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_one_sentence_with_the_file(name, tmp_path):
    data, message = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^image = '[^\n]*{name}': [^\n]*{message}[^\n]*$"):
        load_image(tmp_path / name)
    with pytest.raises(ValueError, match=f"^reference = {len(data)} bytes: "):
        open_image(data, "reference")


@pytest.mark.parametrize("size", [64, (64,), (64, 64, 3), (32.5, 32), (0, 5), (-3, 5), "64"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=r"^size = .*: give \(height, width\), two positive integers$"):
        load_image(Image.new("RGB", (8, 8)), size)


def test_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"image = '.*absent.png': no such file \(seen from /.*\)"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="this is a folder: give an image file"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="'https://example.org/x.png': this is an address: download the file first"):
        load_image("https://example.org/x.png")
    for source in (None, 3, PHOTO):
        with pytest.raises(ValueError, match="give the path of an image file, its bytes or a PIL image"):
            load_image(source)
    with pytest.raises(ValueError, match="channels = 4"):
        load_image(Image.fromarray(PHOTO), channels=4)
    with pytest.raises(ValueError, match="image = a PIL image has 1 x 1 pixels: give at least 2 x 2"):
        load_image(Image.new("RGB", (1, 1)))


FILES = {format: encoded(PHOTO, format) for format in ("GIF", "BMP")}
FILES |= {format: encoded(PHOTO, format, exif=EXIF) for format in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF")}
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)  # (place, new byte)


@settings(FUZZ, max_examples=250)
@given(st.sampled_from(sorted(FILES)), st.floats(0, 1), CHANGES, st.booleans())
def test_damaged_files_load_or_are_one_sentence(monkeypatch, format, kept, changes, early):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**5)  # a damaged header may claim any size
    data = bytearray(FILES[format][: round(kept * len(FILES[format])) if kept < 0.9 else None])
    for place, value in changes if data else ():
        data[int(place * (min(len(data), 64) - 1 if early else len(data) - 1))] = value
    try:
        image = open_image(bytes(data))
    except ValueError as error:
        assert str(error).startswith(f"image = {len(data)} bytes: ") and "\n" not in str(error)
    else:
        assert image.mode in ("L", "LA", "RGB", "RGBA") and image.width * image.height <= 2 * 10**5


MODES = dict.fromkeys(("L", "LA", "RGB", "RGBA", "I;16"), "PNG") | dict.fromkeys(("1", "CMYK", "YCbCr", "I", "F", "I;16B"), "TIFF")
MODES |= dict.fromkeys(("P", "HSV", "RGBX", "RGBa", "La", "PA", "I;16L"))  # as PIL images only


@settings(FUZZ, max_examples=120)
@given(st.sampled_from(sorted(MODES)), st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.randoms(use_true_random=False))
def test_every_mode_and_size_is_an_image_upright(mode, h, w, orientation, random):
    image = Image.new(mode, (w, h))
    depth = len(image.tobytes())
    image.frombytes(bytes(depth) if mode == "F" else random.randbytes(depth))
    exif = Image.Exif()
    exif[0x0112] = orientation
    if MODES[mode]:
        image = encoded(image, MODES[mode], exif=exif)
        h, w = (w, h) if orientation >= 5 else (h, w)
    opened = open_image(image)
    assert opened.mode in ("L", "LA", "RGB", "RGBA") and opened.size == (w, h) == image_size(image)[::-1]
    if min(h, w) > 1:
        x = load_image(image)
        assert x.shape == (1, 3, h, w) and x.dtype == torch.float32 and x.abs().max() <= 1
    else:
        with pytest.raises(ValueError, match=f"{h} x {w} pixels: give at least 2 x 2"):
            load_image(image)
