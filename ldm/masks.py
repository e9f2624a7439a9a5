"""Masks: which pixels are known (1) and which are to be filled in (0), from whatever shows them.

A pixel that is only partly known is not known: soft edges, half-transparent pixels and grey values belong to the hole. Only where a
mask has exactly two values are these the hole and the known part whatever they are (0 and 1, 0 and 255, False and True, ...).

Soft masks (soft=True) keep the values between, as weights: how strongly a pixel is kept (`ldm.operators.Mask`).
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import InterpolationMode, resize

from ldm.images import Source, open_image, read_image, scaled, white

SIDES = ("left", "right", "top", "bottom")
SHAPES = (*SIDES, "centre", "strokes", "alpha")
KNOWN = 0.99  # a pixel is known where at least so much of it is known
KNOWN_LOSSY = 0.75  # in formats whose compression blurs black and white
LOSSY = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}


def make_mask(
    what: Any, size: Sequence[int], seed: int = 0, image_path: Source | None = None, invert: bool = False, soft: bool = False
) -> Tensor:
    """A mask [1, 1, H, W], 1 where known and 0 where to be filled in, float32, for images of size (H, W).

    what    "left", "right", "top" or "bottom": that half is missing
            "centre": a square of half the side length is missing
            "strokes": random brush strokes over a quarter of the image are missing, by `seed`
            (top, left, height, width), also as text: that rectangle is missing, in pixels
            "alpha": the part of the image at `image_path` that is not opaque is missing
            an image of the mask (a path, the bytes of a file, a PIL image or a NumPy array of any dtype): white (True) is missing,
            black (False) is kept. An alpha channel that varies is the mask, and colours do not count: what is transparent is
            missing; but of one colour painted on a transparent layer (most of its border is transparent) the paint is missing
            a tensor of any dtype, [H, W] or [B or 1, C, H, W]: a mask of this library, 1 (True, white) is known
    invert  exchanges the known and the missing part
    soft    grey values stay, as weights from 0 (missing) to 1 (known)

    A pixel is known where at least 99 % of it is: of 255, black is at most 2, and opaque at least 253. In JPEG, WebP and AVIF
    files, whose compression blurs black and white, black is at most a quarter of white. A mask of exactly two values has no grey:
    the smaller one is black. Integers up to 15 are labels: 0 is black, all others are white.

    A mask that is at most one pixel larger or smaller than the image loses or repeats its last row or column. Another one of the
    image's aspect ratio, to 1 % or one pixel, is resized, and a pixel is known where all that it covers is.

    ValueError for anything else, and where nothing or everything would be missing.
    """
    h, w = size
    what = _named_shape(what)
    halves = {"left": (0, 0, h, w // 2), "right": (0, w // 2, h, w - w // 2), "top": (0, 0, h // 2, w),
              "bottom": (h // 2, 0, h - h // 2, w), "centre": (h // 4, w // 4, h - h // 4 * 2, w - w // 4 * 2)}  # fmt: skip
    if isinstance(what, tuple):
        mask = _rectangle(what, h, w)
    elif isinstance(what, str) and what in halves:
        mask = _rectangle(halves[what], h, w)
    elif isinstance(what, str) and what == "strokes":
        mask = _strokes(h, w, seed)
    else:
        return check_mask(read_mask(what, size, image_path, invert, soft=soft))
    return check_mask(1 - mask if invert else mask)


def read_mask(
    what: Any, size: Sequence[int], image_path: Source | None = None, invert: bool = False, name: str = "mask", soft: bool = False
) -> Tensor:
    """As `make_mask`, for the kinds that are images, arrays and tensors; `name` is the argument that errors name. A mask without a
    hole and one that is all hole are returned as they are."""
    least, shown = KNOWN, f"{name} = {str(what)!r}" if isinstance(what, (str, os.PathLike)) else name
    if torch.is_tensor(what):
        known = _of_tensor(what, size, shown)
    elif isinstance(what, np.ndarray):
        known = 1 - _of_array(what, size, shown)
    elif isinstance(what, str) and what == "alpha":
        alpha = open_image(image_path)  # type: ignore[arg-type]  # None has an error of its own there
        if alpha.mode not in ("LA", "RGBA"):
            raise ValueError(f"{shown}, but the image has no transparent part: give a mask file")
        known = np.asarray(alpha.getchannel("A")) / 255.0
    else:
        image, format = _read(what, name)
        least = KNOWN_LOSSY if format in LOSSY else KNOWN
        if image.mode not in ("1", "L", "LA", "RGB", "RGBA", "I", "F") and image.mode[:2] != "I;" or "transparency" in image.info:
            image = open_image(what, name)
        known = 1 - _missing(np.atleast_3d(np.asarray(image)), white(image, format), shown)
    known = torch.as_tensor(known, dtype=torch.float32)
    known = known.reshape(-1, 1, *known.shape[-2:])
    known = 1 - known if invert else known
    mask = (known >= least).float()
    if soft:
        mask = torch.where((known < least) & (known > 1 - KNOWN), known, mask)
    return _to_size(mask, size, shown)


def check_mask(mask: Tensor) -> Tensor:
    """The mask itself, [B or 1, 1, H, W], if it leaves something to fill in and something known in every image; otherwise a
    ValueError. Of any dtype; booleans and integers come back as float32."""
    if mask.ndim != 4:
        raise ValueError(f"mask has shape {list(mask.shape)}: give [B, 1, H, W] or [1, 1, H, W]")
    mask = mask if mask.is_floating_point() else mask.float()
    known = mask.flatten(1)
    if (known == 1).all(1).any():
        raise ValueError("mask has no hole: nothing is to be filled in (0, in a file white, marks the hole; invert=True exchanges "
                         "the two)")  # fmt: skip
    if (known == 0).all(1).any():
        raise ValueError("mask is all hole: nothing is known (1, in a file black, marks what is kept); give invert=True if it is "
                         "meant the other way round, or sample without constraint")  # fmt: skip
    return mask


def latent_mask(mask: Tensor, downsampling: int) -> Tensor:
    """[B, 1, h, w]: a latent pixel is known where all of its downsampling x downsampling pixels are."""
    if mask.shape[2] % downsampling or mask.shape[3] % downsampling:
        raise ValueError(f"mask has the size {list(mask.shape[2:])}: give multiples of {downsampling} (`fit` makes them)")
    mask = mask if mask.is_floating_point() else mask.float()
    return 1 - F.max_pool2d(1 - mask, downsampling)


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask [B, 1, h, w] at another size (H, W), for an image that is resized too: a pixel is known where all pixels
    that are averaged for it are known. A soft mask (with values between 0 and 1) is averaged."""
    mean = resize(mask, list(size), InterpolationMode.BILINEAR, antialias=True)
    known = (mean > 0.999).to(mask)
    return known if ((mask == 0) | (mask == 1)).all() else torch.where(known > 0, known, mean * (mean > 0.001))


# ---- shapes


def _named_shape(what):
    """The name of a shape, or a rectangle as a tuple, however they are written; anything else as it is."""
    if isinstance(what, str):
        plain = what.strip().lower().replace("center", "centre")
        numbers = re.fullmatch(r"[(\[]?\s*" + r"[\s,;x]+".join([r"(-?\d+(?:\.\d*)?)"] * 4) + r"\s*[)\]]?", plain)
        return plain if plain in SHAPES else tuple(map(float, numbers.groups())) if numbers else what
    if isinstance(what, (np.ndarray, torch.Tensor)) and what.ndim == 1:
        return tuple(what.tolist())
    return tuple(what) if isinstance(what, (list, tuple)) else what


def _rectangle(what, h, w):
    try:
        top, left, height, width = (int(n) for n in what)
        fits = (top, left, height, width) == what and min(what) >= 0 and top + height <= h and left + width <= w
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        given = "(" + ", ".join(f"{n:g}" if isinstance(n, float) else str(n) for n in what) + ")"
        raise ValueError(f"mask = {given}: give (top, left, height, width) inside the image of {h} x {w} pixels")
    mask = torch.ones(1, 1, h, w)
    mask[..., top : top + height, left : left + width] = 0
    return mask


def _strokes(h, w, seed):
    """Brush strokes of a few bends each until a quarter of the image is missing."""
    rng, image = np.random.default_rng(seed), Image.new("L", (w, h), 255)
    draw, width = ImageDraw.Draw(image), max(round(0.09 * min(h, w)), 1)
    while np.mean(np.asarray(image) == 0) < 0.25:
        angle, points = rng.uniform(0, 2 * math.pi), [rng.uniform((0, 0), (w, h))]
        for _ in range(4):
            angle += rng.normal(scale=0.8)
            points.append(points[-1] + rng.uniform(0.1, 0.3) * min(h, w) * np.array([math.cos(angle), math.sin(angle)]))
        points = [tuple(p) for p in points]
        draw.line(points, fill=0, width=width, joint="curve")
        for x, y in points:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=0)
    return torch.from_numpy(np.array(image)).float()[None, None] / 255


# ---- images, arrays and tensors


def _read(what, name):
    if not isinstance(what, (str, os.PathLike, bytes, Image.Image)):
        raise ValueError(f"{name} is {type(what).__name__}: give an image file, an array, a tensor, a rectangle "
                         f"(top, left, height, width) or {', '.join(map(repr, SHAPES))}")  # fmt: skip
    try:
        return read_image(what, name)
    except ValueError as error:
        if "no such file" not in str(error):
            raise
        raise ValueError(
            f"{error}; otherwise give {', '.join(map(repr, SHAPES))} or a rectangle (top, left, height, width)"
        ) from None


def _missing(values, white, shown):
    """How much of each pixel is missing, [H, W] in 0 .. 1, of an image of a mask [H, W, 1 to 4]."""
    *colours, alpha = np.moveaxis(values, 2, 0) if values.shape[2] in (2, 4) else (*np.moveaxis(values, 2, 0), None)
    if alpha is not None:
        alpha = _share(alpha, white, shown, two=False)
        if alpha.min() < KNOWN and alpha.min() < alpha.max():
            alpha = _share(alpha, None, shown)
            painted = [_share(colour, white, shown, two=False)[alpha > alpha.max() / 2] for colour in colours]
            border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
            return alpha if max(map(np.ptp, painted)) < 0.05 and np.mean(border < 0.5) > 0.5 else 1 - alpha
    return _share(np.max(colours, axis=0), white, shown)


def _share(values, white, shown, two=True):
    """Numbers of any dtype as shares in 0 .. 1; where there are exactly two different ones, 0 and 1."""
    if not np.isfinite(values).all():
        raise ValueError(f"{shown} has values that are NaN or infinite: all must be finite")
    low, high = values.min(), values.max()
    if two and low < high and ((values == low) | (values == high)).all():
        return (values == high).astype(np.float64)
    if values.dtype.kind in "iu" and 1 < high < 16:
        return (values > 0).astype(np.float64)
    if low < 0:
        if low < -1 or high > 1:
            raise ValueError(f"{shown} has values from {low:g} to {high:g}: give values in 0 .. 1, -1 .. 1, 0 .. 255 or 0 .. 65535")
        values = (values + 1.0) / 2
    return scaled(values, white)


def _of_array(what, size, shown):
    """How much is missing, [B, H, W], of a NumPy array that shows a mask."""
    if what.ndim == 4:
        return np.concatenate([_of_array(one, size, shown) for one in what])
    values = _pixels(what, size, shown)
    return _missing(values, np.iinfo(values.dtype).max if values.dtype == np.uint8 else None, shown)[None]


def _of_tensor(what, size, shown):
    """How much is known, [B, H, W], of a tensor; in several channels: in the least known one."""
    values = what.detach().cpu()
    values = (values.float() if values.is_floating_point() else values).numpy()
    each = values if values.ndim == 4 else values[None]
    least = np.stack([_pixels(one, size, shown).min(2) for one in each])
    return _share(least, 255 if values.dtype == np.uint8 else None, shown)


def _pixels(values, size, shown):
    """An array [H, W], [H, W, C] or [C, H, W] as [H, W, C], C = 1 to 4: of two ways to read it the one nearer to `size`."""
    ways = [values[..., None]] if values.ndim == 2 else [values] if values.ndim == 3 else []
    ways += [np.moveaxis(values, 0, -1)] if values.ndim == 3 and len(values) != 2 else []
    ways = [way for way in ways if 1 <= way.shape[2] <= 4 and way.size]
    if not ways or values.dtype.kind not in "buif":
        raise ValueError(
            f"{shown} has shape {list(values.shape)} and dtype {values.dtype}: give numbers [H, W], [H, W, C] or [C, H, W]"
        )
    return min(ways, key=lambda way: abs(way.shape[0] - size[0]) + abs(way.shape[1] - size[1]))


def _to_size(mask, size, shown):
    """A mask [B, 1, h, w] of zeros and ones at the image's size (H, W)."""
    (h, w), (height, width) = mask.shape[2:], size
    if (h, w) == (height, width):
        return mask
    if abs(h - height) <= 1 and abs(w - width) <= 1:
        return F.pad(mask[..., :height, :width], (0, max(width - w, 0), 0, max(height - h, 0)), mode="replicate")
    if abs(h * width - w * height) > max(0.01 * w * height, height, width):
        raise ValueError(f"{shown} has {h} x {w} pixels, but the image has {height} x {width}: give one of the same aspect ratio")
    return 1 - F.adaptive_max_pool2d(1 - mask, (height, width))
