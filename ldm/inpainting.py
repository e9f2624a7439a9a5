"""What inpainting needs besides the sampler: masks, canvases, and the seam between known and generated pixels.

Images are [B, C, H, W] float32 in [-1, 1]. Masks are [B or 1, 1, H, W] float32 of 1 (known, kept) and 0 (to be filled in). In mask
*files* it is as everywhere else: white is to be filled in, black is kept; and of a transparent picture, what is transparent.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch.nn import functional as F
from torchvision.transforms.functional import InterpolationMode, resize

SIDES = ("left", "right", "top", "bottom")


# ---- masks


def make_mask(what, size, seed=0, image_path=None):
    """A mask [1, 1, H, W] for pictures of size (H, W).

    what: "left", "right", "top" or "bottom": that half is missing;
          "centre": a square of half the side length; "strokes": random brush strokes over a quarter of the picture, by `seed`;
          (top, left, height, width): that rectangle, in pixels;
          "alpha": the transparent part of the picture at image_path;
          otherwise the path of a picture whose white part is missing.
    ValueError for anything else, for a file of another aspect ratio, and where nothing or everything would be missing.
    """
    h, w = size
    mask = torch.ones(1, 1, h, w)
    if isinstance(what, (tuple, list)):
        if len(what) != 4 or min(what) < 0 or what[0] + what[2] > h or what[1] + what[3] > w:
            raise ValueError(f"mask = {what}: give (top, left, height, width) inside the picture of {h} x {w} pixels")
        top, left, height, width = what
        mask[..., top : top + height, left : left + width] = 0
    elif what in SIDES:
        part = {"left": (..., slice(w // 2)), "right": (..., slice(w // 2, None)), "top": (..., slice(h // 2), slice(None)),
                "bottom": (..., slice(h // 2, None), slice(None))}[what]  # fmt: skip
        mask[part] = 0
    elif what == "centre":
        mask[..., h // 4 : h - h // 4, w // 4 : w - w // 4] = 0
    elif what == "strokes":
        mask = _strokes(h, w, seed)
    elif what == "alpha":
        alpha = _open("image", image_path).convert("RGBA").getchannel("A")
        mask = _known(255 - torch.from_numpy(np.array(alpha)).float(), image_path, size)
    else:
        mask = _known(torch.from_numpy(np.array(_open("mask", what).convert("L"))).float(), what, size)
    return check_mask(mask)


def check_mask(mask):
    """The mask itself if it leaves something to fill in and something known in every picture; otherwise a ValueError."""
    known = mask.flatten(1).mean(1)
    if (known == 1).any():
        raise ValueError("mask has no hole: nothing is to be filled in (0, in a file white, marks the hole)")
    if (known == 0).any():
        raise ValueError("mask is all hole: nothing is known (1, in a file black, marks what is kept); sample without constraint")
    return mask


def latent_mask(mask, downsampling):
    """[B, 1, h, w]: a latent pixel is known where all of its downsampling x downsampling pixels are."""
    if mask.shape[2] % downsampling or mask.shape[3] % downsampling:
        raise ValueError(f"mask has the size {list(mask.shape[2:])}: give multiples of {downsampling} (`fit` makes them)")
    return 1 - F.max_pool2d(1 - mask, downsampling)


# ---- canvases


def fit(image, mask, short_side, multiple):
    """Image and mask at a size that a model takes: the shorter side becomes short_side pixels, then unknown pixels are added at
    the right and at the bottom up to multiples of `multiple`. Returns image, mask and (H, W), the part that is the picture."""
    h, w = image.shape[2:]
    if min(h, w) < 2:
        raise ValueError(f"image has {h} x {w} pixels: give at least 2 x 2")
    if short_side % multiple:
        raise ValueError(f"short_side = {short_side}: give a multiple of {multiple}")
    size = [max(round(n * short_side / min(h, w)), short_side) for n in (h, w)]
    if tuple(size) != (h, w):
        image = resize(image, size, InterpolationMode.BICUBIC, antialias=True).clamp(-1, 1)
        mask = (resize(mask, size, InterpolationMode.BILINEAR, antialias=True) > 0.999).to(mask)  # known: wholly known
    pad = [0, -size[1] % multiple, 0, -size[0] % multiple]
    return F.pad(image, pad), F.pad(mask.expand(-1, 1, *size), pad), tuple(size)


def outpaint(image, left=0, right=0, top=0, bottom=0):
    """The picture on a larger canvas: (image, mask) with so many unknown pixels more on each side."""
    pad = (left, right, top, bottom)
    if any(n < 0 or int(n) != n for n in pad) or not any(pad):
        raise ValueError(f"left, right, top, bottom = {pad}: give numbers of pixels >= 0, not all 0")
    return F.pad(image, pad), F.pad(torch.ones_like(image[:1, :1]), pad)


def join(first, second, known=1 / 3):
    """Two pictures to be joined: (image, mask) with the left `known` of the first, the right `known` of the second, and
    nothing in between."""
    if first.shape != second.shape:
        raise ValueError(f"second has shape {list(second.shape)}, but first has {list(first.shape)}: give two of one size")
    if not 0 < known < 0.5:
        raise ValueError(f"known = {known}: give a fraction of the width between 0 and 0.5")
    n = max(round(known * first.shape[3]), 1)
    mask = torch.zeros_like(first[:1, :1])
    mask[..., :n] = mask[..., -n:] = 1
    image = torch.zeros_like(first)
    image[..., :n], image[..., -n:] = first[..., :n], second[..., -n:]
    return image, mask


# ---- seams


def harmonic_fill(values, mask, tolerance=1e-4, most=2000):
    """The known values [B, C, H, W], and in the hole the smoothest continuation of them: the solution of Laplace's equation,
    which every hole pixel fulfils as the mean of its neighbours. Known values stay as they are; without any, zeros.

    By conjugate gradients on all pictures at once, until no residual exceeds `tolerance`, at most `most` iterations.
    """
    mask = mask.to(values).expand(len(values), 1, *values.shape[2:])
    hole = 1 - mask
    ones = F.pad(torch.ones_like(hole), (1, 1, 1, 1))
    neighbours = ones[..., 1:-1, 2:] + ones[..., 1:-1, :-2] + ones[..., 2:, 1:-1] + ones[..., :-2, 1:-1]

    def laplace(u):  # on the hole, with natural boundaries at the picture's edge
        p = F.pad(u, (1, 1, 1, 1))
        return hole * (neighbours * u - p[..., 1:-1, 2:] - p[..., 1:-1, :-2] - p[..., 2:, 1:-1] - p[..., :-2, 1:-1])

    def dot(a, b):
        return (a * b).flatten(2).sum(2)[..., None, None]

    start = _push_pull(values, mask)
    u = torch.where(mask > 0, values, start)
    r = -laplace(u)
    p, rr = r, dot(r, r)
    for i in range(most):
        if i % 20 == 0 and r.abs().max() <= tolerance:
            break
        q = laplace(p)
        step = rr / dot(p, q).clamp_min(1e-30)
        u, r = u + step * p, r - step * q
        before, rr = rr, dot(r, r)
        p = r + rr / before.clamp_min(1e-30) * p
    return torch.where(mask > 0, values, u)


def blend(sampled, image, mask, feather=0, poisson=False):
    """The final picture: the known pixels of the image, the sampled ones in the hole.

    feather  known pixels nearer to the hole than so many pixels are mixed with the sampled ones; 0: all are kept, bit-equal
    poisson  the sampled pixels are shifted by the smoothest field that takes the step out of the seam (Perez et al. 2003); the
             known ones are kept bit-equal, so that nothing is left to feather
    """
    if feather < 0 or int(feather) != feather:
        raise ValueError(f"feather = {feather}: give a number of pixels >= 0")
    mask = mask.to(image)
    if poisson:
        sampled = (sampled + harmonic_fill((image - sampled) * mask, mask)).clamp(-1, 1)
    if not feather:
        return torch.where(mask > 0, image, sampled)
    near = F.avg_pool2d(F.pad(mask, [feather] * 4, mode="replicate"), 2 * feather + 1, stride=1)
    weight = mask * (2 * near - 1).clamp(0, 1)  # 0 beside a straight border, 1 at the distance `feather`
    return torch.where(weight == 1, image, sampled + weight * (image - sampled))


def reencode(model, z, image, mask):
    """Latents of the whole picture, Enc(M image + (1 - M) Dec(z)): at last the encoder sees what is in the hole, where the known
    latents of the constraint came from a smooth continuation. Dec of them has the known region as well as the autoencoder can.

    z [B, C, h, w] of a LatentDiffusion `model` -> the same shape. One evaluation of the decoder and one of the encoder.
    """
    return model.encode(blend(model.decode(z).clamp(-1, 1), image, mask, poisson=True))


def _push_pull(values, mask):
    """A first guess in the hole: means of the known pixels around it, taken from ever coarser pictures."""
    if min(values.shape[2:]) < 2:
        return (values * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp_min(1) * torch.ones_like(values)
    pool = lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)  # noqa: E731
    weight = pool(mask)
    coarse = pool(values * mask) / torch.where(weight > 0, weight, 1.0)
    known = (weight > 0).to(values)
    coarse = torch.where(known > 0, coarse, _push_pull(coarse, known))
    return F.interpolate(coarse, size=values.shape[2:], mode="bilinear", align_corners=False)


def _strokes(h, w, seed):
    """Brush strokes of a few bends each until a quarter of the picture is missing."""
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


def _known(brightness, path, size):
    """Of a mask file's brightness [H, W], 0 .. 255, the mask [1, 1, *size]: 1 where it is black, or the size is not its own."""
    mask, (h, w) = (brightness < 128).float()[None, None], size
    if abs(mask.shape[3] / mask.shape[2] - w / h) > 0.01 * w / h:
        raise ValueError(
            f"mask = {str(path)!r} has {mask.shape[2]} x {mask.shape[3]} pixels, but the image has {h} x {w}: give "
            "one of the same aspect ratio"
        )
    if mask.shape[2:] == (h, w):
        return mask
    return (resize(mask, [h, w], InterpolationMode.BILINEAR, antialias=True) > 0.999).float()


def _open(name, path):
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError, AttributeError) as error:
        reason = "no such file" if not Path(str(path)).exists() else "not a readable picture"
        if name == "mask":
            reason += f'; otherwise give {", ".join(map(repr, SIDES))}, "centre", "strokes", "alpha" or a rectangle'
        raise ValueError(f"{name} = {str(path)!r}: {reason}") from error
    return image
