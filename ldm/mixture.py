"""Priors whose denoiser and posterior are known exactly: mixtures of Gaussians, and how far samples are from the truth.

The components share one covariance C. Then so do those of the posterior given y = A x_0 + sigma_y n, and D is a softmax:

    D(x_t, t) = sum_k p_k (m_k + alpha C S^-1 (x_t - alpha m_k)),   S = alpha^2 C + sigma^2 I,   p_k ~ w_k N(x_t; alpha m_k, S)
"""

import torch
from torch import Tensor

from ldm.sampling import DenoiserLike
from ldm.schedules import Schedule


class Mixture:
    """sum_k weights_k N(means_k, C) over vectors of d numbers.

    weights [K], not negative, of any sum > 0; means [K, d]; cov: C [d, d], symmetric and positive semi-definite, or a number c >= 0
    for C = c I. Float64. K = 1 is a Gaussian. ValueError for what does not fit.
    """

    def __init__(self, weights: Tensor, means: Tensor, cov: Tensor | float):
        weights, self.means = torch.as_tensor(weights).double(), torch.as_tensor(means).double()
        if self.means.ndim != 2 or weights.shape != self.means.shape[:1]:
            raise ValueError(f"means has shape {list(self.means.shape)} for {list(weights.shape)} weights: give [K, d] and [K]")
        if not ((weights >= 0).all() and 0 < weights.sum() < torch.inf):
            raise ValueError("weights: give numbers >= 0, not all of them 0")
        self.weights, d = weights / weights.sum(), self.means.shape[1]
        if isinstance(cov, (int, float)):
            self.basis, self.variances = None, torch.full((d,), float(cov), dtype=torch.float64)
        else:
            self.variances, self.basis = torch.linalg.eigh(cov.double())  # C = basis diag(variances) basis^T
        if self.variances.min() < -1e-9 * self.variances.max().clamp_min(1e-30):
            raise ValueError(f"cov has an eigenvalue of {self.variances.min():.3g}: give none below 0")
        self.variances = self.variances.clamp_min(0)

    @property
    def cov(self) -> Tensor:
        """C [d, d]."""
        return torch.diag(self.variances) if self.basis is None else self.basis * self.variances @ self.basis.T

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws [n, d]."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64) * self.variances.sqrt()
        return self.means[k] + (z if self.basis is None else z @ self.basis.T)

    def posterior(self, A: Tensor, y: Tensor, sigma_y: float) -> "Mixture":
        """The distribution of x_0 given y = A x_0 + sigma_y n. A [m, d], y [m]. m = 0 gives the prior; rows of A may depend on one
        another, also without noise, if y is consistent."""
        A, y, C = A.double(), y.double(), self.cov
        S = A @ C @ A.T + sigma_y**2 * torch.eye(len(A), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(S)
        kept = values > 1e-10 * values.max() if len(values) else values > 0  # directions that measure anything
        values, vectors = values[kept], vectors[:, kept]
        r = (y - self.means @ A.T) @ vectors  # [K, kept]
        gain = C @ A.T @ vectors / values
        logits = self.weights.log() - 0.5 * (r.square() / values).sum(1)
        cov = C - gain * values @ gain.T
        return Mixture(logits.softmax(0), self.means + r @ gain.T, (cov + cov.T) / 2)

    def denoiser(self, schedule: Schedule) -> "MixtureDenoiser":
        """D of this prior, for x_t [B, ...] of d numbers per sample."""
        return MixtureDenoiser(self, schedule)


class MixtureDenoiser(DenoiserLike):
    """The exact D(x_t, t) = E[x_0 | x_t], differentiable in both modes. x_t [B, ...] of d numbers per sample, any float dtype."""

    def __init__(self, prior: Mixture, schedule: Schedule):
        self.prior, self.schedule, self._cached = prior, schedule, {}  # type: ignore[var-annotated]

    def _numbers(self, dtype):
        """Log weights [K], means [K, d] and variances [d] in the basis of C, and that basis, in a dtype."""
        if dtype not in self._cached:
            p = self.prior
            means = p.means if p.basis is None else p.means @ p.basis
            with torch.inference_mode(False):  # ordinary tensors even where the first call is the sampler's
                self._cached[dtype] = [None if v is None else v.to(dtype) for v in (p.weights.log(), means, p.variances, p.basis)]
        return self._cached[dtype]

    def __call__(self, x_t, t):
        _, alpha, sigma = self.schedule.level(t)
        log_weights, means, variances, basis = self._numbers(x_t.dtype)
        x = x_t.flatten(1) if basis is None else x_t.flatten(1) @ basis
        S = alpha**2 * variances + sigma**2
        # log N(x; alpha m, S) up to what all components share
        logits = log_weights + (alpha * x / S) @ means.T - 0.5 * (alpha**2 * means.square() / S).sum(1)
        gain = alpha * variances / S
        x0 = gain * x + ((1 - alpha * gain) * (logits.softmax(1) @ means))
        return (x0 if basis is None else x0 @ basis.T).view_as(x_t)


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 100, seed: int = 0) -> float:
    """The mean over random directions of the distance W1 between the projections of two sets of as many samples, [n, d] each."""
    if a.shape != b.shape:
        raise ValueError(f"the samples have the shapes {list(a.shape)} and {list(b.shape)}: give two sets of one shape")
    directions = torch.randn(a.shape[1], projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    a, b = ((x.double() @ directions).sort(dim=0).values for x in (a, b))
    return (a - b).abs().mean().item()


def gaussian_w2(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The exact distance W2 between two Gaussians: W2^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)."""
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp_min(0).sqrt().sum()
    squared = (mean_a - mean_b).double().square().sum() + cov_a.double().trace() + cov_b.double().trace() - 2 * cross
    return squared.clamp_min(0).sqrt().item()


def lattice(d: int, generator: torch.Generator, scale: float = 1.0) -> Mixture:
    """The prior of Cardoso et al. (2024), times `scale`: 25 Gaussians of unit covariance around (8i, 8j, 8i, 8j, ...), i, j from -2
    to 2, in an even dimension d; weights the squares of normal numbers."""
    if d < 2 or d % 2:
        raise ValueError(f"d = {d}: give an even number >= 2")
    i, j = torch.meshgrid(torch.arange(-2.0, 3), torch.arange(-2.0, 3), indexing="ij")
    means = 8 * torch.stack([i.flatten(), j.flatten()], 1).repeat(1, d // 2)
    return Mixture(torch.randn(25, generator=generator, dtype=torch.float64).square(), scale * means, scale**2)
