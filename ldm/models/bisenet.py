"""BiSeNet (Yu et al., ECCV 2018) as face parsing has it: a ResNet-18, whose features at 1/8 of the size take the place of the
paper's spatial path. The names are those of published files (79999_iter.pth, of CelebAMask-HQ): cp, ffm, conv_out ..."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

FACE = ("background", "skin", "left brow", "right brow", "left eye", "right eye", "glasses", "left ear", "right ear", "earring",
        "nose", "mouth", "upper lip", "lower lip", "neck", "necklace", "clothes", "hair", "hat")  # fmt: skip


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)  # [B, C, 1, 1]


class ConvBNReLU(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class AttentionRefinement(nn.Module):
    """Features, each channel weighted by what the mean over all places says (the paper's figure 2b)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = ConvBNReLU(c_in, c_out)
        self.conv_atten = nn.Conv2d(c_out, c_out, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.bn_atten(self.conv_atten(mean(x))).sigmoid()


class ContextPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet = resnet18(weights=None)
        del self.resnet.fc
        self.arm16, self.arm32 = AttentionRefinement(256, 128), AttentionRefinement(512, 128)
        self.conv_head32, self.conv_head16 = ConvBNReLU(128, 128), ConvBNReLU(128, 128)
        self.conv_avg = ConvBNReLU(512, 128, kernel=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.resnet
        x8 = r.layer2(r.layer1(r.maxpool(F.relu(r.bn1(r.conv1(x))))))  # [B, 128, H/8, W/8]
        x16 = r.layer3(x8)
        x32 = r.layer4(x16)
        top = self.arm32(x32) + self.conv_avg(mean(x32))
        top = self.conv_head32(F.interpolate(top, x16.shape[2:]))
        return x8, self.conv_head16(F.interpolate(self.arm16(x16) + top, x8.shape[2:]))  # both [B, 128, H/8, W/8]


class FeatureFusion(nn.Module):
    """Both paths, the channels weighted, added to themselves (the paper's figure 2c)."""

    def __init__(self, c: int):
        super().__init__()
        self.convblk = ConvBNReLU(c, c, kernel=1)
        self.conv1, self.conv2 = nn.Conv2d(c, c // 4, 1, bias=False), nn.Conv2d(c // 4, c, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat([spatial, context], 1))
        return x + x * self.conv2(F.relu(self.conv1(mean(x)))).sigmoid()


class Output(nn.Module):
    def __init__(self, c_in: int, c_mid: int, classes: int):
        super().__init__()
        self.conv = ConvBNReLU(c_in, c_mid)
        self.conv_out = nn.Conv2d(c_mid, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv(x))


class BiSeNet(nn.Module):
    """Images [B, 3, H, W], normalised as ImageNet's, H and W multiples of 32 -> logits [B, classes, H, W]. conv_out16 and
    conv_out32 are heads of the training alone."""

    def __init__(self, classes: int = len(FACE)):
        super().__init__()
        self.cp, self.ffm = ContextPath(), FeatureFusion(256)
        self.conv_out, self.conv_out16, self.conv_out32 = (
            Output(256, 256, classes),
            Output(128, 64, classes),
            Output(128, 64, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv_out(self.ffm(*self.cp(x))), x.shape[2:], mode="bilinear", align_corners=True)
