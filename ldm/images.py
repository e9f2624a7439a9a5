"""Images in and out: the only place that opens image files, and that knows how pixel values 0 .. 255 map to [-1, 1]."""

import io
import operator
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ldm.util import atomic_write

Source: TypeAlias = str | os.PathLike | bytes | Image.Image  # of an image
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")  # of image files, in any case
SCALES = (1, 255, 65535)  # what white may be in 16-bit, 32-bit and float images
REMEDY = 'run the network and the autoencoder in float32 (dtype = "float32"), or take shorter steps'

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MiB: workflows in PNG files exceed Pillow's 1 MiB


# ---- files


def open_image(source: Source, name: str = "image") -> Image.Image:
    """An image upright, as a PIL image of mode "L", "LA", "RGB" or "RGBA".

    source  a path (~ is the home folder), the bytes of a file, or a PIL image
    name    the argument that error messages name

    The EXIF orientation is applied. Of animations and multi-page files it is the first frame. Palettes and CMYK become RGB. Images
    of 16 bits, 32 bits or floats are scaled: white is the type's largest value in 16 bits, otherwise the first of 1 (floats only),
    255, 65535 that no value exceeds, or the largest value. Everything that goes wrong is one ValueError that names the file: it is
    missing, damaged, no image, or has more pixels than Pillow allows.
    """
    image, format = read_image(source, name)
    with _named(source, name):
        return _eight_bits(image, format)


def read_image(source: Source, name: str = "image") -> tuple[Image.Image, str | None]:
    """(image, format): as `open_image`, but with the file's own mode and values; format is Pillow's name, such as "PNG"."""
    with _named(source, name), _opened(source) as image:
        image.load()
        return _upright(image), image.format


def image_size(source: Source, name: str = "image") -> tuple[int, int]:
    """(H, W) of an image upright, from the file's header alone where its format allows. ValueError as `open_image`."""
    with _named(source, name), _opened(source) as image:
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # of TIFF files Pillow gives the upright size
        return image.size if turned else image.size[::-1]


def load_image(path: Source, size: Sequence[int] | None = None, channels: int = 3, crop: bool = False) -> Tensor:
    """An image as a float32 tensor [1, channels, H, W] in [-1, 1].

    path      what `open_image` takes: a path, bytes or a PIL image
    size      (H, W) to resize to (Lanczos), None: the file's own
    channels  3 (RGB) or 1 (grey)
    crop      keep the aspect ratio: only the image's middle is resized to `size`; False: the whole image is

    Transparency is composited on white. ValueError as `open_image`, for another size, and for an image with a single row or column
    of pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels = {channels}: give 1 (grey) or 3 (RGB)")
    _check_size(size)
    image = open_image(path)
    if min(image.size) < 2:
        raise ValueError(f"image = {_shown(path)} has {image.height} x {image.width} pixels: give at least 2 x 2")
    image = on_white(image).convert("RGB" if channels == 3 else "L")
    if size is not None:
        fit = ImageOps.fit if crop else Image.Image.resize
        image = fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return from_uint8(np.asarray(image)).reshape(1, *image.size[::-1], channels).permute(0, 3, 1, 2).contiguous()


def _check_size(size):
    try:
        fits = size is None or len(size) == 2 and min(operator.index(n) for n in size) > 0
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"size = {size!r}: give (height, width), two positive integers")


def on_white(image: Image.Image) -> Image.Image:
    """A PIL image of mode "L", "LA", "RGB" or "RGBA" composited on white: mode "L" or "RGB"."""
    if image.mode in ("L", "RGB"):
        return image
    mode, image = image.mode.removesuffix("A"), image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)


@contextmanager
def _named(source, name):
    """Turns whatever a decoder raises inside into a ValueError of one sentence that names the file."""
    if not isinstance(source, (str, os.PathLike, bytes, Image.Image)):
        raise ValueError(f"{name} is {type(source).__name__}: give the path of an image file, its bytes or a PIL image")
    try:
        yield
    except FileNotFoundError:
        reason = "this is an address: download the file first" if "://" in str(source) else f"no such file (seen from {Path.cwd()})"
    except IsADirectoryError:
        reason = "this is a folder: give an image file"
    except PermissionError:
        reason = "the file may not be read: change its permissions"
    except Image.DecompressionBombError:
        reason = f"more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels: reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS"
    except MemoryError:
        reason = "not enough memory to decode it: reduce it"
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, RuntimeError ...
        why = " ".join(str(error).split()).rstrip(".") if not isinstance(error, Image.UnidentifiedImageError) else _contents(source)
        reason = f"not a readable image ({why or type(error).__name__}): save it again as PNG or JPEG"
    else:
        return
    raise ValueError(f"{name} = {_shown(source)}: {reason}")


@contextmanager
def _opened(source):
    """The PIL image of a source; what was opened here is closed again."""
    if isinstance(source, Image.Image):
        yield source
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels, of damaged EXIF: either it can be read or there is an error
        file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
        with Image.open(file) as image:
            if image.format == "EPS":  # Pillow would run Ghostscript
                raise ValueError("EPS is a program, not an image")
            yield image


def _shown(source):
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return "a PIL image" if isinstance(source, Image.Image) else repr(str(source))


def _contents(source):
    """What a file is that no decoder knows, by its first bytes."""
    start = source[:64] if isinstance(source, bytes) else Path(source).expanduser().open("rb").read(64)
    if not start or start[4:8] == b"ftyp":
        return "it is HEIC or a video" if start else "it is empty"
    kinds = {b"version https://git-lfs": "it is a Git LFS pointer: git lfs pull fetches the file", b"<": "it is HTML, XML or SVG",
             b"%PDF": "it is a PDF"}  # fmt: skip
    return next((kind for magic, kind in kinds.items() if start.startswith(magic)), "its format is unknown")


def _orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data in a good image
        return 1


def _upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above
        return image.copy()


def _eight_bits(image, format):
    """A PIL image of any mode as "L", "LA", "RGB" or "RGBA"."""
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip, not scale
        values = scaled(np.asarray(image), white(image, format))
        return Image.fromarray((values * 255).round().astype(np.uint8))
    image = image.convert("LA") if image.mode == "La" else image
    if "transparency" in image.info or image.mode in ("PA", "RGBa"):
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")


def white(image: Image.Image, format: str | None) -> int | None:
    """The value of white in a PIL image's own mode where it is known, otherwise None: see `scaled`."""
    return 65535 if image.mode.startswith("I;16") or (image.mode, format) == ("I", "PPM") else None


def scaled(values: np.ndarray, white: float | None = None) -> np.ndarray:
    """Numbers of any dtype and shape -> float64 in 0 .. 1, divided by `white`; negative ones become 0.

    white=None: booleans and floats up to 1 stay; otherwise the first of 255 and 65535 that no value exceeds, or the largest value.
    ValueError where a value is NaN or infinite.
    """
    whole = np.issubdtype(values.dtype, np.integer)
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are NaN or infinite")
    most = values.max(initial=0)
    if white is None:
        white = next((white for white in SCALES[whole:] if most <= white), most)
    return (values / white).clip(0, 1)


# ---- tensors


def from_uint8(pixels: Tensor | np.ndarray) -> Tensor:
    """uint8 tensor or array of any shape -> float32 tensor in [-1, 1]."""
    pixels = pixels if torch.is_tensor(pixels) else torch.from_numpy(np.array(pixels))
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor, stage: str = "the image") -> Tensor:
    """Tensor in [-1, 1] of any shape (values outside are clipped) -> uint8 tensor on the CPU, rounded to nearest.

    FloatingPointError, which names `stage`, where a value is NaN or infinite.
    """
    check_finite(x, stage)
    return ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_image(x: Tensor, name: str = "image") -> Tensor:
    """x itself, if it is a finite float tensor [B, C, H, W] in [-1, 1] (to 1e-3); otherwise a ValueError says what it is."""
    if not torch.is_tensor(x) or not x.is_floating_point() or x.ndim != 4:
        given = f"{x.dtype} {list(x.shape)}" if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"{name} is {given}: give a float tensor [B, C, H, W] with values in [-1, 1]")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} has {int((~torch.isfinite(x)).sum())} values that are NaN or infinite: all must be finite")
    if x.numel() and x.abs().max() > 1.001:
        raise ValueError(f"{name} has values from {x.min():.3g} to {x.max():.3g}: they must lie in [-1, 1]")
    return x


def check_finite(x: Tensor, stage: str) -> Tensor:
    """x itself; FloatingPointError, which names the stage of the computation, if a value of it is NaN or infinite."""
    if not isinstance(x, FakeTensor) and not torch.isfinite(x).all():  # ldm/memory.py: a tensor without values
        bad = int((~torch.isfinite(x)).sum())
        raise FloatingPointError(f"{stage} has {bad} of {x.numel()} values that are NaN or infinite: {REMEDY}")
    return x


def grid(images: Tensor, columns: int | None = None, gap: int = 2, background: float = 1.0) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] side by side -> one image [C, H', W'], `gap` pixels of `background` between and around."""
    b, c, h, w = images.shape
    columns = columns or b
    rows = -(-b // columns)
    images = images.detach().float().cpu()
    sheet = torch.full((rows * columns, c, h + gap, w + gap), float(background))
    sheet[:b, :, gap:, gap:] = images
    sheet = sheet.reshape(rows, columns, c, h + gap, w + gap).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + gap), -1)
    return torch.nn.functional.pad(sheet, (0, gap, 0, gap), value=float(background))


def to_pil(image: Tensor, scale: int = 1, stage: str = "the image") -> Image.Image:
    """One image [C, H, W] in [-1, 1], C = 1 or 3 -> PIL image, each pixel drawn as scale x scale. Errors as `to_uint8`."""
    if image.ndim != 3 or len(image) not in (1, 3):
        raise ValueError(f"{stage} has the shape {list(image.shape)}: give [C, H, W] with C = 1 or 3")
    array = to_uint8(image, stage).permute(1, 2, 0).numpy()
    pil = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    return pil.resize((pil.width * scale, pil.height * scale), Image.Resampling.NEAREST)


def save_image(image: Tensor, path: str | os.PathLike, scale: int = 1) -> Path:
    """Write one image [C, H, W] in [-1, 1] to a file, whose folder is made if it is missing. Returns the path."""
    with atomic_write(path) as temporary:
        to_pil(image, scale).save(temporary)
    return Path(path)


def save_gif(frames: Iterable[Tensor], path: str | os.PathLike, scale: int = 1, seconds: float = 0.12, hold: float = 2.0) -> Path:
    """Write an animation of frames [C, H, W] in [-1, 1] that loops; the last one stays for `hold` seconds. Returns the path.

    All frames share one palette of 256 colours, which halves the file.
    """
    images = [to_pil(frame, scale).convert("RGB") for frame in frames]
    palette = Image.fromarray(np.concatenate([np.asarray(image)[::2, ::2] for image in images])).quantize(256)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [round(1000 * seconds)] * len(rest) + [round(1000 * hold)]
    with atomic_write(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)
    return Path(path)
