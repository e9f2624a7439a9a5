import pytest
import torch

from ldm.schedules import DiffusionSchedule, make_beta_schedule


class GaussianDenoiser:
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


@pytest.fixture
def schedule():
    return DiffusionSchedule(make_beta_schedule("sqrt_linear", 1000))


@pytest.fixture
def gaussian(schedule):
    """Pictures [1, 8, 8]: smooth Gaussian random fields of unit variance (as latents have) around a mean that is not zero."""
    at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).view(64, 2).double()
    cov = torch.exp(-0.5 * torch.cdist(at, at) ** 2) + 1e-5 * torch.eye(64, dtype=torch.float64)
    return GaussianDenoiser(torch.linspace(-0.5, 0.5, 64, dtype=torch.float64), cov, schedule)
