"""What inpainting needs apart from the sampler and the masks: canvases, and the seam between known and generated pixels.

Images are [B, C, H, W] float32 in [-1, 1]. Masks are [B or 1, 1, H, W] of 1 (known, kept) and 0 (to be filled in): ldm/masks.py.
Of soft masks, only what has the weight 1 is put back.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import InterpolationMode, resize

from ldm.images import check_finite
from ldm.masks import check_mask, latent_mask, make_mask, resize_mask

__all__ = ["blend", "check_mask", "fit", "harmonic_fill", "join", "latent_mask", "make_mask", "outpaint", "reencode"]


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


# ---- seams


def harmonic_fill(values: Tensor, mask: Tensor, tolerance: float = 1e-4, most: int = 2000) -> Tensor:
    """The known values [B, C, H, W], and in the hole the smoothest continuation of them: the solution of Laplace's equation,
    which every hole pixel fulfils as the mean of its neighbours. Known values stay as they are; without any, zeros.

    By conjugate gradients on all images at once, until no residual exceeds `tolerance`, at most `most` iterations.
    """
    mask = mask.to(values).expand(len(values), 1, *values.shape[2:])
    hole = 1 - mask
    ones = F.pad(torch.ones_like(hole), (1, 1, 1, 1))
    neighbours = ones[..., 1:-1, 2:] + ones[..., 1:-1, :-2] + ones[..., 2:, 1:-1] + ones[..., :-2, 1:-1]

    def laplace(u: Tensor) -> Tensor:  # on the hole, with natural boundaries at the image's edge
        p = F.pad(u, (1, 1, 1, 1))
        return hole * (neighbours * u - p[..., 1:-1, 2:] - p[..., 1:-1, :-2] - p[..., 2:, 1:-1] - p[..., :-2, 1:-1])

    def dot(a: Tensor, b: Tensor) -> Tensor:
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


def _push_pull(values: Tensor, mask: Tensor) -> Tensor:
    """A first guess in the hole: means of the known pixels around it, taken from ever coarser images."""
    if min(values.shape[2:]) < 2:
        return (values * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp_min(1) * torch.ones_like(values)
    pool = lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)  # noqa: E731
    weight = pool(mask)
    coarse = pool(values * mask) / torch.where(weight > 0, weight, 1.0)
    known = (weight > 0).to(values)
    coarse = torch.where(known > 0, coarse, _push_pull(coarse, known))
    return F.interpolate(coarse, size=values.shape[2:], mode="bilinear", align_corners=False)
