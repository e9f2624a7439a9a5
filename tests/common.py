"""What several test files use."""

from pathlib import Path

import torch

from ldm.sampling import DenoiserLike
from ldm.schedules import DiffusionSchedule, make_beta_schedule

ROOT = Path(__file__).parents[1]


def reference():
    lines = (Path(__file__).parent / "data/sd-v1-state-dict.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return {name: [int(n) for n in shape.split("x")] for name, shape in rows}


def randomised(model, seed=0):
    """Every weight random, the zero-initialised ones too, at a scale that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.1 if p.ndim < 2 else (p[0].numel() or 1) ** -0.5
        p.data = noise * scale + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


class GaussianDenoiser(DenoiserLike):
    """The exact D for x_0 ~ N(mean, cov): E[x_0 | x_t], with J = dD/dx_t in closed form. Pictures are flattened to vectors."""

    def __init__(self, mean, cov, schedule):
        self.mean, self.cov, self.schedule = mean, cov, schedule
        self.calls = 0

    def jacobian(self, t):
        _, alpha, sigma = self.schedule.level(t)
        n = len(self.mean)
        return alpha * self.cov @ torch.linalg.inv(alpha**2 * self.cov + sigma**2 * torch.eye(n, dtype=self.cov.dtype))

    def __call__(self, x_t, t):
        self.calls += 1
        alpha = self.schedule.level(t).alpha
        delta = x_t.flatten(1) - alpha * self.mean.to(x_t)
        return (self.mean.to(x_t) + delta @ self.jacobian(t).to(x_t).T).view_as(x_t)


def smooth_gaussian(schedule=None):
    """The denoiser of images [1, 8, 8]: smooth Gaussian random fields of unit variance around a mean that is not 0."""
    schedule = DiffusionSchedule(make_beta_schedule("sqrt_linear", 1000)) if schedule is None else schedule
    at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).view(64, 2).double()
    cov = torch.exp(-0.5 * torch.cdist(at, at) ** 2) + 1e-5 * torch.eye(64, dtype=torch.float64)
    return GaussianDenoiser(torch.linspace(-0.5, 0.5, 64, dtype=torch.float64), cov, schedule)
