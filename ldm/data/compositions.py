"""Two held-out emoji, one smaller and on top of the other, with the layers and the mask that they were made of."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision.transforms.functional import InterpolationMode, resize

from ldm.data.emoji import SIZE, sample_emoji


class Composition(NamedTuple):
    """image = mask * foreground + (1 - mask) * background: [N, 3, 64, 64] in [-1, 1]; mask [N, 1, 64, 64] from 0 to 1."""

    image: Tensor
    mask: Tensor
    foreground: Tensor
    background: Tensor


def compositions(numbers: Sequence[int], scale: float = 0.6) -> Composition:
    """The compositions of these numbers, 0 to 31: emoji k of `sample_emoji`, at `scale` of its size and somewhere, on emoji k + 19
    (mod 32), another thing in the other style. Foregrounds are on white, as all emoji."""
    emoji, side = sample_emoji()[0], round(scale * SIZE)
    if not all(0 <= k < len(emoji) for k in numbers) or not 4 <= side < SIZE - 4:
        raise ValueError(f"numbers = {list(numbers)} and scale = {scale}: give numbers from 0 to 31, and a scale below 0.9")
    found = [_compose(emoji[k : k + 1], emoji[(k + 19) % 32][None], side, k) for k in numbers]
    return Composition(*map(torch.cat, zip(*found, strict=True)))


def opaque(images: Tensor, white: float = 0.9) -> Tensor:
    """Masks [B, 1, H, W] of drawings on white: what the white around them does not reach. images [B, 3, H, W] in [-1, 1]."""
    white_pixels = (images.amin(1, keepdim=True) > white).float()
    reached = white_pixels.clone()
    reached[..., 1:-1, 1:-1] = 0
    while not torch.equal(more := max_pool2d(reached, 3, 1, 1) * white_pixels, reached):
        reached = more
    return 1 - reached


def _compose(drawing: Tensor, background: Tensor, side: int, seed: int) -> Composition:
    top, left = (2 + torch.randint(SIZE - side - 3, (2,), generator=torch.Generator().manual_seed(seed))).tolist()
    place = (..., slice(top, top + side), slice(left, left + side))
    foreground, mask = torch.ones_like(background), torch.zeros_like(background[:, :1])
    mask[place] = resize(opaque(drawing), [side, side], InterpolationMode.BILINEAR, antialias=True).clamp(0, 1)
    small = resize(drawing, [side, side], InterpolationMode.BICUBIC, antialias=True).clamp(-1, 1)
    foreground[place] = torch.where(mask[place] > 0, small, 1.0)
    return Composition(mask * foreground + (1 - mask) * background, mask, foreground, background)
