"""Small parsers of emoji: images [B, 3, H, W] in [-1, 1] -> logits [B, K, H, W] of the classes in ldm/data/regions.py. One guides
(`ldm.guidance.parsing_distance`), one of another architecture judges."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.data.regions import CLASSES


def block(c_in: int, c_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride=stride, padding=dilation, dilation=dilation), nn.GroupNorm(8, c_out), nn.SiLU()
    )


class EmojiParser(nn.Module):
    """What both have. classes: the names of the classes; labels(images): the most likely class of each pixel, [B, H, W]."""

    classes = CLASSES

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        return self(images).argmax(1)


class UNetParser(EmojiParser):
    """A U-Net of three levels (Ronneberger et al. 2015), H and W multiples of 4."""

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


class DilatedParser(EmojiParser):
    """Dilated convolutions at half resolution (Yu & Koltun 2016), joined with one 5 x 5 convolution of the image itself."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.begin = block(3, width, stride=2)
        self.context = nn.ModuleList(block(width, width, dilation=d) for d in (1, 2, 4, 8, 1))
        self.fine = nn.Conv2d(3, width, 5, padding=2)
        self.mix = nn.Conv2d(width // 4 + width, 2 * width, 1)
        self.out = nn.Conv2d(2 * width, len(self.classes), 1)

    def forward(self, x: Tensor) -> Tensor:
        context = self.begin(x)  # [B, w, H/2, W/2]
        for layer in self.context:
            context = context + layer(context)
        x = torch.cat([F.pixel_shuffle(context, 2), F.silu(self.fine(x))], 1)  # [B, w/4 + w, H, W]
        return self.out(F.silu(self.mix(x)))
