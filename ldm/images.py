"""Pictures in and out: the only place that knows how the pixel values 0 .. 255 map to the networks' [-1, 1]."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.util import atomic_write


def from_uint8(pixels):
    """uint8 tensor or array of any shape -> float32 tensor in [-1, 1]."""
    pixels = pixels if torch.is_tensor(pixels) else torch.from_numpy(np.array(pixels))
    return pixels.float() / 127.5 - 1


def to_uint8(x):
    """Tensor in [-1, 1] of any shape (values outside are clipped) -> uint8 tensor on the CPU, rounded to nearest."""
    return ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_image(path, size=None, channels=3, crop=False):
    """A picture file as a float32 tensor [1, channels, H, W] in [-1, 1].

    size: (H, W) to resize to (Lanczos), None keeps the file's; crop: only the middle of it, of size's aspect ratio. channels: 3 or
    1. Palette, greyscale and 16-bit files are converted, transparency is composited on white. ValueError where the file is missing,
    is not a picture or has a single row or column of pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels = {channels}: give 1 (grey) or 3 (RGB)")
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError) as error:
        reason = "no such file" if not Path(path).exists() else "not a readable picture"
        raise ValueError(f"image = {str(path)!r}: {reason}") from error
    if min(image.size) < 2:
        raise ValueError(f"image = {str(path)!r} has {image.height} x {image.width} pixels: give at least 2 x 2")
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: PIL would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / max(values.max(), 65535 if image.mode != "F" else 1) * 255).round().astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB" if channels == 3 else "L")
    if size is not None:
        fit = ImageOps.fit if crop else Image.Image.resize
        image = fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return from_uint8(np.asarray(image)).reshape(1, *image.size[::-1], channels).permute(0, 3, 1, 2).contiguous()


def check_image(x, name="image"):
    """x itself, if it is a finite float tensor [B, C, H, W] in [-1, 1] (to 1e-3); otherwise a ValueError says what it is."""
    if not torch.is_tensor(x) or not x.is_floating_point() or x.ndim != 4:
        given = f"{x.dtype} {list(x.shape)}" if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"{name} is {given}: give a float tensor [B, C, H, W] with values in [-1, 1]")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} has {int((~torch.isfinite(x)).sum())} values that are NaN or infinite: all must be finite")
    if x.numel() and x.abs().max() > 1.001:
        raise ValueError(f"{name} has values from {x.min():.3g} to {x.max():.3g}: they must lie in [-1, 1]")
    return x


def grid(images, columns=None, gap=2, background=1.0):
    """Images [B, C, H, W] in [-1, 1] side by side -> one image [C, H', W'], `gap` pixels of `background` between and around."""
    b, c, h, w = images.shape
    columns = columns or b
    rows = -(-b // columns)
    images = images.detach().float().cpu()
    sheet = torch.full((rows * columns, c, h + gap, w + gap), float(background))
    sheet[:b, :, gap:, gap:] = images
    sheet = sheet.reshape(rows, columns, c, h + gap, w + gap).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + gap), -1)
    return torch.nn.functional.pad(sheet, (0, gap, 0, gap), value=float(background))


def to_pil(image, scale=1):
    """One image [C, H, W] in [-1, 1], C = 1 or 3 -> PIL image, each pixel drawn as scale x scale."""
    array = to_uint8(image).permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_image(image, path, scale=1):
    """Write one image [C, H, W] in [-1, 1] to a file, whose folder is made if it is missing. Returns the path."""
    with atomic_write(path) as temporary:
        to_pil(image, scale).save(temporary)
    return Path(path)


def save_gif(frames, path, scale=1, seconds=0.12, hold=2.0):
    """Write an animation of frames [C, H, W] in [-1, 1] that loops; the last one stays for `hold` seconds. Returns the path.

    All frames share one palette of 256 colours, which halves the file.
    """
    pictures = [to_pil(frame, scale).convert("RGB") for frame in frames]
    palette = Image.fromarray(np.concatenate([np.asarray(picture)[::2, ::2] for picture in pictures])).quantize(256)
    first, *rest = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [round(1000 * seconds)] * len(rest) + [round(1000 * hold)]
    with atomic_write(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)
    return Path(path)
