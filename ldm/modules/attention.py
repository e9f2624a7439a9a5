"""Attention blocks of the latent-diffusion U-Net (Rombach et al. 2022), all through scaled_dot_product_attention.

Attribute names are those of the published state dicts.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class GEGLU(nn.Module):
    """GELU-gated linear unit (Shazeer 2020): a * GELU(b) with [a, b] = W x."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(b)


class FeedForward(nn.Module):
    def __init__(self, dim, mult=4, glu=True, dropout=0.0):
        super().__init__()
        inner = mult * dim
        first = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention from x to context; to x itself where context is None."""

    def __init__(self, query_dim, context_dim=None, heads=8, dim_head=64, dropout=0.0):
        super().__init__()
        inner = heads * dim_head
        context_dim = context_dim or query_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # [B, N, C], [B, M, C_context]
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )  # [B, heads, N or M, dim_head]
        out = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, dim_head]
        return self.to_out(out.transpose(1, 2).flatten(2))  # [B, N, C]


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each pre-normed and residual."""

    def __init__(self, dim, n_heads, d_head, dropout=0.0, context_dim=None, gated_ff=True, disable_self_attn=False):
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # [B, N, C]
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of a feature map, conditioned on a token sequence by cross-attention."""

    def __init__(
        self, in_channels, n_heads, d_head, depth=1, dropout=0.0, context_dim=None, disable_self_attn=False, use_linear=False
    ):
        super().__init__()
        inner = n_heads * d_head
        context_dims = context_dim if isinstance(context_dim, (list, tuple)) else [context_dim] * depth
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        # use_linear: Stable Diffusion v2. v1's weights have the shape of 1x1 convolutions, which are the same.
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, n_heads, d_head, dropout, c, disable_self_attn=disable_self_attn) for c in context_dims
        )
        self.proj_out = nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # [B, C, H, W], [B, M, C_context]
        h = self.norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        h = pointwise(self.proj_in, h)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = pointwise(self.proj_out, h).transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]
        return x + h


def pointwise(layer: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """A linear layer or 1x1 convolution on tokens [B, N, C]: without a change of layout."""
    return F.linear(h, layer.weight.flatten(1), layer.bias)


class AttentionBlock(nn.Module):
    """Unconditional self-attention over pixels (ADM, Dhariwal & Nichol 2021).

    The qkv channels are ordered (head, qkv, dim) in the published "legacy" weights, (qkv, head, dim) in the new order.
    """

    def __init__(self, channels, num_heads, use_new_attention_order=False):
        super().__init__()
        self.num_heads = num_heads
        self.new_order = use_new_attention_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        h = self.qkv(self.norm(x).flatten(2))  # [B, 3*C, N]
        if self.new_order:
            q, k, v = h.unflatten(1, (3, self.num_heads, -1)).unbind(1)  # [B, heads, dim, N]
        else:
            q, k, v = h.unflatten(1, (self.num_heads, 3, -1)).unbind(2)
        h = F.scaled_dot_product_attention(*(y.transpose(2, 3) for y in (q, k, v)))  # [B, heads, N, dim]
        h = self.proj_out(h.transpose(2, 3).flatten(1, 2))  # [B, C, N]
        return x + h.view_as(x)
