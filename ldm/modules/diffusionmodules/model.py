"""Encoder and decoder of the latent diffusion autoencoder (Rombach et al. 2022, after VQGAN, Esser et al. 2021).

Constructor arguments and state-dict names are those of the published configs and checkpoints.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm.modules.diffusionmodules.util import Upsample

# Of a block's input, in values per sample: from here on its activations are not kept for the backward pass but computed again. At
# 512 x 512 pixels, Stable Diffusion's decoder keeps 5.6 GiB an image otherwise. 256 x 256 pixels at the decoder's smallest width.
LARGE = 2**20


def norm(channels):
    """The autoencoder's GroupNorm: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, dropout=0.0):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):  # [B, C, H, W]
        if x.requires_grad and torch.is_grad_enabled() and x[0].numel() >= LARGE:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h  # [B, C', H, W]


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels, residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):  # [B, C, H, W]
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2)[:, None] for proj in (self.q, self.k, self.v))  # [B, 1, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # [B, H*W, C]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded on the right and below only, as the published weights expect."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):  # [B, C, H, W]
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # [B, C, H/2, W/2]


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by `attention` (a class: AttnBlock or nn.Identity)."""

    def __init__(self, in_channels, channels, num_blocks, attention, dropout):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(channels if i else in_channels, channels, dropout) for i in range(num_blocks))
        self.attn = nn.ModuleList(attention(channels) for _ in range(num_blocks))

    def forward(self, x):  # [B, C, H, W]
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return x  # [B, C', H, W]


def middle(channels, attention, dropout):
    return nn.Sequential(
        OrderedDict(
            block_1=ResnetBlock(channels, channels, dropout),
            attn_1=attention(channels),
            block_2=ResnetBlock(channels, channels, dropout),
        )
    )


def attention_by_type(ch, attn_type, use_linear_attn):
    """The class of the attention blocks, after refusing what is not supported."""
    if ch % 32:
        raise ValueError(f"ch = {ch}: GroupNorm with 32 groups needs a multiple of 32")
    if use_linear_attn or attn_type not in ("vanilla", "vanilla-xformers", "none"):
        raise ValueError(
            f"attn_type = {attn_type!r}, use_linear_attn = {use_linear_attn}: linear attention is not "
            'supported, give attn_type "vanilla", "vanilla-xformers" (the same function) or "none"'
        )
    return nn.Identity if attn_type == "none" else AttnBlock


class Encoder(nn.Module):
    """Image -> moments of the latent: [B, in_channels, H, W] -> [B, (2 if double_z else 1) * z_channels, H/f, W/f].

    f = 2 ** (len(ch_mult) - 1). Input and weights have one dtype; H and W divisible by f.
    """

    def __init__(
        self,
        *,
        ch,  # width of the first level, a multiple of 32
        ch_mult=(1, 2, 4, 8),  # width of each level, times ch
        num_res_blocks,  # per level
        attn_resolutions,  # sizes of the feature map, at `resolution`, that have attention
        dropout=0.0,
        resamp_with_conv=True,  # learned down-sampling
        in_channels,
        resolution,  # size trained at; it only places attn_resolutions, the network is convolutional
        z_channels,
        double_z=True,  # mean and log-variance
        use_linear_attn=False,
        attn_type="vanilla",
        **ignored,  # the decoder's: one ddconfig describes both
    ):
        super().__init__()
        attention = attention_by_type(ch, attn_type, use_linear_attn)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            attn = attention if resolution // 2**i in attn_resolutions else nn.Identity
            level = Level(width, ch * mult, num_res_blocks, attn, dropout)
            width = ch * mult
            last = i == len(ch_mult) - 1
            level.downsample = nn.Identity() if last else Downsample(width) if resamp_with_conv else nn.AvgPool2d(2)
            self.down.append(level)
        self.mid = middle(width, attention, dropout)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x):  # [B, in_channels, H, W]
        h = self.conv_in(x)  # [B, ch, H, W]
        for level in self.down:
            h = level.downsample(level(h))
        h = self.mid(h)  # [B, ch * ch_mult[-1], H/f, W/f]
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent -> image: [B, z_channels, h, w] -> [B, out_ch, f*h, f*w] with the encoder's f.

    Input and weights have one dtype. Arguments without a comment are the Encoder's.
    """

    def __init__(
        self,
        *,
        ch,
        out_ch,  # channels of the image
        ch_mult=(1, 2, 4, 8),
        num_res_blocks,  # per level; the decoder has one more
        attn_resolutions,
        dropout=0.0,
        resamp_with_conv=True,
        resolution,
        z_channels,
        give_pre_end=False,  # return the features before the last normalisation and convolution
        tanh_out=False,  # bound the image to -1 .. 1
        use_linear_attn=False,
        attn_type="vanilla",
        **ignored,  # the encoder's: one ddconfig describes both
    ):
        super().__init__()
        attention = attention_by_type(ch, attn_type, use_linear_attn)
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = middle(width, attention, dropout)
        up = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            attn = attention if resolution // 2**i in attn_resolutions else nn.Identity
            level = Level(width, ch * mult, num_res_blocks + 1, attn, dropout)
            width = ch * mult
            level.upsample = Upsample(width, resamp_with_conv) if i else nn.Identity()
            up.insert(0, level)  # up.0 is the finest level, as in the encoder
        self.up = nn.ModuleList(up)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z):  # [B, z_channels, h, w]
        h = self.mid(self.conv_in(z))  # [B, ch * ch_mult[-1], h, w]
        for level in reversed(self.up):
            h = level.upsample(level(h))
        if self.give_pre_end:
            return h  # [B, ch * ch_mult[0], f*h, f*w]
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
