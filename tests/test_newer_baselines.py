"""The newer methods: of each what its paper says of it, on a Gaussian. tests/test_baselines.py has their costs and contracts."""

from itertools import pairwise

import pytest
import torch
from common import GaussianDenoiser, draw, half_mask, known, last, matrix, posterior, smooth_gaussian

from ldm.baselines import ddnm
from ldm.constraints import DecodedConstraint, LinearConstraint
from ldm.newer_baselines import daps, flair, flair_weights, flowdps, pnp_flow, resample, sitcom
from ldm.operators import Mask, box_average, downsample, measure
from ldm.sampling import seeded_noise
from ldm.schedules import CLEAN, FlowSchedule

SHAPE, DOUBLE = (4, 1, 8, 8), dict(dtype=torch.float64)


@pytest.fixture
def flow():
    return smooth_gaussian(FlowSchedule(scale=1000))


def problem(gaussian, A, sigma_y=0.0, n=4):
    return LinearConstraint(A, measure(A, draw(gaussian, n).double(), sigma_y, range(n)))


def at_one_point(gaussian, t, n):
    """The same x_t for n samples, and its level."""
    level = gaussian.schedule.level(t)
    return draw(gaussian, 1, seed=3).double().expand(n, -1, -1, -1), level


def test_daps_draws_x0_from_the_wide_gaussian_times_the_likelihood(gaussian):
    """Many short Langevin steps from D(x_t): N(x0, r^2) N(y; A x, beta^2), mean and variances, by linear algebra."""
    n, beta, A = 600, 0.3, box_average((8, 8), 2)
    x_t, level = at_one_point(gaussian, 150, n)
    y = problem(gaussian, A, n=1).y
    run = dict(levels=[level, CLEAN], start=(x_t, level), ode_steps=1, langevin_steps=150, lr=0.01, beta=beta, **DOUBLE)
    x = last(daps(gaussian, LinearConstraint(A, y.expand(n, -1, -1, -1)), x_t.shape, range(n), **run)).x_t.flatten(1)
    dense, r = matrix(A), level.sigma / level.alpha
    cov = torch.linalg.inv(torch.eye(64).double() / r**2 + dense.T @ dense / beta**2)
    mean = cov @ (gaussian(x_t[:1], 150).flatten() / r**2 + dense.T @ y.flatten() / beta**2)
    assert 0.4 < r < 0.8
    assert ((x.mean(0) - mean) / (cov.diagonal() / n).sqrt()).abs().max() < 4.5
    assert (x.var(0) / cov.diagonal()).mean() == pytest.approx(1, abs=0.04)
    measured = torch.stack([(x @ direction).var() / (direction @ cov @ direction) for direction in dense])
    assert measured.mean() == pytest.approx(1, abs=0.06)  # narrower than r, where y says something
    assert (dense[0] @ cov @ dense[0]) < 0.7 * r**2 * (dense[0] @ dense[0])


def test_daps_forgets_x_t(gaussian):
    """x_s - alpha_s x0 is sigma_s times noise of its own, the next that the seeds give; sigma / alpha goes from 100 to 0.1."""
    noise, constraint = seeded_noise(SHAPE, range(4), **DOUBLE), problem(gaussian, Mask(half_mask()))
    noise()
    states = list(daps(gaussian, constraint, SHAPE, range(4), steps=20, langevin_steps=3, **DOUBLE))
    for state in states[:-1]:
        for _ in range(3):
            noise()
        to = gaussian.schedule.level(state.to)
        assert (state.x_t - to.alpha * state.x0 - to.sigma * noise()).abs().max() < 1e-12
    ratios = [level.sigma / level.alpha for level in (gaussian.schedule.level(state.t) for state in states)]
    assert ratios[0] == pytest.approx(100, rel=0.02) and ratios[-1] == pytest.approx(0.1, rel=0.05)


def test_resample_multiplies_two_gaussians(gaussian):
    """N(alpha_s x0, sigma_s^2) N(x', tau^2) by quadrature, for one unknown pixel: mean and variance of 4,000 samples."""
    n = 4000
    x_t, now = at_one_point(gaussian, 500, n)
    to = gaussian.schedule.level(480)
    constraint = known(draw(gaussian, 1).double(), half_mask())
    run = resample(
        gaussian, constraint, x_t.shape, range(n), levels=[now, to, CLEAN], start=(x_t, now), every=1, gamma=0.7, **DOUBLE
    )
    state = next(run)
    x0, ddim = state.x0[0, 0, 3, 6], gaussian.schedule.step(x_t[:1], gaussian(x_t[:1], 500), now, to)[0, 0, 3, 6]
    tau = 0.7**0.5 * gaussian.schedule.added_noise(now, to, 1.0)
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((grid - to.alpha * x0) / to.sigma) ** 2 - 0.5 * ((grid - ddim) / tau) ** 2)
    mean = (grid * density).sum() / density.sum()
    variance = ((grid - mean) ** 2 * density).sum() / density.sum()
    found = state.x_t[:, 0, 3, 6]
    assert abs(found.mean() - mean) < 4 * (variance / n) ** 0.5 and found.var() == pytest.approx(variance.item(), rel=0.1)
    assert last(run).residual.max() < 1e-6  # hard data consistency at the end


def test_resample_is_consistent_at_every_tenth_level_after_a_third(gaussian):
    states = list(resample(gaussian, problem(gaussian, downsample((8, 8), 2)), SHAPE, range(4), steps=60, **DOUBLE))
    assert [s.step for s in states if s.residual.max() < 1e-4] == [20, 30, 40, 50, 60]


def test_sitcom_s_x0_is_an_output_of_D_near_x_t(gaussian):
    """Backward consistency: D(v, t) = x0 for a v that Adam's steps reach. A projection of x0 asks for inputs that are far away."""
    constraint, run = problem(gaussian, Mask(half_mask())), dict(steps=8, **DOUBLE)

    def farthest(states, noise):
        x_t, found = noise(), []
        for state in states:
            _, alpha, _ = gaussian.schedule.level(state.t)
            J = gaussian.jacobian(state.t)
            v = torch.linalg.solve(J, (state.x0.flatten(1) - gaussian.mean).T).T + alpha * gaussian.mean
            found.append((v - x_t.flatten(1)).abs().max().item())
            x_t = state.x_t
        return max(found[2:5])

    noise = lambda: seeded_noise(SHAPE, range(4), **DOUBLE)  # noqa: E731
    near = farthest(sitcom(gaussian, constraint, SHAPE, range(4), gradient_steps=5, lr=0.1, **run), noise())
    assert 0.1 < near < 5 * 0.1 * 1.2
    assert farthest(ddnm(gaussian, constraint, SHAPE, range(4), **run), noise()) > 10 * near


def test_sitcom_meets_y_and_stops_there(gaussian):
    """Enough Adam steps reach the tolerance; a sample that is below it keeps D(x_t), and x_s is x0 with new noise."""
    constraint = problem(gaussian, box_average((8, 8), 2))
    run = dict(steps=6, lr=0.05, **DOUBLE)
    assert last(sitcom(gaussian, constraint, SHAPE, range(4), gradient_steps=60, tolerance=0.02, **run)).residual.max() < 0.05
    draws, x_t = seeded_noise(SHAPE, range(4), **DOUBLE), seeded_noise(SHAPE, range(4), **DOUBLE)()
    draws()
    for state in sitcom(gaussian, constraint, SHAPE, range(4), gradient_steps=3, tolerance=1e9, **run):
        assert torch.equal(state.x0, gaussian(x_t, state.t))
        to = CLEAN if state.to is None else gaussian.schedule.level(state.to)
        x_t = to.alpha * state.x0 + to.sigma * draws() if to.sigma else state.x0
        assert (state.x_t - x_t).abs().max() < 1e-12


def test_sitcom_s_weight_keeps_v_at_x_t(gaussian):
    constraint, run = problem(gaussian, Mask(half_mask())), dict(steps=4, gradient_steps=20, lr=0.05, **DOUBLE)
    free, held = (last(sitcom(gaussian, constraint, SHAPE, range(4), weight=w, **run)).residual.mean() for w in (0, 100))
    assert held > 2 * free


def test_pnp_flow_s_three_steps_in_closed_form(flow):
    """Of each state: the gradient step from x0, noise of the next level, and the mean of D, of a Gaussian about D(alpha z)."""
    A, many = box_average((8, 8), 2), 300
    constraint = problem(flow, A)
    noise = seeded_noise(SHAPE, range(4), **DOUBLE)
    x_t, size = noise(), torch.linalg.matrix_norm(matrix(A), 2) ** 2
    z = None
    for state in pnp_flow(flow, constraint, SHAPE, range(4), steps=4, samples=many, power=0.3, **DOUBLE):
        if z is None:
            assert torch.equal(state.x0, flow(x_t, state.t))
        else:
            now = flow.schedule.level(state.t)
            J = flow.jacobian(state.t)
            spread = now.sigma * (J @ J.T).diagonal().sqrt().view(8, 8) / many**0.5
            assert ((state.x0 - flow(now.alpha * z, state.t)) / spread).abs().max() < 5
        if state.step < 4:
            to = flow.schedule.levels(4)[state.step]
            z = state.x0 + to.sigma**0.3 * A.adjoint(constraint.y - A(state.x0)) / size
            assert (state.x_t - to.alpha * z - to.sigma * noise()).abs().max() < 1e-5
            for _ in range(many - 1):
                noise()
    assert torch.equal(state.x_t, state.x0)


def test_flowdps_moves_x0_by_unit_gradients_and_keeps_the_noise_at_unit_variance(flow):
    """With a mask the gradient of |A^T r| is a unit vector: three steps take 3 length sqrt(N) off |r|, weighted by sigma_t."""
    constraint, length, steps = problem(flow, Mask(half_mask())), 0.004, 5
    noise = seeded_noise(SHAPE, range(4), **DOUBLE)
    x_t = noise()
    levels = flow.schedule.levels(steps)
    run = flowdps(flow, constraint, SHAPE, range(4), steps=steps, length=length, **DOUBLE)
    for state, (now, to) in zip(run, pairwise(levels), strict=True):
        x0 = flow(x_t, now.t)
        r = constraint.difference(x0)
        assert (r.flatten(1).norm(dim=1) > 3 * length * 8).all()
        moved = x0 + 3 * length * 8 * r / r.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x0, x1 = (1 - now.sigma) * x0 + now.sigma * moved, (x_t - now.alpha * x0) / now.sigma
        assert (state.x0 - x0).abs().max() < 1e-5
        if to.sigma:
            mixed = to.sigma**0.5 * x1 + (1 - to.sigma) ** 0.5 * noise()  # squares of the coefficients: 1
            assert (state.x_t - (1 - to.sigma) * x0 - to.sigma * mixed).abs().max() < 1e-5
        x_t = state.x_t
    assert torch.equal(state.x_t, state.x0)


def test_flair_s_step_is_the_one_in_velocities(flow):
    """mu + lambda (u - v), u = eps - mu the posterior's velocity, v the model's; then y exactly; x1 is the noise that D sees."""
    constraint, weights, steps = problem(flow, Mask(half_mask())), [0.1, 0.3, 0.9], 6  # the last: all the way to D
    noise = seeded_noise(SHAPE, range(4), **DOUBLE)
    x1, mu, mask = noise(), constraint.y, half_mask().double()
    for i, state in enumerate(flair(flow, constraint, SHAPE, range(4), steps=steps, weights=weights, last=0.1, **DOUBLE)):
        t = 1 - 0.9 * (i + 1) / 7
        assert flow.schedule.level(state.t).sigma == pytest.approx(t)
        eps = (1 - t) * x1 + (1 - (1 - t) ** 2) ** 0.5 * noise()
        x_t = (1 - t) * mu + t * eps
        v = (x_t - flow(x_t, state.t)) / t
        mu = mu + min(weights[round((1 - t) * 2)], t) * (eps - mu - v)
        x1 = x_t + (1 - t) * v
        mu = mask * constraint.y + (1 - mask) * mu
        assert (state.x_t - mu).abs().max() < 1e-9 and state.residual.max() < 1e-9


def test_flair_s_weights_are_the_inverse_error_of_the_velocity(flow):
    """E |v - u|^2 is the trace of Cov[x_0 | x_t] / t^2, by Tweedie Cov = t^2 J / alpha. lambda is 0.5 (w - w_0), w of mean 1."""
    at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).view(64, 2).double()
    smooth = torch.exp(-(torch.cdist(at, at) ** 2) / 32) + 1e-5 * torch.eye(
        64, dtype=torch.float64
    )  # more predictable: like images
    D = GaussianDenoiser(flow.mean, smooth, flow.schedule)
    found = torch.tensor(flair_weights(D, draw(D, 1500).double(), range(1500))).double()
    levels = [D.schedule.level(1000 * t) for t in [*(1 - i / 20 for i in range(1, 20)), 0.01]]
    errors = [smooth.trace(), *(D.jacobian(level.t).trace() / level.alpha for level in levels)]  # at t = 1: Var[x_0]
    w = 1 / torch.stack(errors)
    exact = 0.5 * (w - w[-1]).clamp_min(0) / w.mean()
    assert (found - exact).abs().max() < 0.1 * exact.max() and found[-1] == 0 and 5 < found.argmax() < 18


DECODE, ENCODE = (lambda z: 2 * z + 0.1), (lambda x: (x - 0.1) / 2)


@pytest.mark.parametrize(
    "function, settings", [(resample, dict(every=1)), (flair, {}), (flowdps, dict(length=0.2)), (sitcom, dict(lr=0.1))]
)
def test_through_a_decoder(gaussian, flow, function, settings):
    """The measurement is of the decoded image: met exactly by what projects, and better than without it by the others."""
    prior, A = flow if function in (flair, flowdps) else gaussian, box_average((8, 8), 2)
    y = A(DECODE(draw(prior, 4)))
    encode = dict(encode=ENCODE) if function in (resample, flair) else {}
    residual = last(function(prior, DecodedConstraint(DECODE, A, y), SHAPE, range(4), steps=12, **settings, **encode)).residual
    assert residual.max() < (1e-3 if encode else 0.5), residual
    assert A(DECODE(draw(prior, 4, seed=9))).sub(y).square().mean().sqrt() > 1


# The bias on the Gaussian with its left half known, 200 samples, as in test_baselines.py: bounds of the root mean square error of
# the unknown half's mean (the prior's is 0.46), of its variance over the posterior's, and of the residual.
BIAS = {
    "resample: variance too small": (resample, dict(steps=50, every=1), (0.1, 0.25), (0.35, 0.65), (0.0, 1e-6)),
    "daps: the same": (daps, dict(steps=50, ode_steps=2, langevin_steps=20), (0.1, 0.25), (0.35, 0.65), (0.0, 0.1)),
    "sitcom: the mean is off too": (sitcom, dict(), (0.3, 0.5), (0.4, 0.75), (0.0, 0.1)),
}


@pytest.mark.parametrize("name", BIAS)
def test_bias_on_a_gaussian(gaussian, name):
    function, settings, *bounds = BIAS[name]
    n, A, unknown = 200, Mask(half_mask().double()), torch.arange(64).view(8, 8)[:, 4:].flatten()
    y = A(draw(gaussian, 1).double())
    mean, cov = posterior(gaussian, A, y, 0.0)
    constraint = LinearConstraint(A, y.expand(n, -1, -1, -1))
    x_t = last(function(gaussian, constraint, (n, 1, 8, 8), range(n), **settings, **DOUBLE)).x_t
    x = x_t.flatten(1)[:, unknown]
    figures = ((x.mean(0) - mean[unknown]).square().mean().sqrt(), x.var(0).mean() / cov.diagonal()[unknown].mean(),
                constraint.residual(x_t).mean())  # fmt: skip
    for value, (low, high) in zip(figures, bounds, strict=True):
        assert low <= value <= high, [float(v) for v in figures]


@pytest.mark.parametrize("function, wrong, words", [
    (daps, dict(beta=0), "beta = 0"), (daps, dict(steps=0), "steps = 0"), (resample, dict(every=0), "every = 0"),
    (resample, dict(encode=lambda x: x), "give a function with a DecodedConstraint"), (sitcom, dict(lr=-1), "lr = -1"),
    (sitcom, dict(steps=0), "steps = 0"), (pnp_flow, dict(samples=0), "samples = 0"), (flowdps, dict(length=0), "length = 0"),
    (flair, dict(last=0), "last = 0"), (flair, dict(steps=0), "steps = 0"),
    (flair, dict(start=(torch.zeros(SHAPE), CLEAN)), "start is given: FLAIR begins at pure noise only"),
])  # fmt: skip
def test_wrong_arguments_are_named_at_once(gaussian, flow, function, wrong, words):
    prior = flow if function in (pnp_flow, flowdps, flair) else gaussian
    with pytest.raises(ValueError, match=words):
        function(prior, known(draw(prior, 4), half_mask()), SHAPE, range(4), **wrong)


@pytest.mark.parametrize("function", [pnp_flow, flowdps, flair, flair_weights])
def test_flows_only(gaussian, function):
    arguments = (
        (gaussian, draw(gaussian, 4), range(4))
        if function is flair_weights
        else (gaussian, known(draw(gaussian, 4), half_mask()), SHAPE, range(4))
    )
    with pytest.raises(ValueError, match="D has a DiffusionSchedule: this method is for rectified flows"):
        function(*arguments)
