"""Losses of what an image shows: functions x0 [B, ...] -> [B] for `ldm.constraints.LossConstraint`. They look at decode(x0); the
gradient is taken through `decode` and their own network, the denoiser is not differentiated.

    words = LossConstraint(text_distance(clip, model.decode, "red apple"))
    both = words + 0.5 * LossConstraint(parsing_distance(silhouette, model.decode, labels))
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.images import check_image

Decode = Callable[[Tensor], Tensor]  # x0 [B, ...] -> images [B, 3, H, W] in [-1, 1], differentiable
Loss = Callable[[Tensor], Tensor]


# ---- style


def gram(tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    """Gram matrix of features over the places of an image (Gatys et al. 2016): F^T W F / sum W, tokens F [B, N, C] -> [B, C, C].

    weights: W [B or 1, N], how much each place counts; None: all alike.
    """
    if weights is None:
        return tokens.transpose(1, 2) @ tokens / tokens.shape[1]
    return (weights[..., None] * tokens).transpose(1, 2) @ tokens / weights.sum(1)[:, None, None]


def gram_distance(
    features: Callable[[Tensor], Tensor],
    decode: Decode,
    reference: Tensor,
    where: Tensor | None = None,
    reference_where: Tensor | None = None,
) -> Loss:
    """The loss |G(features(decode(x0))) - G(features(reference))|_F, Frobenius norm of the difference of Gram matrices: style.

    features         images in [-1, 1] -> tokens [B, N, C], such as `ldm.clip.ClipVision`
    reference        [B or 1, 3, H, W]; or of a whole set [B or 1, n, 3, H, W], whose n Gram matrices are averaged
    where            [B or 1, 1, H, W] from 0 to 1, the region of the image whose style counts: what is outside is grey to
                     `features`, and its places have no weight (N has to be a square then). None: all of it
    reference_where  the same of the reference: [B or 1, 1, H, W], or [B or 1, n, 1, H, W]
    """
    flat = lambda x: x.flatten(0, 1) if getattr(x, "ndim", 0) == 5 else x  # noqa: E731
    with torch.no_grad():
        wanted = _statistics(features, check_image(flat(reference), "reference"), flat(reference_where), "reference_where")
        if reference.ndim == 5:
            wanted = wanted.unflatten(0, reference.shape[:2]).mean(1)

    def loss(x0: Tensor) -> Tensor:
        if len(wanted) not in (1, len(x0)):
            raise ValueError(f"reference has {len(wanted)} images, but x0 has {len(x0)} samples: give one for each, or one for all")
        return torch.linalg.matrix_norm(_statistics(features, decode(x0), where, "where") - wanted)

    return loss


def _statistics(features: Callable[[Tensor], Tensor], images: Tensor, where: Tensor | None, name: str) -> Tensor:
    """Gram matrices [B, C, C] of images [B, 3, H, W], of the region `where` [B or 1, 1, H, W]."""
    if where is None:
        return gram(features(images))
    if where.shape[1:] != (1, *images.shape[2:]) or len(where) not in (1, len(images)):
        raise ValueError(f"{name} has shape {list(where.shape)}, but the images have {list(images.shape)}: give [B or 1, 1, H, W]")
    where = where.to(images)
    if not ((where >= 0) & (where <= 1)).all() or not (where > 0).flatten(1).any(1).all():
        raise ValueError(f"{name} has values from {where.min():.3g} to {where.max():.3g}: give 0 (outside) to 1, not all of them 0")
    tokens = features(where * images)
    side = math.isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        raise ValueError(f"{name} is given, but the features have {tokens.shape[1]} places: it needs a square number of them")
    return gram(tokens, F.adaptive_avg_pool2d(where, side).flatten(1))


# ---- words


def text_distance(clip: Any, decode: Decode, texts: str | Sequence[str]) -> Loss:
    """The loss 1 - cos(image, text) of CLIP's features, from 0 to 2.

    clip: with `encode_image` (images in [-1, 1] -> [B, C]) and `encode_text` (texts -> [n, C]), such as `ldm.clip.Clip`;
    texts: one for all samples, or one each.
    """
    wanted = F.normalize(clip.encode_text([texts] if isinstance(texts, str) else list(texts)), dim=1)

    def loss(x0: Tensor) -> Tensor:
        if len(wanted) not in (1, len(x0)):
            raise ValueError(f"texts has {len(wanted)} entries, but x0 has {len(x0)} samples: give one for each, or one for all")
        return 1 - (F.normalize(clip.encode_image(decode(x0)), dim=1) * wanted).sum(1)

    return loss


# ---- places


def parsing_distance(parse: Callable[[Tensor], Tensor], decode: Decode, labels: Tensor) -> Loss:
    """The loss mean over pixels of -log p(label), the cross-entropy of a segmenter's answer: mask-guided generation.

    parse   images in [-1, 1] -> logits [B, K, H, W] of K classes: `silhouette`, or what `ldm.parsers.load_parser` gives
    labels  [B or 1, H, W], for each pixel the number of its class; -1 where anything may be
    """
    if labels.ndim != 3 or labels.is_floating_point() and (labels != labels.round()).any():
        raise ValueError(f"labels has shape {list(labels.shape)} and dtype {labels.dtype}: give whole numbers, [B or 1, H, W]")
    labels = labels.long()

    def loss(x0: Tensor) -> Tensor:
        logits = parse(decode(x0))
        if labels.max() >= logits.shape[1] or labels.min() < -1:
            raise ValueError(f"labels has values {int(labels.min())} to {int(labels.max())}: the parser's classes are 0 to "
                             f"{logits.shape[1] - 1}, and -1 is any")  # fmt: skip
        if labels.shape[1:] != logits.shape[2:] or len(labels) not in (1, len(logits)):
            raise ValueError(f"labels has shape {list(labels.shape)}, but the parser answers with {len(logits)} of "
                             f"{list(logits.shape[2:])} pixels: give [B or 1, H, W]")  # fmt: skip
        each = F.cross_entropy(logits, labels.to(logits.device).expand(len(logits), -1, -1), ignore_index=-1, reduction="none")
        return each.flatten(1).sum(1) / (labels >= 0).flatten(1).sum(1).clamp_min(1).to(each)

    return loss


def silhouette(images: Tensor, sharpness: float = 20.0) -> Tensor:
    """Logits [B, 2, H, W] of background (0) and object (1), of images on white: no network, object is what is not nearly white. The
    border is at a distance of 0.15 from white, where white is 1 and black is 0, in the darkest channel."""
    logit = sharpness * ((1 - images.amin(1)) / 2 - 0.15)
    return torch.stack([-logit / 2, logit / 2], 1)


def colour_distance(decode: Decode, colour: Sequence[float], where: Tensor | None = None) -> Loss:
    """The loss |mean colour - colour|^2, of the pixels where `where` [B or 1, 1, H, W] is not 0, by its weights; None: of all.

    colour: red, green and blue in [-1, 1].
    """
    if len(colour) != 3 or not all(-1 <= c <= 1 for c in colour):
        raise ValueError(f"colour = {colour}: give red, green and blue from -1 to 1")

    def loss(x0: Tensor) -> Tensor:
        images = decode(x0)
        weights = torch.ones_like(images[:1, :1]) if where is None else where.to(images)
        mean = (weights * images).sum((2, 3)) / weights.sum((2, 3)).clamp_min(1e-6)
        return (mean - images.new_tensor(colour)).square().sum(1)

    return loss
