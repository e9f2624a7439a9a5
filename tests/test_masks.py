"""Masks of whatever people bring: the right pixels for every kind, and one sentence for what is none."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from ldm.images import load_image
from ldm.inpainting import check_mask, latent_mask, make_mask

HOLE = np.zeros((32, 48), bool)  # a quarter of the image
HOLE[8:24, 8:32] = True
KNOWN = torch.from_numpy(~HOLE).float()[None, None]
NOISE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def layer(colour, alpha):
    """RGBA [H, W, 4] of a colour or an image, and alpha."""
    return np.concatenate([np.broadcast_to(np.uint8(colour), (32, 48, 3)), np.uint8(alpha)[..., None]], 2)


@pytest.mark.parametrize("what", ["left", "right", "top", "bottom", "centre", "strokes", (3, 4, 5, 6)])
def test_masks(what):
    mask = make_mask(what, (32, 48), seed=3)
    assert mask.shape == (1, 1, 32, 48) and set(mask.unique().tolist()) == {0, 1}
    known = mask.mean().item()
    share = {"centre": 0.75, "strokes": 0.75, (3, 4, 5, 6): 1 - 30 / (32 * 48)}.get(what, 0.5)
    assert abs(known - share) < (0.1 if what == "strokes" else 1e-6)
    if what == "strokes":
        assert torch.equal(mask, make_mask(what, (32, 48), seed=3)) and not torch.equal(mask, make_mask(what, (32, 48), seed=4))


def test_a_latent_pixel_is_known_where_all_of_its_pixels_are():
    mask = torch.ones(1, 1, 16, 16)
    mask[..., 5, 5] = 0
    small = latent_mask(mask, 4)
    assert small.sum() == 15 and small[0, 0, 1, 1] == 0
    with pytest.raises(ValueError, match=r"mask has the size \[16, 16\]: give multiples of 5"):
        latent_mask(mask, 5)


def voc():
    image = Image.fromarray(HOLE.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def transparent_gif():
    image = Image.fromarray(HOLE.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 9, 9, 9])
    return encoded(image, "GIF", transparency=1)


def on_its_side():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(HOLE).transpose(Image.Transpose.ROTATE_90), exif=exif)


GREY16 = np.where(HOLE, 65535, np.random.default_rng(1).integers(0, 601, HOLE.shape)).astype(np.uint16)
FILES = {
    "black and white": encoded(HOLE * np.uint8(255)), "1 bit": encoded(HOLE), "a PIL image": Image.fromarray(HOLE),
    "labels 0 and 1": encoded(HOLE.astype(np.uint8)), "labels 0 and 1 of 16 bits": encoded(HOLE.astype(np.uint16)),
    "labels 0 to 3": encoded(HOLE * np.uint8(1 + NOISE[..., 0] % 3)), "labels 1 and 2": encoded(HOLE + np.uint8(1)),
    "16 bits": encoded(GREY16), "16 bits, TIFF": encoded(GREY16, "TIFF"), "16 bits, dark": encoded(HOLE * np.uint16(1000)),
    "floats": encoded(HOLE.astype(np.float32), "TIFF"), "floats to 255": encoded(HOLE * np.float32(255), "TIFF"),
    "32 bits": encoded(HOLE * np.int32(10**6), "TIFF"), "video range": encoded(np.where(HOLE, 235, 16).astype(np.uint8)),
    "palette of labels": encoded(voc()), "palette with a transparent colour": transparent_gif(),
    "blue on black": encoded(HOLE[..., None] * np.uint8([0, 0, 255])), "turned by EXIF": on_its_side(),
    "CMYK": encoded(Image.fromarray(HOLE).convert("CMYK"), "TIFF"), "JPEG": encoded(HOLE * np.uint8(255), "JPEG", quality=60),
    "WebP": encoded(HOLE * np.uint8(255), "WEBP", quality=60), "AVIF": encoded(HOLE * np.uint8(255), "AVIF", quality=60),
    "photo with a transparent hole": encoded(layer(NOISE, ~HOLE * 255)),
    "black with a transparent hole": encoded(layer(0, ~HOLE * 255)), "white with one": encoded(layer(255, ~HOLE * 255)),
    "half-transparent hole": encoded(layer(NOISE, 255 - HOLE * 99)), "grey with alpha": encoded(layer(0, HOLE * 255)[..., 2:]),
    "black strokes on a transparent layer": encoded(layer(0, HOLE * 255)), "white ones": encoded(layer(255, HOLE * 255)),
    "red ones, half-transparent": encoded(layer([255, 0, 0], HOLE * 128)), "WebP ones": encoded(layer(255, HOLE * 255), "WEBP"),
    "opaque": encoded(layer(HOLE[..., None] * 255, np.full(HOLE.shape, 255))),
    "transparent everywhere": encoded(layer(HOLE[..., None] * 255, np.zeros(HOLE.shape))),
    "half-transparent everywhere": encoded(layer(HOLE[..., None] * 255, np.full(HOLE.shape, 128))),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_has_its_hole(kind, tmp_path):
    assert torch.equal(make_mask(FILES[kind], (32, 48)), KNOWN)
    if isinstance(FILES[kind], bytes):
        (tmp_path / "mask").write_bytes(FILES[kind])
        assert torch.equal(make_mask(tmp_path / "mask", (32, 48), invert=True), 1 - KNOWN)


ARRAYS = {"bool": HOLE, "0 and 1": HOLE.astype(np.uint8), "0 and 255": HOLE * np.uint8(255), "int64": HOLE * 255, "16 bits": GREY16,
          "floats": HOLE * 1.0, "half": HOLE.astype(np.float16), "floats from -1": HOLE * 2.0 - 1, "floats to 255": HOLE * 255.0,
          "grey to 1": HOLE * NOISE[..., 0].clip(9) / 255, "grey from -1": HOLE * NOISE[..., 0].clip(9) / 127.5 - 1}  # fmt: skip
SHAPES = {"[H, W]": lambda x: x, "[H, W, 1]": lambda x: x[..., None], "[H, W, 3]": lambda x: np.stack([x] * 3, 2),
          "[1, H, W]": lambda x: x[None], "[3, H, W]": lambda x: np.stack([x] * 3), "[1, 1, H, W]": lambda x: x[None, None],
          "[1, H, W, 1]": lambda x: x[None, ..., None]}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_show_the_hole_and_tensors_the_known_part(kind, shape):
    array = SHAPES[shape](ARRAYS[kind])
    assert torch.equal(make_mask(array, (32, 48)), KNOWN)
    if "grey" not in kind and array.dtype != np.uint16:
        assert torch.equal(make_mask(array, (32, 48), invert=True), 1 - KNOWN)
        known = torch.from_numpy(SHAPES[shape](ARRAYS[kind].max() - ARRAYS[kind] if kind != "bool" else ~HOLE))
        assert torch.equal(make_mask(known, (32, 48)), KNOWN)


def test_a_mask_of_this_library_stays_as_it_is():
    several = torch.cat([make_mask(what, (16, 24)) for what in ("left", "centre", "strokes")])
    assert torch.equal(make_mask(several, (16, 24)), several) and torch.equal(make_mask(several[:1] > 0, (16, 24)), several[:1])


def test_what_is_only_partly_known_is_not_known():
    """Grey values, soft edges and half-transparent pixels, in files, arrays and tensors."""
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    dark = torch.from_numpy(ramp <= 2).float()[None, None]
    bright = torch.from_numpy(ramp >= 253).float()[None, None]
    for soft in (encoded(ramp), Image.fromarray(ramp), ramp, ramp / 255, encoded(ramp.astype(np.uint16) * 257)):
        assert torch.equal(make_mask(soft, (8, 32)), dark) and torch.equal(make_mask(soft, (8, 32), invert=True), bright)
    assert torch.equal(make_mask(torch.from_numpy(ramp), (8, 32)), bright)
    photo = encoded(np.concatenate([NOISE[:8, :32], ramp[..., None]], 2))
    assert torch.equal(make_mask(photo, (8, 32)), bright) and torch.equal(make_mask("alpha", (8, 32), image_path=photo), bright)
    blurred = Image.fromarray(HOLE * np.uint8(255)).filter(ImageFilter.GaussianBlur(2))
    assert torch.equal(make_mask(encoded(layer(0, np.asarray(blurred))), (32, 48)), make_mask(blurred, (32, 48)))
    assert make_mask(blurred, (32, 48)).sum() < KNOWN.sum()
    lossy = make_mask(encoded(ramp.repeat(8, 0).repeat(8, 1), "JPEG", quality=95), (64, 256))
    assert abs(lossy.mean() - 0.25) < 0.02


def test_image_and_mask_of_one_file_never_disagree(tmp_path):
    """A photo on its side with a transparent corner: the image and its alpha are turned alike."""
    exif = Image.Exif()
    rgba = layer(NOISE, 255 - 255 * (np.arange(48) < 9) * (np.arange(32)[:, None] < 5))
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        Image.fromarray(rgba).save(tmp_path / "photo.png", exif=exif)
        image = load_image(tmp_path / "photo.png")
        mask = make_mask("alpha", image.shape[2:], image_path=tmp_path / "photo.png")
        assert torch.equal(mask, make_mask(tmp_path / "photo.png", image.shape[2:]))
        assert mask.mean() == 1 - 45 / (32 * 48) and (image.mean(1, keepdim=True)[mask == 0] == 1).all()


@pytest.mark.parametrize("size", [(33, 48), (32, 49), (33, 49), (31, 48), (31, 49)])
def test_one_pixel_more_or_less(size):
    """The last row or column is dropped or repeated; nothing is resampled."""
    padded = np.pad(HOLE, ((0, 1), (0, 1)))[: size[0], : size[1]]
    assert torch.equal(make_mask(padded, (32, 48)), KNOWN)
    right = np.zeros(size, bool)
    right[:, 40:] = True
    assert torch.equal(make_mask(right, (32, 48))[0, 0], (torch.arange(48) < 40).float().expand(32, 48))


def test_other_sizes_of_the_same_shape():
    assert torch.equal(make_mask(HOLE.repeat(2, 0).repeat(2, 1), (32, 48)), KNOWN)
    larger = torch.ones(1, 1, 48, 72)
    larger[..., 12:36, 12:48] = 0
    assert torch.equal(make_mask(HOLE, (48, 72)), larger)
    point = np.zeros((32, 48), bool)
    point[7, 11] = True  # a pixel that covers a part of the hole is not known
    assert (make_mask(point, (12, 18)) == 0).nonzero().tolist() == [[0, 0, 2, 4]] and make_mask(point, (20, 30)).sum() == 598
    assert make_mask(np.pad(HOLE, ((0, 1), (0, 0))), (64, 96)).shape == (1, 1, 64, 96)


@pytest.mark.parametrize("text, meant", [
    ("(8, 8, 16, 24)", (8, 8, 16, 24)), ("8,8,16,24", (8, 8, 16, 24)), ("[8 8 16 24]", (8, 8, 16, 24)),
    ([8.0, 8, 16, 24], (8, 8, 16, 24)),
    (np.array([8, 8, 16, 24]), (8, 8, 16, 24)), (" Left", "left"), ("center", "centre"), ("STROKES", "strokes"),
])  # fmt: skip
def test_shapes_in_other_words(text, meant):
    assert torch.equal(make_mask(text, (32, 48)), make_mask(meant, (32, 48)))
    assert torch.equal(make_mask(text, (32, 48), invert=True), 1 - make_mask(meant, (32, 48)))


def test_wrong_masks_are_one_sentence_each(tmp_path):
    Image.new("L", (40, 20)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no image")
    nan = np.full((32, 32), np.nan)
    Image.fromarray(nan.astype(np.float32)).save(tmp_path / "nan.tiff")
    rectangle = r"give \(top, left, height, width\) inside the image of 32 x 32 pixels"
    for what, message in [
        ("middle", "mask = 'middle': no such file .*; otherwise give 'left', .* or a rectangle"),
        (tmp_path / "text.png", "mask = '.*text.png': not a readable image"),
        (tmp_path / "nan.tiff", "mask = '.*nan.tiff' has values that"),
        (tmp_path / "wide.png", "mask = '.*wide.png' has 20 x 40 pixels, but the image has 32 x 32: give one of the same aspect"),
        (encoded(np.zeros((20, 20), np.uint8)), "mask has no hole: .*invert=True"), (np.zeros((32, 32), bool), "mask has no hole"),
        (encoded(np.full((20, 20), 255, np.uint8)), "mask is all hole: .*; give invert=True if it is meant the other way round"),
        ((30, 0, 5, 5), rectangle), ((0, 0, 5), rectangle), ((0.5, 0, 5, 5), rectangle), ("(-1, 0, 5, 5)", rectangle),
        (("a", 0, 5, 5), rectangle), ((0, 0, float("inf"), 5), rectangle), ((0, 0, 0, 0), "mask has no hole"),
        ((0, 0, 32, 32), "mask is all hole"), (nan, "mask has values that are NaN or infinite"),
        (None, "mask is NoneType: give an image"),
        (np.linspace(-300, 300, 1024).reshape(32, 32), "mask has values from -300 to 300: give values in 0 .. 1, -1 .. 1"),
        (np.zeros((5, 32, 32, 7)), r"mask has shape \[32, 32, 7\] and dtype float64: give numbers \[H, W\]"),
        (np.full((32, 32), "x"), "give numbers"), (torch.zeros(0, 4), "give numbers"), (3, "mask is int: give an image file"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make_mask(what, (32, 32))
    with pytest.raises(ValueError, match="image is NoneType: give the path of an image file"):
        make_mask("alpha", (32, 32))
    with pytest.raises(ValueError, match="mask = 'alpha', but the image has no transparent part: give a mask file"):
        make_mask("alpha", (32, 32), image_path=encoded(NOISE))
    with pytest.raises(ValueError, match="all hole"):
        check_mask(torch.stack([torch.ones(1, 4, 4).tril(), torch.zeros(1, 4, 4)]))
    with pytest.raises(ValueError, match=r"mask has shape \[4, 4\]: give \[B, 1, H, W\]"):
        check_mask(torch.ones(4, 4))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from("?BbHhiqefd"), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(),
       st.booleans(), st.integers(0, 2**32))  # fmt: skip
def test_any_array_is_a_mask_or_one_sentence(dtype, channels, h, w, first, tensor, invert, seed):
    rng = np.random.default_rng(seed)
    shape = (h, w) if channels == 0 else (channels, h, w) if first else (h, w, channels)
    with np.errstate(over="ignore"):
        values = (rng.random(shape) * rng.choice([1, 2, 256, 70_000]) - rng.choice([0, 0, 0, 1])).astype(dtype)
    values = torch.from_numpy(values) if tensor and dtype != "H" else values
    try:
        mask = make_mask(values, (8, 6), invert=invert)
    except ValueError as error:
        assert str(error).startswith("mask ") and "\n" not in str(error)
    else:
        assert mask.shape == (1, 1, 8, 6) and mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0, 1}
