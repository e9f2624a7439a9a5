"""Small pieces shared by the networks: timestep embedding, norms, zero initialisation, resampling layers."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of the diffusion time (Vaswani et al. 2017; Ho et al. 2020, section 4).

    timesteps: [B], integer or float, on the network's own scale (0 .. T-1). Returns [B, dim] in float32, cosines first.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device))
    args = timesteps.float()[:, None] * freqs  # [B, half]
    embedding = torch.cat([args.cos(), args.sin()], dim=-1)  # [B, 2*half]
    return F.pad(embedding, (0, dim % 2))


def normalization(channels: int) -> nn.GroupNorm:
    """The U-Net's GroupNorm: 32 groups, eps 1e-5 (the published value; the attention and VAE blocks use 1e-6)."""
    if channels % 32:
        raise ValueError(
            f"channels = {channels}, but GroupNorm with 32 groups needs a multiple of 32: "
            "choose model_channels and channel_mult accordingly"
        )
    return nn.GroupNorm(32, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Zero all parameters, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Upsample(nn.Module):
    """Nearest x2, then (use_conv) a 3x3 convolution."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # [B, C', 2H, 2W]


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 (use_conv) or a 2x2 average."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None):
        super().__init__()
        self.op = nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return self.op(x)  # [B, C', H/2, W/2]
