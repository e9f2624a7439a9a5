"""The other methods: their costs by formula, their contracts, and on a Gaussian, whose posterior is known, their bias."""

from itertools import pairwise

import pytest
import torch
from common import draw, half_mask, known, last, posterior, psld_on_pixels, smooth_gaussian, tiny_unet

from ldm.baselines import ddnm, diffpir, dps, gradient_steps, latino, mpgd, repaint
from ldm.constraints import DecodedConstraint, LinearConstraint, LossConstraint
from ldm.denoisers import Denoiser
from ldm.newer_baselines import daps, flair, flowdps, pnp_flow, resample, sitcom
from ldm.newton_sampler import sample
from ldm.operators import Mask, box_average, downsample, measure
from ldm.sampling import DenoiserLike, seeded_noise
from ldm.schedules import FlowSchedule

SHAPE = (8, 1, 8, 8)
UNKNOWN = torch.arange(64).view(8, 8)[:, 4:].flatten()


# method, settings for few steps, forward and backward evaluations of D
CASES = {
    "dps": (dps, dict(steps=6), 6, 6),
    "gradient steps": (gradient_steps, dict(steps=3, gradient_steps=2), 9, 6),
    "mpgd": (mpgd, dict(steps=6), 6, 0),
    "ddnm": (ddnm, dict(steps=6), 6, 0),
    "psld": (psld_on_pixels, dict(steps=6), 6, 6),
    "repaint": (repaint, dict(steps=4, resamples=3), 10, 0),
    "diffpir": (diffpir, dict(steps=6), 6, 0),
    "latino": (latino, dict(steps=6), 6, 0),
    "daps": (daps, dict(steps=3, ode_steps=2), 6, 0),
    "resample": (resample, dict(steps=6, every=2), 6, 0),
    "sitcom": (sitcom, dict(steps=3, gradient_steps=4), 15, 12),
    "pnp-flow": (pnp_flow, dict(steps=4, samples=3), 10, 0),
    "flowdps": (flowdps, dict(steps=6), 6, 0),
    "flair": (flair, dict(steps=6), 6, 0),
}
FLOWS = (pnp_flow, flowdps, flair)


@pytest.fixture(params=CASES)
def method(request):
    return CASES[request.param]


@pytest.fixture
def prior(method, gaussian):
    """The Gaussian, of a rectified flow for the methods that need one."""
    return smooth_gaussian(FlowSchedule(scale=1000)) if method[0] in FLOWS else gaussian


class Counting(DenoiserLike):
    """D that counts its forward and backward evaluations."""

    def __init__(self, D):
        self.D, self.schedule, self.forward, self.backward = D, D.schedule, 0, 0

    def __call__(self, x_t, t):
        self.forward += 1
        x0 = self.D(x_t, t)
        if x0.requires_grad:
            x0.register_hook(self.count)
        return x0

    def count(self, gradient):
        self.backward += 1


def test_evaluations_are_as_documented(prior, method):
    function, settings, forward, backward = method
    D = Counting(prior)
    states = list(function(D, known(draw(prior, 8), half_mask()), SHAPE, range(8), **settings))
    assert (states[-1].nfe, D.forward, D.backward) == (forward, forward, backward)
    assert [s.step for s in states] == list(range(1, settings["steps"] + 1))
    assert not states[-1].x_t.requires_grad and states[-1].residual.shape == (8,) and states[-1].x_t.shape == SHAPE


def test_samples_of_a_batch_are_independent(prior, method):
    function, settings, *_ = method
    images, masks = draw(prior, 8).double(), (torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    masks[5] = 0  # nothing known
    D = Denoiser(tiny_unet().double(), prior.schedule, "velocity" if function in FLOWS else "v")
    together = last(function(D, known(images, masks), SHAPE, range(8), dtype=torch.float64, **settings))
    assert torch.isfinite(together.x_t).all()
    for i in (0, 5, 7):
        one = known(images[i : i + 1], masks[i : i + 1])
        alone = last(function(D, one, (1, 1, 8, 8), [i], dtype=torch.float64, **settings))
        assert (alone.x_t - together.x_t[i]).abs().max() < 1e-6


def test_same_seed_same_result_other_seed_other_result(prior, method):
    function, settings, *_ = method
    constraint = known(draw(prior, 8), half_mask())
    a, b, c = (last(function(prior, constraint, SHAPE, s, **settings)).x_t for s in (range(8), range(8), range(1, 9)))
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_gradient_steps_are_newton_steps_where_J_is_symmetric(gaussian):
    """The Gaussian's J is: both loops have to take the same steps, the one by back-propagation, the other by differences."""
    constraint = known(draw(gaussian, 8).double(), half_mask())
    settings = dict(steps=6, dtype=torch.float64)
    a = last(gradient_steps(gaussian, constraint, SHAPE, range(8), gradient_steps=3, **settings)).x_t
    b = sample(gaussian, constraint, SHAPE, range(8), newton_steps=3, **settings).x_t
    assert (a - b).abs().max() < 1e-6


def test_gradient_steps_take_any_constraint(gaussian):
    loss = lambda x0: (x0.mean((1, 2, 3)) - 1).square()  # noqa: E731
    x = last(gradient_steps(gaussian, LossConstraint(loss), SHAPE, range(8))).x_t
    assert loss(x).mean() < 0.2 * loss(sample(gaussian, None, SHAPE, range(8)).x_t).mean()


def test_mpgd_takes_a_loss_in_steps_of_its_scale(gaussian):
    """x0 is D(x_t) moved by `scale` in |.|_inf along -grad loss; the network runs forward only, and the loss falls."""
    target = draw(gaussian, 8)
    loss = lambda x0: (x0 - target).square().mean((1, 2, 3))  # noqa: E731
    D, x_t = Counting(gaussian), seeded_noise(SHAPE, range(8))()
    states = list(mpgd(D, LossConstraint(loss), SHAPE, range(8), steps=20, scale=0.2))
    first, e = states[0].x0 - gaussian(x_t, gaussian.schedule.levels(20)[0].t), target - states[0].x0
    assert torch.allclose(first.abs().amax((1, 2, 3)), torch.full((8,), 0.2), atol=1e-4) and (first * e).flatten(1).sum(1).min() > 0
    assert (D.forward, D.backward) == (20, 0)
    assert loss(states[-1].x_t).mean() < 0.5 * loss(sample(gaussian, None, SHAPE, range(8)).x_t).mean()


@pytest.mark.parametrize("A", [Mask(half_mask()), box_average((8, 8), 2), downsample((8, 8), 4)], ids=["half", "box", "bicubic"])
@pytest.mark.parametrize("function", [ddnm, diffpir, latino])
def test_projections_meet_what_is_consistent(gaussian, function, A):
    assert last(function(gaussian, LinearConstraint(A, A(draw(gaussian, 8))), SHAPE, range(8), steps=10)).residual.max() < 5e-3


# The bias on the Gaussian with its left half known, 400 samples: settings, sigma_y, and bounds of the root mean square error of
# the unknown half's mean (the prior's is 0.4 to 0.5, the standard error 0.05), of its variance over the posterior's, and of the
# residual.
BIAS = {
    "mpgd: fits the noise": (mpgd, dict(), 0.2, (0.0, 0.2), (0.85, 1.1), (0.0, 1e-3)),
    "ddnm: nearly exact without noise": (ddnm, dict(), 0.0, (0.0, 0.2), (0.85, 1.1), (0.0, 1e-4)),
    "diffpir: mean short of the posterior's": (diffpir, dict(), 0.0, (0.15, 0.4), (0.8, 1.05), (0.0, 1e-2)),
    "dps: misses what is known exactly, variance too small": (dps, dict(steps=200), 0.0, (0.12, 0.4), (0.8, 1.05), (0.03, 0.2)),
    "dps: does not know sigma_y, fits the noise": (dps, dict(steps=200), 0.2, (0.12, 0.4), (0.8, 1.05), (0.03, 0.15)),
    "repaint: variance too small": (repaint, dict(steps=50, resamples=5), 0.0, (0.05, 0.3), (0.7, 0.95), (0.0, 1e-6)),
    "gradient steps: overshoots the mean": (gradient_steps, dict(), 0.0, (0.3, 0.6), (0.65, 0.9), (0.005, 0.06)),
}


@pytest.mark.parametrize("name", BIAS)
def test_bias_on_a_gaussian(gaussian, name):
    function, settings, sigma_y, error, ratio, residual = BIAS[name]
    n, A = 400, Mask(half_mask().double())
    x = gaussian.mean + torch.linalg.cholesky(gaussian.cov) @ torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    y = measure(A, x.view(1, 1, 8, 8), sigma_y, [5])
    mean, cov = posterior(gaussian, A, y, sigma_y)
    constraint = LinearConstraint(A, y.expand(n, -1, -1, -1))
    settings = settings | (dict(sigma_y=sigma_y) if function in (ddnm, diffpir) else {})
    x_t = last(function(gaussian, constraint, (n, 1, 8, 8), range(n), dtype=torch.float64, **settings)).x_t
    found = x_t.flatten(1)[:, UNKNOWN]
    figures = ((found.mean(0) - mean[UNKNOWN]).square().mean().sqrt(), found.var(0).mean() / cov.diagonal()[UNKNOWN].mean(),
                constraint(x_t)[1].mean())  # fmt: skip
    for value, (low, high) in zip(figures, (error, ratio, residual), strict=True):
        assert low <= value <= high, [m.item() for m in figures]


@pytest.mark.parametrize("decoded", [False, True], ids=["pixels", "decoded"])
def test_latino_is_a_proximal_step_and_noise_of_the_next_level_anew(gaussian, decoded):
    """Of each state: x0 encodes the minimiser, where the gradient is 0, and x_t - alpha x0 is sigma times the seeds' next noise."""
    A, sigma_y, delta, shape = box_average((8, 8), 2), 0.1, 0.7, (4, 1, 8, 8)
    images = draw(gaussian, 4).double()
    y = measure(A, images, sigma_y, range(4))
    decode, encode = (lambda z: 2 * z + 0.1, lambda x: (x - 0.1) / 2) if decoded else (lambda z: z, lambda x: x)
    constraint = DecodedConstraint(decode, A, y) if decoded else LinearConstraint(A, y)
    noise, levels = seeded_noise(shape, range(4), dtype=torch.float64), gaussian.schedule.levels(5)
    x_t, options = noise(), dict(steps=5, sigma_y=sigma_y, delta=delta, dtype=torch.float64, encode=encode if decoded else None)
    for state, (now, to) in zip(latino(gaussian, constraint, shape, range(4), **options), pairwise(levels), strict=True):
        u, x = decode(gaussian(x_t, now.t)), decode(state.x0)
        gradient = (x - u) / (delta * now.sigma**2) - A.adjoint(y - A(x)) / sigma_y**2
        assert gradient.abs().max() < 1e-6 * (A.adjoint(y) / sigma_y**2).abs().max()
        x_t = to.alpha * state.x0 + to.sigma * noise() if to.sigma else state.x0
        assert (state.x_t - x_t).abs().max() < 1e-12
        assert (state.residual - (y - A(x)).square().mean((1, 2, 3)).sqrt()).abs().max() < 1e-9
    assert state.nfe == 5 and constraint.backward_passes == 0


def test_latino_encodes_where_it_decodes(gaussian):
    A = box_average((8, 8), 2)
    for constraint, encode in ((DecodedConstraint(lambda z: z, A, A(draw(gaussian, 8))), None),
                               (LinearConstraint(A, A(draw(gaussian, 8))), lambda x: x)):  # fmt: skip
        with pytest.raises(ValueError, match="give a function with a DecodedConstraint, and none"):
            latino(gaussian, constraint, SHAPE, range(8), encode=encode)


@pytest.mark.parametrize("function, wrong, words", [
    (dps, dict(zeta=0), "zeta = 0"), (dps, dict(eta=2), "= 2"), (mpgd, dict(scale=-1), "scale = -1"),
    (mpgd, dict(steps=0), "steps = 0"), (gradient_steps, dict(lr=0), "lr = 0"), (repaint, dict(resamples=0), "resamples = 0"),
    (diffpir, dict(zeta=1.5), "= 1.5"), (latino, dict(delta=0), "delta = 0"),
])  # fmt: skip
def test_wrong_arguments_are_named_at_once(gaussian, function, wrong, words):
    with pytest.raises(ValueError, match=words):
        function(gaussian, known(draw(gaussian, 8), half_mask()), SHAPE, range(8), **wrong)


def test_repaint_takes_masks_only(gaussian):
    A = box_average((8, 8), 2)
    with pytest.raises(ValueError, match="Separable"):
        repaint(gaussian, LinearConstraint(A, A(draw(gaussian, 8))), SHAPE, range(8))


def test_ddnm_needs_a_pseudo_inverse(gaussian):
    A = Mask(half_mask()) @ box_average((8, 8), 1)
    with pytest.raises(ValueError, match="pseudo-inverse"):
        ddnm(gaussian, LinearConstraint(A, A(draw(gaussian, 8))), SHAPE, range(8))
