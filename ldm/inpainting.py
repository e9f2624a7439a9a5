"""What inpainting needs apart from the sampler and the masks: canvases, and the seam between known and generated pixels.

Images are [B, C, H, W] float32 in [-1, 1]. Masks are [B or 1, 1, H, W] of 1 (known, kept) and 0 (to be filled in): ldm/masks.py.
Of soft masks, only what has the weight 1 is put back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import InterpolationMode, resize

from ldm.images import check_finite
from ldm.masks import check_mask, latent_mask, make_mask, resize_mask

__all__ = ["Part", "blend", "check_mask", "fill_photo", "fit", "harmonic_fill", "join", "latent_mask", "make_mask", "outpaint",
           "parts_around", "reencode", "seam_step"]  # fmt: skip


# ---- canvases


def fit(image: Tensor, mask: Tensor, short_side: int, multiple: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Image and mask at a size that a model takes: the shorter side becomes short_side pixels, then unknown pixels are added at
    the right and at the bottom up to multiples of `multiple`. Returns image, mask and (H, W), the part that is the image."""
    h, w = image.shape[2:]
    if min(h, w) < 2:
        raise ValueError(f"image has {h} x {w} pixels: give at least 2 x 2")
    if short_side % multiple:
        raise ValueError(f"short_side = {short_side}: give a multiple of {multiple}")
    mask = mask.to(image)
    size = (max(round(h * short_side / min(h, w)), short_side), max(round(w * short_side / min(h, w)), short_side))
    if size != (h, w):
        image = resize(image, list(size), InterpolationMode.BICUBIC, antialias=True).clamp(-1, 1)
        mask = resize_mask(mask, size)
    pad = [0, -size[1] % multiple, 0, -size[0] % multiple]
    return F.pad(image, pad), F.pad(mask.expand(-1, 1, *size), pad), size


def outpaint(image: Tensor, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> tuple[Tensor, Tensor]:
    """The image on a larger canvas: (image, mask) with so many unknown pixels more on each side."""
    pad = (left, right, top, bottom)
    if any(n < 0 or int(n) != n for n in pad) or not any(pad):
        raise ValueError(f"left, right, top, bottom = {pad}: give numbers of pixels >= 0, not all 0")
    return F.pad(image, pad), F.pad(torch.ones_like(image[:1, :1]), pad)


def join(first: Tensor, second: Tensor, known: float = 1 / 3) -> tuple[Tensor, Tensor]:
    """Two images to be joined: (image, mask) with the left `known` of the first, the right `known` of the second, and
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


# ---- photos at their own size


class Part(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """That part of x [..., H, W], a view."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


def parts_around(mask: Tensor, side: int, context: float = 0.5) -> list[Part]:
    """The parts of a large image that hold its holes, each hole whole: what a model of images of `side` pixels is shown of it.

    mask     [1, 1, H, W]; what is not known (below 1) is a hole
    context  so much of a hole's longer side is added on each of its sides

    Parts are squares of at least `side` pixels, as far as the image has so many. Those that would overlap are joined.
    """
    if not context >= 0:
        raise ValueError(f"context = {context}: give a number >= 0, the margin as a fraction of the hole's longer side")
    if len(check_mask(mask)) != 1:
        raise ValueError(f"mask has shape {list(mask.shape)}: give one, [1, 1, H, W]")
    size, holes = mask.shape[2:], _boxes(mask[0, 0] < 1)

    def around(hole: tuple) -> Part:
        start, end = hole
        wanted = max(side, round(max(b - a for a, b in zip(start, end, strict=True)) * (1 + 2 * context)))
        extent = [min(wanted, n) for n in size]
        corner = [min(max((a + b - m) // 2, 0), n - m) for a, b, m, n in zip(start, end, extent, size, strict=True)]
        return Part(*corner, *extent)

    while True:
        parts = [around(hole) for hole in holes]
        pairs = [(i, j) for j in range(len(parts)) for i in range(j) if _overlap(parts[i], parts[j])]
        if not pairs:
            return parts
        i, j = pairs[0]
        (a, b), (c, d) = holes[i], holes.pop(j)
        holes[i] = tuple(map(min, a, c)), tuple(map(max, b, d))


def fill_photo(
    photo: Tensor,
    mask: Tensor,
    fill: Callable[[Tensor, Tensor], Tensor],
    side: int,
    multiple: int,
    context: float = 0.5,
    **seam: Any,
) -> Tensor:
    """A photo [1, 3, H, W] of any size and aspect ratio with its holes filled in by a model of images of `side` pixels: each part
    around a hole is resized for the model, filled, resized back, and put into the photo. Known pixels stay bit-equal.

    fill      (image [1, 3, h, w], mask [1, 1, h, w]) -> n images [n, 3, h, w]; called for each of `parts_around`
    side, multiple  as `fit` takes them: the model's image size, and what h and w have to be multiples of
    seam      arguments of `blend`; none: poisson=True

    Returns [n, 3, H, W]. Parts larger than `side` have as much detail in the hole as the model's images have.
    """
    mask = mask.to(photo)
    if mask.shape[2:] != photo.shape[2:] or len(photo) != 1:
        raise ValueError(f"mask has shape {list(mask.shape)} and photo {list(photo.shape)}: give one of each, of the same size")
    out = photo
    for part in parts_around(mask, side, context):
        own, known = part.of(photo), part.of(mask)
        image, small, (h, w) = fit(own, known, side, multiple)
        filled = fill(image, small)[..., :h, :w].to(photo)
        if (h, w) != (part.height, part.width):
            filled = resize(filled, [part.height, part.width], InterpolationMode.BICUBIC, antialias=True)
        out = out.expand(len(filled), -1, -1, -1).clone()
        part.of(out).copy_(blend(filled.clamp(-1, 1), own, known, **(seam or {"poisson": True})))
    return out


def seam_step(image: Tensor, mask: Tensor) -> float:
    """How visible the hole's border is: the mean difference of neighbours across it over that of neighbours along it, on both of
    its sides. About 1 where there is no seam; more for a step, less for a blurred border. image [B, C, H, W], mask [1, 1, H, W]."""
    across, along = [], []
    for x, m in ((image, mask), (image.transpose(2, 3), mask.transpose(2, 3))):
        crossing = (m[..., 1:] == 1) != (m[..., :-1] == 1)  # between the columns j and j + 1
        across.append((x[..., 1:] - x[..., :-1]).abs()[crossing.expand(*x.shape[:3], -1)])
        both, down = crossing[..., 1:, :] & crossing[..., :-1, :], (x[..., 1:, :] - x[..., :-1, :]).abs()
        both = both.expand(*x.shape[:2], -1, -1)
        along += [down[..., 1:][both], down[..., :-1][both]]
    return (torch.cat(across).mean() / torch.cat(along).mean().clamp_min(1e-12)).item()


def _overlap(a: Part, b: Part) -> bool:
    return all(p < q + n and q < p + m for p, q, m, n in zip(a[:2], b[:2], a[2:], b[2:], strict=True))


def _boxes(hole: Tensor) -> list[tuple]:
    """((top, left), (bottom, right)) of each connected hole, of a mask [H, W] of booleans; holes nearer than a 64th are one."""
    cell = -(-max(hole.shape) // 64)
    coarse = F.max_pool2d(hole[None, None].float(), cell, ceil_mode=True)[0, 0] > 0
    left, boxes = set(map(tuple, coarse.nonzero().tolist())), []
    while left:
        found, waiting = [], [left.pop()]
        while waiting:
            i, j = waiting.pop()
            found.append((i, j))
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            waiting += near
        own = torch.zeros_like(coarse)
        own[tuple(torch.tensor(found).T)] = True
        own = own.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[: hole.shape[0], : hole.shape[1]]
        at = (own & hole).nonzero()
        boxes.append((tuple(at.amin(0).tolist()), tuple((at.amax(0) + 1).tolist())))
    return sorted(boxes)


# ---- seams


def harmonic_fill(values: Tensor, mask: Tensor, tolerance: float = 1e-4, most: int = 2000) -> Tensor:
    """The known values [B, C, H, W], and in the hole the smoothest continuation of them: the solution of Laplace's equation,
    which every hole pixel fulfils as the mean of its neighbours. Known values stay as they are; without any, zeros.

    By conjugate gradients on all images at once, until no residual exceeds `tolerance`, at most `most` iterations.
    """
    mask = (mask > 0).to(values).expand(len(values), 1, *values.shape[2:])
    hole, large = 1 - mask, max(values.shape[2:]) > 128
    if large:  # only the hole and its border are to be solved for
        span = [(hole.amax(dims) > 0).nonzero() for dims in ((0, 1, 3), (0, 1, 2))]
        if all(len(at) for at in span):
            rows, columns = (slice(max(int(at[0]) - 1, 0), int(at[-1]) + 2) for at in span)
            window = (..., rows, columns)
            if values[window].shape != values.shape:
                values = values.clone()
                values[window] = harmonic_fill(values[window], mask[window], tolerance, most)
                return values
    ones = F.pad(torch.ones_like(hole), (1, 1, 1, 1))
    neighbours = ones[..., 1:-1, 2:] + ones[..., 1:-1, :-2] + ones[..., 2:, 1:-1] + ones[..., :-2, 1:-1]

    def laplace(u: Tensor) -> Tensor:  # on the hole, with natural boundaries at the image's edge
        p = F.pad(u, (1, 1, 1, 1))
        return hole * (neighbours * u - p[..., 1:-1, 2:] - p[..., 1:-1, :-2] - p[..., 2:, 1:-1] - p[..., :-2, 1:-1])

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(2).sum(2)[..., None, None]

    # Of large images, coarser solutions save most of the iterations.
    start = _push_pull(values, mask, partial(harmonic_fill, tolerance=tolerance) if large else None)
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


def blend(sampled: Tensor, image: Tensor, mask: Tensor, feather: int = 0, poisson: bool = False) -> Tensor:
    """The final image: the known pixels of the image, the sampled ones in the hole.

    feather  known pixels nearer to the hole than so many pixels are mixed with the sampled ones; 0: all are kept, bit-equal
    poisson  the sampled pixels are shifted by the smoothest field that takes the step out of the seam (Perez et al. 2003); the
             known ones are kept bit-equal, so that nothing is left to feather

    FloatingPointError where the sampled or the known image has NaN or infinite values.
    """
    if feather < 0 or int(feather) != feather:
        raise ValueError(f"feather = {feather}: give a number of pixels >= 0")
    check_finite(sampled, "the sampled image, which blend was given,")
    check_finite(image, "the known image, which blend was given,")
    mask = (mask == 1).to(image)
    if poisson:
        sampled = (sampled + harmonic_fill((image - sampled) * mask, mask)).clamp(-1, 1)
    if not feather:
        return torch.where(mask > 0, image, sampled)
    near = F.avg_pool2d(F.pad(mask, [feather] * 4, mode="replicate"), 2 * feather + 1, stride=1)
    weight = mask * (2 * near - 1).clamp(0, 1)  # 0 next to a straight border, 1 at the distance `feather`
    return torch.where(weight == 1, image, sampled + weight * (image - sampled))


def reencode(model: Any, z: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Latents of the whole image, Enc(M image + (1 - M) Dec(z)): at last the encoder sees what is in the hole, where the known
    latents of the constraint came from a smooth continuation. Dec of them has the known region as well as the autoencoder can.

    z [B, C, h, w] of a LatentDiffusion `model` -> the same shape. One evaluation of the decoder and one of the encoder.
    """
    return model.encode(blend(model.decode(z).clamp(-1, 1), image, mask, poisson=True))


def _push_pull(values: Tensor, mask: Tensor, solve: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """A first guess in the hole: means of the known pixels around it, taken from ever coarser images; or what `solve` makes of the
    next coarser one."""
    if min(values.shape[2:]) < 2:
        return (values * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp_min(1) * torch.ones_like(values)
    pool = lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)  # noqa: E731
    weight = pool(mask)
    coarse = pool(values * mask) / torch.where(weight > 0, weight, 1.0)
    known = (weight > 0).to(values)
    coarse = torch.where(known > 0, coarse, (solve or _push_pull)(coarse, known))
    return F.interpolate(coarse, size=values.shape[2:], mode="bilinear", align_corners=False)
