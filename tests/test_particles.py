"""Twisted particles: exact where they should be, problems that never mix, and what is degenerate."""

import pytest
import torch
from common import OPERATORS, draw, half_mask, known, matrix, smooth_gaussian

from ldm.constraints import DecodedConstraint, FunctionConstraint, LinearConstraint, inpainting
from ldm.fast_sampler import fast_sampler, steps_for
from ldm.mixture import Mixture, sliced_wasserstein
from ldm.newton_sampler import sample
from ldm.operators import Mask, Separable, box_average, measure
from ldm.particles import resampled, trusted, twist
from ldm.sampling import seeded_noise

SHAPE = (8, 1, 8, 8)


def run(D, constraint, shape=SHAPE, seeds=None, **settings):
    return sample(D, constraint, shape, range(shape[0]) if seeds is None else seeds, sampler=fast_sampler, **settings)


def rows(A):
    """A matrix [m, d] as an operator on images [1, d, 1]."""
    return Separable(A, torch.ones(1, 1))


# ------------------------------------------------------------------------------------------------ exact where they should be


def test_the_modes_of_a_posterior_have_their_weights(schedule):
    """Three modes, of which y leaves two, at .2 and .8 of the posterior. 1,024 samples in groups of 16, 100 evaluations: the share
    to .05, and the variance of what is measured to a fifth. The form without particles is not as close."""
    prior = Mixture(torch.tensor([0.2, 0.8, 1.0]), torch.tensor([[1.0, 1.5], [1, -1.5], [-2, 0]]), 0.04)
    A, y, sigma_y, n = torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]), 0.1, 1024
    exact = prior.posterior(A, y, sigma_y)
    constraint = LinearConstraint(rows(A), y.view(1, 1, 1, 1).expand(n, -1, -1, -1))
    D, settings = prior.denoiser(schedule), dict(sigma_y=sigma_y, evaluations=100)
    x, alone = (run(D, constraint, (n, 1, 2, 1), **settings, particles=p).x_t.flatten(1) for p in (16, 1))
    assert abs(exact.weights[0] - 0.2) < 1e-3
    assert abs((x[:, 1] > 0).float().mean() - 0.2) < 0.05 < 0.08 < abs((alone[:, 1] > 0).float().mean() - 0.2)
    assert 0.8 < x[:, 0].var() / exact.cov[0, 0] < 1.2 and alone[:, 0].var() / exact.cov[0, 0] < 0.7
    truth = exact.sample(n, torch.Generator().manual_seed(0))
    assert sliced_wasserstein(x, truth) < 0.1 < 0.15 < sliced_wasserstein(alone, truth)


@pytest.mark.parametrize("name", ["box", "super-resolution"])
@pytest.mark.parametrize("sigma_y", [0.0, 0.2])
def test_on_the_whole_of_y_s_space_the_twist_is_the_gaussian_s(gaussian, name, sigma_y):
    """log N(y; A D, sigma_y^2 I + A V A^T) up to a constant, and the posterior's mean, for the Gaussian whose V is known."""
    A, (_, alpha, sigma) = OPERATORS[name], gaussian.schedule.level(500)
    V = sigma**2 / alpha * gaussian.jacobian(500)
    r = seeded_noise(A(torch.zeros(SHAPE)).shape, range(8), dtype=torch.float64)()
    m, dense = r[0].numel(), matrix(A)
    d, log_p = twist(A, r, lambda v: (v.flatten(1) @ V.T).view_as(v), m, sigma_y)
    C = dense @ V @ dense.T + sigma_y**2 * torch.eye(m)
    exact = torch.distributions.MultivariateNormal(torch.zeros(m).double(), C).log_prob(r.flatten(1))
    assert ((log_p - log_p[0]) - (exact - exact[0])).abs().max() < 1e-6 * exact.abs().max()
    assert (d.flatten(1) - torch.linalg.solve(C, r.flatten(1).T).T @ dense @ V).abs().max() < 1e-6


def test_where_J_gives_no_variance_d_stays_short():
    """C of a trained D may turn r aside. At 60 degrees r.C r is half of |C r|, at 90 and 120 there is nothing to divide by."""
    A, r = rows(torch.eye(2).double()), torch.tensor([1.0, 0.0]).double().view(1, 1, 2, 1)
    for degrees, length in ((0, 1), (60, 2), (90, 1), (120, 1)):
        a = torch.tensor(degrees * torch.pi / 180).double()
        turn = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()]).view(2, 2)
        d, log_p = twist(A, r, lambda v: (v.flatten(1) @ turn.T).view_as(v), 1, 0.0)  # noqa: B023
        assert abs(d.norm() - length) < 1e-6 and torch.isfinite(log_p)


def test_resampling_is_unbiased_and_stays_within_a_problem():
    """Mean counts over 4,000 noises are P w to 5 %, for both kinds; problems with even weights are left alone."""
    w = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.3, 0.2]])
    for last in (False, True):
        counts = torch.zeros(8)
        for seed in range(2000):
            noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
            chosen, log_w = resampled(w.log(), noise, last)
            assert ((chosen // 4) == torch.arange(8) // 4).all()
            counts += torch.bincount(chosen, minlength=8)
            if not last:
                assert torch.equal(chosen[4:], torch.arange(4, 8)) and torch.allclose(log_w[4:], w[1].log())
        assert (counts[:4] / 2000 - 4 * w[0]).abs().max() < 0.1
        assert not last or (counts[4:] / 2000 - 4 * w[1]).abs().max() < 0.1


def test_degenerate_weights():
    noise = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    for log_w, wanted in (([-1e30, 0, -1e30, -1e30], 1), ([-1e30, -1e30, -1e30, -2e29], 3)):
        for last in (False, True):
            chosen, new = resampled(torch.tensor([log_w]), noise, last)
            assert (chosen == wanted).all() and (new == 0).all()


# ------------------------------------------------------------------------------------------------ the contract


def test_one_particle_is_the_form_without(gaussian):
    constraint = known(draw(gaussian, 8), half_mask())
    assert torch.equal(run(gaussian, constraint).x_t, run(gaussian, constraint, particles=1).x_t)
    assert torch.equal(run(gaussian, constraint, evaluations=44).x_t, run(gaussian, constraint, steps=24).x_t)
    free = run(gaussian, None, particles=4).x_t  # nothing to share
    assert torch.equal(free, run(gaussian, None).x_t)


def test_problems_do_not_mix_and_seeds_repeat(gaussian):
    images, masks = draw(gaussian, 2).double(), (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    images, masks = images.repeat_interleave(4, 0), masks.repeat_interleave(4, 0)
    settings = dict(steps=6, particles=4, sigma_y=0.05, dtype=torch.float64)
    together = run(gaussian, known(images, masks), **settings).x_t
    assert torch.equal(together, run(gaussian, known(images, masks), **settings).x_t)
    for part in (slice(0, 4), slice(4, 8)):
        alone = run(gaussian, known(images[part], masks[part]), (4, 1, 8, 8), range(8)[part], **settings).x_t
        assert (alone - together[part]).abs().max() < 1e-6


@pytest.mark.parametrize("vectors", [1, 3])
def test_evaluations(gaussian, vectors):
    constraint = known(draw(gaussian, 8), half_mask())
    for n in (20, 44, 100):
        gaussian.calls = 0
        state = run(gaussian, constraint, particles=4, vectors=vectors, evaluations=n)
        assert state.nfe == gaussian.calls and n - vectors - 1 < state.nfe <= n
        assert steps_for(n, gaussian.schedule, vectors, particles=4) * (1 + vectors) >= state.nfe


def test_evaluations_that_200_steps_do_not_spend_make_vectors(gaussian):
    constraint, settings = known(draw(gaussian, 8), half_mask()), dict(particles=4, evaluations=1000)
    steps = steps_for(1000, gaussian.schedule, 4, particles=4)
    first = next(fast_sampler(gaussian, constraint, SHAPE, range(8), **settings))
    assert torch.equal(first.x_t, next(fast_sampler(gaussian, constraint, SHAPE, range(8), steps, 4, particles=4)).x_t)
    assert first.nfe == 5 and steps == 200
    assert next(fast_sampler(gaussian, constraint, SHAPE, range(8), **settings | dict(evaluations=599))).nfe == 2


@pytest.mark.parametrize("name", OPERATORS)
def test_y_without_noise_is_met(gaussian, name):
    constraint = LinearConstraint(OPERATORS[name], OPERATORS[name](draw(gaussian, 2).repeat_interleave(4, 0)))
    assert run(gaussian, constraint, steps=8, particles=4).residual.max() < (1e-2 if name == "blur" else 1e-4)


@pytest.mark.parametrize("sigma_y", [0.0, 0.1])
def test_nothing_measured_or_the_same_twice(gaussian, sigma_y):
    """A mask of zeros, no rows at all, and a row three times: finite samples, as if it stood there once."""
    settings = dict(steps=8, particles=4, sigma_y=sigma_y, dtype=torch.float64)
    x = run(gaussian, known(draw(gaussian, 8).double(), torch.zeros(8, 1, 8, 8)), **settings).x_t
    assert torch.isfinite(x).all() and x.std() > 0.5

    def vectors(A, **more):
        constraint = LinearConstraint(rows(A), A.new_full((8, 1, len(A), 1), 0.5))
        return run(smooth_gaussian(), constraint, (8, 1, 64, 1), **settings | more)

    assert torch.isfinite(vectors(torch.zeros(0, 64).double()).x_t).all()
    row = torch.ones(1, 64).double() / 8
    once, thrice = vectors(row), vectors(row.repeat(3, 1), vectors=3, sigma_y=3**0.5 * sigma_y)
    assert (once.x_t - thrice.x_t).abs().max() < 1e-3 and (once.residual.max() < 1e-4 or sigma_y)


def test_through_a_decoder_that_does_nothing(gaussian, monkeypatch):
    """As without it, but for the last step, which meets y only where A does not depend on x0."""
    monkeypatch.setattr("ldm.particles.TRUST", 100.0)
    A, images = box_average((8, 8), 2), draw(gaussian, 2).double().repeat_interleave(4, 0)
    y, settings = measure(A, images, 0.1, range(8)), dict(steps=6, particles=4, sigma_y=0.1, dtype=torch.float64)
    a, b = (run(gaussian, c, **settings).x_t for c in (LinearConstraint(A, y), DecodedConstraint(lambda x: x, A, y)))
    assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("wrong, words", [
    (dict(particles=3), "particles = 3.* batch of 8"), (dict(particles=0), "particles = 0"),
    (dict(particles=1.5), "particles = 1.5"),
    (dict(steps=5, evaluations=9), "steps = 5 and evaluations = 9"), (dict(particles=4, evaluations=5), "evaluations = 5"),
])  # fmt: skip
def test_wrong_arguments_are_named(gaussian, wrong, words):
    with pytest.raises(ValueError, match=words):
        fast_sampler(gaussian, known(draw(gaussian, 8), half_mask()), SHAPE, range(8), **wrong)


def test_a_constraint_without_A_is_refused(gaussian):
    with pytest.raises(ValueError, match="no A to weigh"):
        fast_sampler(gaussian, FunctionConstraint(lambda x0: (x0, x0.flatten(1).norm(dim=1))), SHAPE, range(8), particles=4)


def test_masks_of_other_shapes_still_name_themselves(gaussian):
    with pytest.raises(ValueError, match="mask has shape"):
        run(gaussian, LinearConstraint(Mask(torch.ones(3, 1, 8, 8)), torch.zeros(SHAPE)), particles=4)


def test_a_soft_mask_of_one_weight_is_a_noise_level(gaussian):
    """Weight w: noise of the standard deviation sqrt((1 - w) / w) on every pixel that is kept."""
    images, mask, w = draw(gaussian, 2).clamp(-1, 1).repeat_interleave(4, 0).double(), half_mask(), 0.8
    settings = dict(steps=6, particles=4, dtype=torch.float64)
    soft = run(gaussian, inpainting(images, w * mask, soft=True), **settings).x_t
    hard = run(gaussian, known(images, mask), **settings, sigma_y=((1 - w) / w) ** 0.5).x_t
    assert (soft - hard).abs().max() < 1e-4


def test_images_keep_different_ancestors(gaussian):
    """32 measured values and one vector: samples do not depend on how many share a problem, and spread as those of the form without
    particles, to a tenth. With three vectors they are weighted."""
    images = draw(gaussian, 2).repeat_interleave(16, 0)
    unknown = half_mask() == 0
    spread = lambda x: x.view(2, 16, 1, 8, 8).std(1)[:, unknown[0]].mean()  # noqa: E731
    settings = dict(shape=(32, 1, 8, 8), evaluations=44)
    alone, four, sixteen = (run(gaussian, known(images, half_mask()), **settings, particles=p).x_t for p in (1, 4, 16))
    assert torch.equal(four, sixteen) and spread(sixteen) > 0.9 * spread(alone)
    a, b = (run(gaussian, known(images, half_mask()), **settings, particles=p, vectors=3).x_t for p in (4, 16))
    assert not torch.equal(a, b)


def test_how_much_weights_count():
    """Exact, sqrt(K / m) up to 4 K values, and nothing from 16 K on; a mask's zeros are not measured."""
    r = torch.ones(6, 1, 8, 8)
    for i, m in enumerate((0, 3, 6, 12, 30, 48)):
        r[i].view(-1)[m:] = 0
    expected = torch.tensor([1, 1, 0.5**0.5, 0.5, 0.1**0.5 * 0.2, 0])
    assert (trusted(3, r) - expected).abs().max() < 1e-6
