"""A small parser of emoji, which guides (`ldm.guidance.parsing_distance`); `ldm.data.regions.by_rules` judges."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.data.regions import CLASSES


def block(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU())


class UNetParser(nn.Module):
    """A U-Net of three levels (Ronneberger et al. 2015): images [B, 3, H, W] in [-1, 1], H and W multiples of 4 -> logits
    [B, K, H, W] of `classes`, those of ldm/data/regions.py."""

    classes = CLASSES

    def __init__(self, width: int = 16):
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.first = nn.Sequential(block(3, a), block(a, a))
        self.second = nn.Sequential(block(a, b, stride=2), block(b, b))
        self.third = nn.Sequential(block(b, c, stride=2), block(c, c), block(c, b))
        self.up_second, self.up_first = block(2 * b, a), block(2 * a, a)
        self.out = nn.Conv2d(a, len(self.classes), 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)  # [B, w, H, W]
        second = self.second(first)  # [B, 2w, H/2, W/2]
        third = self.third(second)  # [B, 2w, H/4, W/4]
        x = self.up_second(torch.cat([F.interpolate(third, scale_factor=2.0), second], 1))
        x = self.up_first(torch.cat([F.interpolate(x, scale_factor=2.0), first], 1))
        return self.out(x)

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """The most likely class of each pixel, [B, H, W]."""
        return self(images).argmax(1)
