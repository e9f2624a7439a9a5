"""Layer inference: one image as a foreground F on a background B, each of which the model could have drawn, and a soft mask m:

    x = m F + (1 - m) B

Two steps in turn, as in flexible sprites (Jojic & Frey 2001). The idea is that of the paper's first version (arXiv 2410.18804v1),
the details are our own:

    completions   each layer is inpainted around those of its pixels that the mask gives it
    EM            a mixture of two Gaussians at each pixel: which layer's completions explain it better?

A completion that was given a pixel says nothing about it. So each hides half of its layer's pixels, in blocks, and only completions
that a pixel was hidden from are asked about it. The denoiser only runs forward.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.constraints import LinearConstraint
from ldm.fast_sampler import fast_sampler
from ldm.guidance import silhouette
from ldm.inpainting import blend, harmonic_fill, latent_mask
from ldm.operators import Mask
from ldm.sampling import DenoiserLike


class Layers(NamedTuple):
    """What is known after a round."""

    mask: Tensor  # [B, 1, H, W], probability that a pixel is the foreground's
    foreground: Tensor  # [B, C, H, W] in [-1, 1], the mean of the completions, with the layer's own pixels in it
    background: Tensor
    log_likelihood: Tensor  # [B] of the image under the mixture, mean over pixels: chooses between starts

    @property
    def recomposed(self) -> Tensor:
        """m F + (1 - m) B, [B, C, H, W]."""
        return self.mask * self.foreground + (1 - self.mask) * self.background


def mixture_mask(
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    prior: Tensor,
    area: float | None = None,
    window: int = 1,
    outliers: float = 0.02,
    steps: int = 10,
) -> tuple[Tensor, Tensor]:
    """EM for x_i ~ m_i N(means_0,i, s_0 variances_0,i) + (1 - m_i) N(means_1,i, s_1 variances_1,i) at each pixel i: the mask
    m [B, 1, H, W] and the log-likelihood [B], mean over pixels. s_k, one for each layer and image, is estimated from 1 on.

    x                 [B, C, H, W]
    means, variances  [2, B, C, H, W], foreground first; variances > 0
    prior             [B or 1, 1, H, W], probability of the foreground, above 0 and below 1
    area              mean of the mask: the prior's log odds are shifted so, in each step; None: they stay
    window            side of the square, an odd number of pixels, whose mean log-densities count for its middle: a smooth mask
    outliers          part of each layer's pixels that may have any colour (uniform in [-1, 1]): a completion that is quite wrong
                      somewhere does not decide about the whole window
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window = {window}: give an odd number of pixels")
    if area is not None and not 0 < area < 1:
        raise ValueError(f"area = {area}: give a part of the image between 0 and 1, or None")
    if not 0 <= outliers < 1:
        raise ValueError(f"outliers = {outliers}: give a part from 0 to below 1")
    if not (variances > 0).all() or not ((prior > 0) & (prior < 1)).all():
        raise ValueError("variances and prior: give variances above 0, and probabilities above 0 and below 1")
    ratio, constant = (x - means).square() / variances, (2 * math.pi * variances).log()
    odds, scale = prior.logit(), torch.ones_like(ratio[:, :, :1, :1, :1])
    anything = math.log(outliers) - x.shape[1] * math.log(2) if outliers else -math.inf
    for _ in range(steps):
        logs = -0.5 * (ratio / scale + scale.log() + constant).sum(2, keepdim=True) + math.log1p(-outliers)
        typical = (logs - anything).sigmoid()  # [2, B, 1, H, W]
        logs = torch.logaddexp(logs, torch.full_like(logs, anything))
        fg, bg = F.avg_pool2d(logs[:, :, 0], window, 1, window // 2, count_include_pad=False)[:, :, None]
        shifted = odds if area is None else odds + _shift(fg - bg + odds, area)
        m = (fg - bg + shifted).sigmoid()  # [B, 1, H, W]
        weights = torch.stack([m, 1 - m]) * typical
        total = (weights.sum((2, 3, 4), keepdim=True) * x.shape[1]).clamp_min(1e-6)
        scale = ((weights * ratio).sum((2, 3, 4), keepdim=True) / total).clamp_min(1e-3)
    both = torch.logaddexp(fg + F.logsigmoid(shifted), bg + F.logsigmoid(-shifted))
    return m, both.mean((1, 2, 3))


def _shift(logits: Tensor, area: float) -> Tensor:
    """What has to be added to logits [B, 1, H, W] so that the mean of their sigmoid is `area`, [B, 1, 1, 1], by bisection."""
    bound = logits.abs().amax((1, 2, 3), keepdim=True) + abs(math.log(area / (1 - area)))
    low, high = -bound, bound
    for _ in range(40):
        middle = (low + high) / 2
        less = (logits + middle).sigmoid().mean((1, 2, 3), keepdim=True) < area
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return (low + high) / 2


def discs(seeds: Sequence[int], size: Sequence[int]) -> Tensor:
    """Masks [B, 1, H, W] to start with, one for each seed: a disc of 15 to 35 % of the shorter side as radius, about the middle."""
    drawn = torch.stack([torch.rand(3, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
    y, x = (torch.arange(n) + 0.5 for n in size)
    centre, radius = 0.3 + 0.4 * drawn[:, :2], (0.15 + 0.2 * drawn[:, 2]) * min(size)
    squares = (y.view(-1, 1) - centre[:, :1, None] * size[0]) ** 2 + (x - centre[:, 1:, None] * size[1]) ** 2
    return (squares <= radius[:, None, None] ** 2)[:, None].float()


def infer_layers(
    model: Any,                 # a LatentDiffusion: encode, decode
    D: DenoiserLike,
    image: Tensor,              # [B, 3, H, W] in [-1, 1], the same image several times for several starts
    seeds: Sequence[int],       # one for each
    rounds: int = 4,            # of completions and EM
    completions: int = 4,       # of each layer in a round, an even number
    evaluations: int = 8,       # of D for each
    area: float | None = 0.2,   # of the foreground, as a part of the image
    window: int = 7,            # see `mixture_mask`
    memory: float = 0.7,        # of what the completions of earlier rounds told
    block: int = 8,             # side in pixels of the blocks that are hidden
    start: Tensor | None = None # [B, 1, H, W], the first mask; None: `discs`
) -> Iterator[Layers]:  # fmt: skip
    """Yields `Layers` after each round, evaluations * 2 * completions evaluations of D for each image. The model's drawings are on
    white, so that the white of F is not opaque: a pixel may be the foreground's as far as its completions have something there
    (`silhouette`). ValueError for an odd number of completions, and for seeds that are not one per image."""
    if len(seeds) != len(image) or completions < 2 or completions % 2:
        raise ValueError(f"{len(seeds)} seeds for {len(image)} images and {completions} completions: give one seed for each image, "
                         "and an even number of completions")  # fmt: skip
    b, _, *size = image.shape
    m = (discs(seeds, size) if start is None else start).to(image)
    weights = torch.full_like(m[:1], 0.01)
    weights[..., 2:-2, 2:-2] = 0.5  # the image's border is the background's
    sums = torch.zeros(())
    for r in range(rounds):
        owned = latent_mask(torch.stack([m > 0.5, m <= 0.5]).flatten(0, 1), block // 2)  # [2 B, 1, h, w]
        owned = owned.repeat_interleave(block // 2, 2).repeat_interleave(block // 2, 3).view(2, b, 1, 1, *size)
        shown = torch.stack([_halves(seed * 1000 + r, completions, block, size) for seed in seeds]).to(image)  # [B, S, 1, H, W]
        given = owned * shown  # [2, B, S, 1, H, W]
        numbers = [((seed * rounds + r) * 2 + k) * completions + s for k in range(2) for seed in seeds for s in range(completions)]
        x = image.repeat_interleave(completions, 0).repeat(2, 1, 1, 1)
        drawn = complete(model, D, x, given.flatten(0, 2), numbers, evaluations).view(2, b, completions, *image.shape[1:])
        hidden = 1 - given
        drawing = silhouette(drawn.flatten(0, 2)).softmax(1)[:, 1:].view_as(hidden)
        told = torch.cat([torch.ones_like(drawing), drawn, drawn.square(), drawing], 3)  # of each pixel that was hidden
        sums = memory * sums + (hidden * told).sum(2)
        n, first, second, shape = (sums / sums[:, :, :1].clamp_min(1e-3)).split([1, 3, 3, 1], 2)
        variances = (second - first.square()).clamp_min(0) + 0.1**2
        m, log_likelihood = mixture_mask(image, first, variances, (weights * shape[0]).clamp(0.01, 0.99), area, window)
        own = torch.stack([m > 0.5, m <= 0.5]).to(image)
        foreground, background = (blend(mean, image, mine) for mean, mine in zip(drawn.mean(2), own, strict=True))
        yield Layers(m, foreground, background, log_likelihood)


def finished(model: Any, D: DenoiserLike, image: Tensor, layers: Layers, seeds: Sequence[int], evaluations: int = 20) -> Layers:
    """The same mask with layers to look at: the background with one completion of what the foreground hides, around all of its
    pixels. Nothing hides the foreground: it is its own pixels, on white."""
    own = (layers.mask > 0.5).to(image)
    background = blend(complete(model, D, image, 1 - own, seeds, evaluations), image, 1 - own)
    return layers._replace(foreground=torch.where(own > 0, image, 1.0), background=background)


@torch.inference_mode()
def complete(model: Any, D: DenoiserLike, image: Tensor, known: Tensor, seeds: Sequence[int], evaluations: int) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] that agree with `image` where `known` [B, 1, H, W] is 1, and are the model's elsewhere. There
    may be samples of which nothing is known."""
    z = model.encode(harmonic_fill(image, known))
    A = Mask(latent_mask(known, image.shape[3] // z.shape[3]))
    *_, state = fast_sampler(D, LinearConstraint(A, A(z)), z.shape, seeds, evaluations=evaluations)
    return model.decode(state.x_t).clamp(-1, 1)


def _halves(seed: int, n: int, block: int, size: Sequence[int]) -> Tensor:
    """n masks [n, 1, H, W] of blocks, by chance; each second one is the opposite of that before it."""
    cells = [-(-side // block) for side in size]
    half = torch.rand(n // 2, 1, 1, *cells, generator=torch.Generator().manual_seed(seed)) < 0.5
    both = torch.cat([half, ~half], 1).flatten(0, 1).float()
    return both.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., : size[0], : size[1]]


# ---- what it is compared with


def iou(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of the pixels above 1/2 of two masks [B, 1, H, W]. [B]"""
    a, b = (m.flatten(1) > 0.5 for m in (mask, truth))
    return (a & b).sum(1) / (a | b).sum(1).clamp_min(1)


def otsu_mask(image: Tensor) -> Tensor:
    """[B, 1, H, W] of 0 and 1: the brightness divides the pixels so that the variance between both classes is largest (Otsu 1979).
    The foreground is the class that has less of the image's border."""
    grey = image.mean(1, keepdim=True)
    thresholds = torch.linspace(-0.99, 0.99, 100, device=image.device)
    above = (grey.flatten(1)[:, None] > thresholds[:, None]).to(image)  # [B, 100, H W]
    part = above.mean(2)
    bright = (above * grey.flatten(1)[:, None]).mean(2) / part.clamp_min(1e-6)
    dark = ((1 - above) * grey.flatten(1)[:, None]).mean(2) / (1 - part).clamp_min(1e-6)
    best = (part * (1 - part) * (bright - dark).square()).argmax(1)
    mask = (grey > thresholds[best].view(-1, 1, 1, 1)).to(image)
    border = torch.ones_like(mask)
    border[..., 1:-1, 1:-1] = 0
    share = (mask * border).sum((1, 2, 3), keepdim=True) / border.sum((1, 2, 3), keepdim=True)
    return torch.where(share > 0.5, 1 - mask, mask)


def colour_mask(image: Tensor, area: float = 0.2, clusters: int = 4, steps: int = 20) -> Tensor:
    """[B, 1, H, W] of 0 and 1: of k-means' clusters of colours the one whose part of the image is closest to `area`. It begins with
    the first pixel, and with those that are farthest from all before."""
    x = image.flatten(2).transpose(1, 2)  # [B, N, C]
    centres = x[:, :1]
    while centres.shape[1] < clusters:
        farthest = torch.cdist(x, centres).amin(2).argmax(1)
        centres = torch.cat([centres, x[torch.arange(len(x)), farthest][:, None]], 1)
    for _ in range(steps):
        own = F.one_hot(torch.cdist(x, centres).argmin(2), clusters).to(x)  # [B, N, K]
        centres = own.transpose(1, 2) @ x / own.sum(1)[..., None].clamp_min(1)
    chosen = (own.mean(1) - area).abs().argmin(1)
    return own.gather(2, chosen.view(-1, 1, 1).expand(-1, own.shape[1], 1)).view_as(image[:, :1])
