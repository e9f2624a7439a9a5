"""azula's and deepinv's methods through our adapters: on a Gaussian, whose posterior is known, and their costs."""

import foreign
import pytest
import torch
from common import GaussianDenoiser, half_mask, last, posterior

from ldm.baselines import dps
from ldm.comparison import EvaluationCounter
from ldm.constraints import DecodedConstraint, LinearConstraint
from ldm.operators import Mask, downsample, gaussian_blur, measure
from ldm.schedules import FlowSchedule

azula, deepinv = foreign.azula, foreign.deepinv
UNKNOWN = torch.arange(64).view(8, 8)[:, 4:].flatten()


@pytest.fixture
def small(gaussian):
    """The Gaussian, with a quarter of its deviations: nearly all of it lies in [-1, 1], where deepinv clips."""
    return GaussianDenoiser(gaussian.mean / 4, gaussian.cov / 16, gaussian.schedule)


def problem(D, A, n, sigma_y=0.0, dtype=torch.float64):
    """The constraint of one measurement for n samples, and the posterior's mean [64] and covariance."""
    x = D.mean + torch.linalg.cholesky(D.cov) @ torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    y = measure(A, x.view(1, 1, 8, 8), sigma_y, [5])
    return LinearConstraint(A, y.to(dtype).expand(n, -1, -1, -1)), *posterior(D, A, y, max(sigma_y, 1e-3))


# package, method, settings, forward and backward evaluations per image
CASES = {
    "azula DPS": (azula("DPS"), dict(steps=6), 6, 6),
    "azula PGDM": (azula("PGDM"), dict(steps=6), 6, 6),
    "azula TMPD": (azula("TMPD"), dict(steps=6), 6, 12),
    "azula MMPS": (azula("MMPS"), dict(steps=6), 6, 12),
    "azula MMPS, 4 iterations": (azula("MMPS"), dict(steps=6, iterations=4), 6, 30),
    "azula DiffPIR": (azula("DiffPIR"), dict(steps=6), 6, 0),
    "azula RePaint": (azula("RePaint"), dict(steps=6), 18, 0),
    "deepinv DPS": (deepinv("DPS"), dict(steps=6), 6, 6),
    "deepinv PiGDM": (deepinv("PiGDM"), dict(steps=6), 6, 6),
    "deepinv DiffPIR": (deepinv("DiffPIR"), dict(steps=6), 6, 0),
    "deepinv DDRM": (deepinv("DDRM"), dict(steps=6), 6, 0),
}


@pytest.fixture(params=CASES)
def method(request):
    pytest.importorskip(request.param.split()[0])
    return CASES[request.param]


def test_evaluations_are_as_documented(small, method):
    function, settings, forward, backward = method
    D = EvaluationCounter(small)
    state = last(function(D, problem(small, Mask(half_mask()), 4)[0], (4, 1, 8, 8), range(4), **settings))
    assert (state.nfe, D.forward / 4, D.backward / 4) == (forward, forward, backward)
    assert state.x_t.shape == (4, 1, 8, 8) and not state.x_t.requires_grad


def test_samples_of_a_batch_are_independent(small, method):
    function, settings, *_ = method
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)) / 4
    A = Mask(half_mask())
    run = lambda c, seeds: last(function(small, c, (len(seeds), 1, 8, 8), seeds, **settings)).x_t  # noqa: E731
    together = run(LinearConstraint(A, A(images)), [5, 6, 7])
    for i in range(3):
        assert torch.allclose(together[i], run(LinearConstraint(A, A(images[i : i + 1])), [5 + i])[0], atol=1e-4)
    assert not torch.allclose(together[0], run(LinearConstraint(A, A(images[:1])), [6])[0], atol=1e-2)


@pytest.mark.parametrize("kind", ["DPS", "PGDM", "TMPD", "MMPS", "DiffPIR", "RePaint"])
def test_azula_takes_a_rectified_flow(small, kind):
    """Whose first level has alpha = 0. Better than another image of the prior, whose residual is about 0.35."""
    pytest.importorskip("azula")
    D = GaussianDenoiser(small.mean, small.cov, FlowSchedule(scale=1000))
    constraint, *_ = problem(D, Mask(half_mask().double()), 4)
    x = last(azula(kind)(D, constraint, (4, 1, 8, 8), range(4), steps=20, dtype=torch.float64)).x_t
    assert constraint.residual(x).max() < 0.15


@pytest.mark.parametrize("A", [Mask(half_mask()), downsample((8, 8), 2), gaussian_blur((8, 8), 1.0)], ids=["mask", "down", "blur"])
def test_the_operator_s_singular_values_make_the_operator(A):
    pytest.importorskip("deepinv")
    x = torch.randn(2, 1, 8, 8)
    physics = foreign._physics(A, x.shape, 0.1, "cpu")
    assert torch.allclose(physics.A(x), A(x), atol=1e-5)
    assert torch.allclose(physics.A_adjoint(A(x)), A.adjoint(A(x)), atol=1e-5)


def test_mmps_with_enough_iterations_is_the_posterior_s_mean(small):
    """E[x0 | x_t, y] at the first level, which one step ends at; and over 500 samples of 50 steps the mean of x0 | y to 1e-2."""
    pytest.importorskip("azula")
    A, sigma_y = downsample((8, 8), 2), 0.05
    constraint, mean, cov = problem(small, A, 3, sigma_y)
    arguments = dict(dtype=torch.float64, sigma_y=sigma_y)
    found = last(azula("MMPS")(small, constraint, (3, 1, 8, 8), range(3), steps=1, iterations=20, **arguments)).x_t.flatten(1)
    _, alpha, sigma = small.schedule.level(999)
    noise = torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)])
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(64).double())  # y first, then x_t
    assert (found - (mean + (noise - alpha * mean) @ gain.T)).abs().max() < 1e-3

    constraint, mean, cov = problem(small, A, 500, sigma_y)
    settings = dict(steps=50, iterations=4, **arguments)
    x = last(azula("MMPS")(small, constraint, (500, 1, 8, 8), range(500), **settings)).x_t.flatten(1)
    assert (x.mean(0) - mean).square().mean().sqrt() < 1e-2
    assert 0.6 < x.var(0).mean() / cov.diagonal().mean() < 0.95  # too small by the last steps: 0.91 with 400 of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_azula_s_dps_is_ours(small, dtype):
    """Two implementations, the same noise: the same samples, through a decoder too."""
    pytest.importorskip("azula")
    constraint, *_ = problem(small, downsample((8, 8), 2), 4, dtype=dtype)
    for c in (constraint, DecodedConstraint(lambda x: x + 0.1 * x**3, constraint.A, constraint.y)):
        a, b = (last(f(small, c, (4, 1, 8, 8), range(4), steps=20, dtype=dtype)).x_t for f in (azula("DPS"), dps))
        assert (a - b).abs().max() < (1e-3 if dtype == torch.float32 else 1e-8)


# The bias without noise, 200 samples: root mean square error of the unknown half's mean (the prior's is 0.25, the standard error
# 0.014), its variance over the posterior's, and the residual.
BIAS = {
    "azula DPS: misses what is known exactly": (azula("DPS"), 200, (0.0, 0.08), (0.75, 1.1), (0.03, 0.15)),
    "azula PGDM": (azula("PGDM"), 100, (0.0, 0.05), (0.75, 1.05), (0.0, 0.02)),
    "azula TMPD": (azula("TMPD"), 100, (0.0, 0.05), (0.7, 1.0), (0.0, 0.03)),
    "azula MMPS": (azula("MMPS"), 100, (0.0, 0.05), (0.7, 1.0), (0.0, 0.02)),
    "azula DiffPIR": (azula("DiffPIR"), 100, (0.0, 0.08), (0.7, 1.0), (0.0, 2e-3)),
    "azula RePaint": (azula("RePaint"), 50, (0.0, 0.08), (0.7, 1.0), (0.0, 1e-6)),
    "deepinv DPS": (deepinv("DPS"), 200, (0.0, 0.08), (0.8, 1.1), (0.0, 0.02)),
    "deepinv PiGDM": (deepinv("PiGDM"), 100, (0.0, 0.08), (0.7, 1.0), (0.0, 0.03)),
    "deepinv DiffPIR": (deepinv("DiffPIR"), 100, (0.0, 0.08), (0.8, 1.1), (0.0, 0.02)),
    "deepinv DDRM: halves the variance of its noise": (deepinv("DDRM"), 100, (0.0, 0.08), (0.25, 0.6), (0.0, 0.03)),
}


@pytest.mark.parametrize("name", BIAS)
def test_bias_on_a_gaussian(small, name):
    pytest.importorskip(name.split()[0])
    function, steps, *bounds = BIAS[name]
    constraint, mean, cov = problem(small, Mask(half_mask().double()), 200)
    x = last(function(small, constraint, (200, 1, 8, 8), range(200), steps=steps, dtype=torch.float64)).x_t
    found = x.flatten(1)[:, UNKNOWN]
    figures = ((found.mean(0) - mean[UNKNOWN]).square().mean().sqrt(), found.var(0).mean() / cov.diagonal()[UNKNOWN].mean(),
                constraint(x)[1].mean())  # fmt: skip
    for value, (low, high) in zip(figures, bounds, strict=True):
        assert low <= value <= high, [m.item() for m in figures]


def test_deepinv_s_default_guidance_of_dps_hardly_guides(small):
    pytest.importorskip("deepinv")
    constraint, *_ = problem(small, Mask(half_mask().double()), 50)
    residual = lambda **settings: last(deepinv("DPS")(small, constraint, (50, 1, 8, 8), range(50), 100, **settings)).residual.mean()  # noqa: E731
    assert residual(guidance="norm") > 0.2 > 10 * residual()
