"""The distribution that a variational autoencoder's encoder returns."""

import math

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """N(mean, diag(std^2)), one Gaussian per sample.

    parameters: [B, 2*C, ...], the mean and the logarithm of the variance, in the floating dtype that all results have.
    Attributes mean, logvar (clamped to -30 .. 20, so that nothing overflows in float32), std, var: [B, C, ...].
    Raises ValueError where the channels do not split into two halves.
    """

    def __init__(self, parameters: Tensor):
        if parameters.ndim < 2 or parameters.shape[1] % 2:
            raise ValueError(f"parameters has shape {list(parameters.shape)}: give [B, 2*C, ...], mean and logvar")
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)
        self.std = (0.5 * self.logvar).exp()
        self.var = self.logvar.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, [B, C, ...]. The noise is drawn on the generator's device (by default on mean's)."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The mean, [B, C, ...]: what a sampler in latent space wants, free of noise."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """KL(self || other) in nats, [B]; other: a distribution of the same shape, by default the standard normal."""
        if other is None:
            return 0.5 * (self.mean**2 + self.var - 1 - self.logvar).flatten(1).sum(1)
        log_ratio = self.logvar - other.logvar
        return 0.5 * ((self.mean - other.mean) ** 2 / other.var + log_ratio.exp() - 1 - log_ratio).flatten(1).sum(1)

    def nll(self, sample: Tensor) -> Tensor:
        """-log p(sample) in nats, [B]; sample: [B, C, ...]."""
        return 0.5 * (math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var).flatten(1).sum(1)
