"""The U-Net of ADM (Dhariwal & Nichol 2021) with the cross-attention of latent diffusion (Rombach et al. 2022).

Constructor arguments and state-dict names are those of the published configs and checkpoints.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.attention import AttentionBlock, SpatialTransformer
from ldm.modules.diffusionmodules.util import Downsample, Upsample, normalization, timestep_embedding, zero_module


class TimestepEmbedSequential(nn.Sequential):
    """A Sequential that hands the time embedding and the context to the layers that take them."""

    def forward(self, x, emb, context=None):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    """Residual block with time conditioning; up or down: resamples both branches by 2."""

    def __init__(
        self,
        channels,
        emb_channels,
        dropout,
        out_channels=None,
        use_scale_shift_norm=False,
        use_checkpoint=False,
        up=False,
        down=False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        resample = Upsample if up else Downsample
        self.resample = resample(channels, use_conv=False) if up or down else None  # no parameters
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (2 if use_scale_shift_norm else 1) * out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # [B, C, H, W], [B, C_emb]
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)  # [B, C', H', W']
        emb = self.emb_layers(emb)[..., None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class UNetModel(nn.Module):
    """U-Net with attention and timestep embedding, the denoising network of ADM, LDM and Stable Diffusion v1 and v2.

    forward(x, timesteps, context, y) -> [B, out_channels, H, W] in x's dtype; weights may be float16 or bfloat16.
      x          [B, in_channels, H, W], H and W divisible by 2 ** (len(channel_mult) - 1)
      timesteps  [B], 0 .. T-1
      context    [B, M, context_dim] tokens, with use_spatial_transformer
      y          [B] class labels, or [B, adm_in_channels] with num_classes="sequential"
    """

    def __init__(
        self,
        image_size,  # size trained at; kept for the published configs, the network is convolutional
        in_channels,
        model_channels,  # width of the first level
        out_channels,
        num_res_blocks,  # per level: an int or a list
        attention_resolutions,  # down-sampling factors at which attention acts: (4, 2, 1) for Stable Diffusion
        dropout=0.0,
        channel_mult=(1, 2, 4, 8),  # width of each level, times model_channels
        conv_resample=True,  # learned up- and down-sampling
        dims=2,
        num_classes=None,  # an int: learned labels; "continuous": one number; "sequential": a vector
        use_checkpoint=False,  # recompute activations, in training only
        use_fp16=False,  # weights in half precision
        use_bf16=False,
        num_heads=-1,
        num_head_channels=-1,  # either this or num_heads
        num_heads_upsample=-1,
        use_scale_shift_norm=False,  # time embedding as FiLM instead of a sum
        resblock_updown=False,  # residual blocks do the resampling
        use_new_attention_order=False,
        use_spatial_transformer=False,  # cross-attention on `context`
        transformer_depth=1,
        context_dim=None,
        n_embed=None,
        legacy=True,  # upstream's head-size rule; both values give the same network here
        disable_self_attentions=None,  # per level
        num_attention_blocks=None,  # per level: how many of its residual blocks are followed by attention
        disable_middle_self_attn=False,
        use_linear_in_transformer=False,
        adm_in_channels=None,
    ):
        super().__init__()
        if dims != 2 or n_embed is not None:
            raise ValueError(
                f"dims = {dims}, n_embed = {n_embed}: only two-dimensional U-Nets without codebook ids "
                "(dims=2, n_embed=None) are supported"
            )
        if (num_heads == -1) == (num_head_channels == -1):
            raise ValueError(f"num_heads = {num_heads} and num_head_channels = {num_head_channels}: give exactly one")
        if use_spatial_transformer != (context_dim is not None):
            raise ValueError(
                f"context_dim = {context_dim} and use_spatial_transformer = {use_spatial_transformer}: "
                "cross-attention needs both, no cross-attention neither"
            )
        levels = len(channel_mult)
        blocks = [num_res_blocks] * levels if isinstance(num_res_blocks, int) else list(num_res_blocks)
        if len(blocks) != levels:
            raise ValueError(f"num_res_blocks has {len(blocks)} entries, channel_mult has {levels}: give one per level")
        attended = list(num_attention_blocks) if num_attention_blocks is not None else [max(blocks) + 1] * levels
        no_self = list(disable_self_attentions) if disable_self_attentions is not None else [False] * levels
        context_dim = context_dim if context_dim is None or isinstance(context_dim, int) else list(context_dim)

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.context_dim = context_dim
        self.num_classes = num_classes
        self.multiple = 2 ** (levels - 1)
        emb_dim = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if isinstance(num_classes, int):
            self.label_emb = nn.Embedding(num_classes, emb_dim)
        elif num_classes == "continuous":
            self.label_emb = nn.Linear(1, emb_dim)
        elif num_classes == "sequential":
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(adm_in_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
            )
        elif num_classes is not None:
            raise ValueError(f'num_classes = {num_classes!r}: give an int, "continuous", "sequential" or None')

        def res(ch, out=None, **kwargs):
            return ResBlock(ch, emb_dim, dropout, out, use_scale_shift_norm, use_checkpoint, **kwargs)

        def attention(ch, num_heads=num_heads, no_self=False):
            heads = ch // num_head_channels if num_heads == -1 else num_heads
            if ch % heads:
                raise ValueError(f"num_heads = {heads} does not divide the {ch} channels of a level with attention")
            if not use_spatial_transformer:
                return AttentionBlock(ch, heads, use_new_attention_order)
            return SpatialTransformer(
                ch, heads, ch // heads, transformer_depth, dropout, context_dim, no_self, use_linear_in_transformer
            )

        widths = [int(mult * model_channels) for mult in channel_mult]
        ch = widths[0]
        skips, ds = [ch], 1
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))])
        for level, width in enumerate(widths):
            for i in range(blocks[level]):
                layers = [res(ch, width)]
                ch = width
                if ds in attention_resolutions and i < attended[level]:
                    layers.append(attention(ch, no_self=no_self[level]))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level < levels - 1:
                down = res(ch, down=True) if resblock_updown else Downsample(ch, conv_resample)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(ch)
                ds *= 2

        self.middle_block = TimestepEmbedSequential(res(ch), attention(ch, no_self=disable_middle_self_attn), res(ch))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(blocks[level] + 1):
                layers = [res(ch + skips.pop(), width)]
                ch = width
                if ds in attention_resolutions and i < attended[level]:
                    heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
                    layers.append(attention(ch, heads, no_self[level]))
                if level and i == blocks[level]:
                    layers.append(res(ch, up=True) if resblock_updown else Upsample(ch, conv_resample))
                    ds //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(normalization(ch), nn.SiLU(), zero_module(nn.Conv2d(ch, out_channels, 3, padding=1)))
        if use_fp16 or use_bf16:
            self.to(torch.float16 if use_fp16 else torch.bfloat16)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        self._check(x, timesteps, context, y)
        dtype = self.out[2].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))  # [B, 4*model_channels]
        if y is not None:
            emb = emb + self.label_emb(y if isinstance(self.num_classes, int) else y.to(dtype))
        context = None if context is None else context.to(dtype)

        h, skips = x.to(dtype), []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # a line of its own: neither part outlives it
            h = block(h, emb, context)
        return self.out(h).to(x.dtype)  # [B, out_channels, H, W]

    def _check(self, x, timesteps, context, y):
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"x has shape {list(x.shape)}, but this U-Net takes [B, {self.in_channels}, H, W] with H and W "
                f"divisible by {self.multiple}"
            )
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"timesteps has shape {list(timesteps.shape)}, but x has batch size {x.shape[0]}: give one per sample")
        if (context is None) != (self.context_dim is None):
            raise ValueError(
                "context is missing: this U-Net is conditioned on tokens"
                if context is None
                else "context was given, but this U-Net has no cross-attention"
            )
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                "y is missing: this U-Net is class-conditional"
                if y is None
                else "y was given, but this U-Net is not class-conditional"
            )


class PatchUNetModel(nn.Module):
    """A U-Net on patch_size x patch_size pixel blocks (pixel unshuffle): the same function of the same image, with the full
    resolution's convolutions left out. Makes pixel models affordable on a CPU. unet_params: UNetModel's, of the blocks.
    """

    def __init__(self, in_channels, out_channels, patch_size=2, **unet_params):
        super().__init__()
        self.patch_size = patch_size
        self.unet = UNetModel(in_channels=in_channels * patch_size**2, out_channels=out_channels * patch_size**2, **unet_params)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:  # [B, in_channels, H, W]
        h = self.unet(nn.functional.pixel_unshuffle(x, self.patch_size), timesteps, context, y)
        return nn.functional.pixel_shuffle(h, self.patch_size)  # [B, out_channels, H, W]
