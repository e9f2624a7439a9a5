"""The mixture's denoiser, posterior and distances against textbook formulas and brute force."""

import pytest
import torch

from ldm.mixture import Mixture, gaussian_w2, lattice, sliced_wasserstein
from ldm.sampling import jvp


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_cov(d, seed=0):
    root = torch.randn(d, d, generator=generator(seed), dtype=torch.float64)
    return root @ root.T / d


def density(prior, x):
    """The mixture's density at x [n, d], by torch.distributions."""
    cov = prior.cov + 1e-12 * torch.eye(len(prior.cov))
    parts = torch.distributions.MultivariateNormal(prior.means, cov.expand(len(prior.means), -1, -1))
    mixing = torch.distributions.Categorical(prior.weights)
    return torch.distributions.MixtureSameFamily(mixing, parts).log_prob(x).exp()


@pytest.mark.parametrize("cov", [0.3, some_cov(2) / 4], ids=["c I", "C"])
def test_the_denoiser_is_the_posterior_mean_by_quadrature(schedule, cov):
    prior = Mixture(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([[0.0, 0], [1, -1], [-2, 1]]), cov)
    D, line = prior.denoiser(schedule), torch.linspace(-8, 8, 401, dtype=torch.float64)
    x0 = torch.cartesian_prod(line, line)
    p = density(prior, x0)
    for t in (100, 400, 900):
        _, alpha, sigma = schedule.level(t)
        x_t = torch.tensor([[0.4, -0.7]], dtype=torch.float64)
        w = p * torch.exp(-0.5 * ((x_t - alpha * x0) / sigma).square().sum(1))
        exact = (w[:, None] * x0).sum(0) / w.sum()
        assert (D(x_t.view(1, 1, 2, 1), t).flatten() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("sigma_y", [0.0, 0.5])
def test_the_posterior_is_the_textbook_s(sigma_y):
    """K = 1: mean and covariance; K = 3: density proportional to prior times likelihood."""
    A, y = torch.randn(2, 4, generator=generator(1), dtype=torch.float64), torch.tensor([0.3, -1.0]).double()
    means, C = torch.randn(3, 4, generator=generator(2), dtype=torch.float64), some_cov(4)
    one = Mixture(torch.ones(1), means[:1], C).posterior(A, y, sigma_y)
    gain = C @ A.T @ torch.linalg.inv(A @ C @ A.T + sigma_y**2 * torch.eye(2))
    assert (one.means[0] - means[0] - gain @ (y - A @ means[0])).abs().max() < 1e-9
    assert (one.cov - (C - gain @ A @ C)).abs().max() < 1e-9
    if sigma_y:
        prior = Mixture(torch.tensor([1.0, 2, 3]), means, C)
        x = torch.randn(50, 4, generator=generator(3), dtype=torch.float64)
        likelihood = torch.exp(-0.5 * ((y - x @ A.T) / sigma_y).square().sum(1))
        ratio = density(prior.posterior(A, y, sigma_y), x) / (density(prior, x) * likelihood)
        assert ratio.std() / ratio.mean() < 1e-6


def test_nothing_measured_and_the_same_measured_twice():
    prior, y = lattice(8, generator()), torch.tensor([2.0]).double()
    same = prior.posterior(torch.zeros(0, 8), torch.zeros(0), 0.3)
    assert torch.allclose(same.means, prior.means) and torch.allclose(same.weights, prior.weights)
    A = torch.randn(1, 8, generator=generator(), dtype=torch.float64)
    once, twice = prior.posterior(A, y, 0.0), prior.posterior(torch.cat([A, A]), torch.cat([y, y]), 0.0)
    assert torch.allclose(once.means, twice.means) and torch.allclose(once.weights, twice.weights)
    assert (once.means @ A.T - y).abs().max() < 1e-9  # y is kept exactly


def test_draws_have_the_mixture_s_mean_and_covariance():
    prior = Mixture(torch.tensor([1.0, 3.0]), torch.tensor([[0.0, 0], [2, 1]]), some_cov(2))
    x = prior.sample(200_000, generator())
    mean = prior.weights @ prior.means
    spread = prior.cov + (prior.weights[:, None] * (prior.means - mean)).T @ (prior.means - mean)
    assert (x.mean(0) - mean).abs().max() < 0.02 and (x.T.cov() - spread).abs().max() < 0.03


def test_gamma_J_is_the_covariance_of_x0_given_x_t(schedule):
    """Tweedie's second order, on which `fast_sampler` is built; forward-mode and differences agree."""
    prior = Mixture(torch.ones(2), torch.tensor([[1.0, 0], [-1, 0.5]]), 0.2)
    D, t = prior.denoiser(schedule), 500
    _, alpha, sigma = schedule.level(t)
    x_t = torch.tensor([[0.2, 0.1]], dtype=torch.float64)
    given = prior.posterior(alpha * torch.eye(2), x_t[0], sigma)
    mean = given.weights @ given.means
    exact = given.cov + (given.weights[:, None] * (given.means - mean)).T @ (given.means - mean)
    for v, column in zip(torch.eye(2, dtype=torch.float64), exact, strict=True):
        for mode, h in (("forward-ad", None), ("difference", 1e-6)):
            assert (sigma**2 / alpha * jvp(D, x_t, t, v[None], None, h, mode)[0] - column).abs().max() < 1e-5


def test_distances():
    x = torch.randn(500, 3, generator=generator(), dtype=torch.float64)
    shift = torch.tensor([3.0, 0, 0]).double()
    assert sliced_wasserstein(x, x[torch.randperm(500)]) < 1e-12
    # W1 of a shift along a direction u is |shift . u|; its mean over the sphere in three dimensions is |shift| / 2
    assert abs(sliced_wasserstein(x, x + shift, projections=5000) - 1.5) < 0.05
    a, b = some_cov(3, 1), some_cov(3, 2)
    assert gaussian_w2(shift, a, 0 * shift, a) == pytest.approx(3, abs=1e-6)
    one, four = torch.eye(1), 4 * torch.eye(1)
    assert gaussian_w2(torch.zeros(1), one, torch.zeros(1), four) == pytest.approx(1)  # |1 - 2|
    assert gaussian_w2(shift, a, shift, b) == pytest.approx(gaussian_w2(shift, b, shift, a))


@pytest.mark.parametrize("make, words", [
    (lambda: Mixture(torch.ones(2), torch.zeros(3, 2), 1.0), r"\[3, 2\] for \[2\]"),
    (lambda: Mixture(torch.zeros(2), torch.zeros(2, 2), 1.0), "weights"),
    (lambda: Mixture(torch.ones(1), torch.zeros(1, 2), -torch.eye(2)), "cov has an eigenvalue of -1"),
    (lambda: Mixture(torch.ones(1), torch.zeros(1, 2), -1.0), "cov has an eigenvalue of -1"),
    (lambda: lattice(3, generator()), "d = 3"),
    (lambda: sliced_wasserstein(torch.zeros(2, 3), torch.zeros(3, 3)), r"\[2, 3\] and \[3, 3\]"),
])  # fmt: skip
def test_wrong_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
