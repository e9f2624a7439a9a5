"""The quantiser of VQ autoencoders (van den Oord et al. 2017; VQGAN, Esser et al. 2021)."""

import torch
from torch import Tensor, nn


class VectorQuantizer(nn.Module):
    """Replaces each pixel of a latent by the nearest of n_embed codes; the gradient passes straight through.

    Names as published: `embedding.weight` [n_embed, embed_dim].
    """

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, embed_dim, h, w] -> the nearest codes, same shape and dtype, with dz as their derivative."""
        codes = self.embedding(self.indices(z)).movedim(-1, 1).to(z.dtype)
        return z + (codes - z).detach()

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """z [B, embed_dim, h, w] -> the number of each pixel's nearest code, [B, h, w], int64. Distances in float32."""
        codebook = self.embedding.weight.detach().float()
        half_squares = codebook.square().sum(1) / 2
        pixels = z.detach().movedim(1, -1).flatten(0, 2).float()  # [B h w, embed_dim]
        # |z - code|^2 / 2 without |z|^2 / 2, which is the same for all codes; 4096 x n_embed numbers at a time
        nearest = [(half_squares - part @ codebook.T).argmin(1) for part in pixels.split(4096)]
        return torch.cat(nearest).view(z.shape[0], *z.shape[2:])
