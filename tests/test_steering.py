"""Constraints combined, and soft masks: against closed forms on a Gaussian."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.baselines import dps, repaint
from ldm.constraints import DecodedConstraint, LinearConstraint, LossConstraint, inpainting, latent_inpainting
from ldm.correction import correction
from ldm.fast_sampler import fast_sampler
from ldm.inpainting import blend, fit
from ldm.masks import make_mask
from ldm.newton_sampler import newton_sampler, sample
from ldm.nonlinear import clipped, measurement
from ldm.operators import Mask, downsample, gaussian_blur
from ldm.sampling import seeded_noise
from ldm.schedules import CLEAN


def images(n=3, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def left(known=5):
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    mask[..., :known] = 1
    return mask


def matrix(A):
    """A on images [1, 8, 8], dense."""
    return torch.stack([A(e.view(1, 1, 8, 8)).flatten() for e in torch.eye(64, dtype=torch.float64)], 1)


def posterior(gaussian, precision, toward, prior=None):
    """Mean [64] and covariance of x_0, of the prior (mean, covariance), given measurements: precision = sum of A^T A / variance,
    toward = sum of A^T y / variance."""
    mean, cov = (gaussian.mean, gaussian.cov) if prior is None else prior
    inverse = torch.linalg.inv(cov)
    cov = torch.linalg.inv(inverse + precision)
    return cov @ (inverse @ mean + toward), cov


def given(gaussian, x_t, t):
    """Mean and covariance of x_0 given x_t [1, 1, 8, 8]."""
    _, alpha, sigma = gaussian.schedule.level(t)
    return posterior(gaussian, torch.eye(64) * (alpha / sigma) ** 2, alpha / sigma**2 * x_t.flatten())


# ---- sums

WEIGHTS = (1.0, 0.5, 2.0)


@pytest.fixture
def three():
    """Linear constraints on three images."""
    operators = (Mask(left()), downsample((8, 8), 2), gaussian_blur((8, 8), 0.8))
    return [LinearConstraint(A, A(images(seed=i))) for i, A in enumerate(operators)]


def test_a_sum_of_linear_constraints_is_the_stacked_operator(three):
    a, b, c = three
    total, x = a + 0.5 * b + c * 2, images(seed=7)
    e, residual = total(x)
    assert torch.allclose(e, sum(w * part(x)[0] for w, part in zip(WEIGHTS, three, strict=True)))
    assert tuple(w for w, _ in total.terms) == WEIGHTS and total.linear and total.batch == 3
    assert all(torch.equal(part.residual(x), r) for part, r in zip(three, total.residuals(x), strict=True))
    rows = torch.cat([w**0.5 * matrix(part.A) for w, part in zip(WEIGHTS, three, strict=True)])
    assert torch.allclose(matrix(total.A), rows)
    r = total.difference(x)
    assert torch.allclose(total.A.adjoint(r).flatten(1), r @ rows)
    assert torch.allclose(residual, (r.square().sum(1) / (5 * 8 + 16 + 64)).sqrt()) and torch.equal(residual, total.residual(x))
    assert torch.allclose((0.5 * (a + b))(x)[0], (0.5 * a + 0.5 * b)(x)[0]) and torch.equal(sum([a, b])(x)[0], (a + b)(x)[0])
    assert torch.allclose((a + 0 * b).residual(x), a.residual(x))


def test_the_correction_of_a_sum_is_the_posterior_mean(gaussian, three):
    """Term i counts with the noise sigma_y / sqrt(w_i)."""
    sigma_y, t = 0.2, 400
    total = sum(w * part for w, part in zip(WEIGHTS, three, strict=True))
    _, alpha, sigma = gaussian.schedule.level(t)
    x_t = alpha * images(seed=3) + sigma * seeded_noise((3, 1, 8, 8), range(3), dtype=torch.float64)()
    x0 = gaussian(x_t, t)
    V = lambda v: (sigma**2 / alpha * v.flatten(1) @ gaussian.jacobian(t).T).view_as(v)  # noqa: E731
    d = correction(total, x0, V, 60, sigma_y)
    dense = [matrix(part.A) for part in three]
    precision = sum(w / sigma_y**2 * A.T @ A for w, A in zip(WEIGHTS, dense, strict=True))
    for i in range(3):
        rows = zip(WEIGHTS, dense, three, strict=True)
        toward = sum(w / sigma_y**2 * A.T @ part.y[i].flatten() for w, A, part in rows)
        mean, _ = posterior(gaussian, precision, toward, given(gaussian, x_t[i], t))
        assert ((x0 + d)[i].flatten() - mean).abs().max() < 1e-4


def test_sums_of_any_constraints_have_the_weighted_error(three):
    """With non-linear ones there is a stacked operator still; with a loss only e."""
    a, b, _ = three
    x, hdr = images(seed=7), measurement(clipped(2.0), images(seed=2))
    decoded = DecodedConstraint(torch.tanh, downsample((8, 8), 2), b.y)
    total = a + 0.5 * hdr + 3 * decoded
    A, r = total.linearised(x)
    e, residual = total(x)
    parts = [(1, a), (0.5, hdr), (3, decoded)]
    assert not total.linear and total.through_decoder and total.backward_passes == decoded.backward_passes > 0
    assert torch.allclose(e, sum(w * c(x)[0] for w, c in parts)) and torch.allclose(A.adjoint(r), e)
    assert torch.allclose(residual, sum(w * c.residual(x) for w, c in parts)) and torch.equal(total.residual(x), residual)
    loss = LossConstraint(lambda x: x.square().flatten(1).sum(1))
    with_loss = a + 0.25 * loss
    assert torch.allclose(with_loss(x)[0], a(x)[0] - 0.5 * x) and with_loss.linearised is None
    assert torch.allclose((a + (lambda x: (x, x[:, 0, 0, 0])))(x)[0], a(x)[0] + x)


@pytest.mark.parametrize("sampler", [newton_sampler, fast_sampler])
def test_both_samplers_meet_both_wishes(gaussian, three, sampler):
    """Half of an image, and the coarse whole of it: both residuals fall, each sample as it is alone."""
    truth = images()
    a, b = (LinearConstraint(A, A(truth)) for A in (Mask(left()), downsample((8, 8), 2)))
    last = [state for state in sampler(gaussian, a + 0.5 * b, truth.shape, range(3), dtype=torch.float64)][-1]
    free = sample(gaussian, None, truth.shape, range(3), dtype=torch.float64)
    for met, before in zip((a + b).residuals(last.x0), (a + b).residuals(free.x0), strict=True):
        assert (met < 0.3 * before).all()
    one = [LinearConstraint(c.A, c.y[1:2]) for c in (a, b)]
    alone = sample(gaussian, one[0] + 0.5 * one[1], (1, 1, 8, 8), [1], sampler=sampler, dtype=torch.float64)
    assert torch.allclose(alone.x_t[0], last.x_t[1], atol=1e-6)


def test_other_methods_take_sums_of_linear_constraints(gaussian, three):
    a, b, _ = three
    *_, state = dps(gaussian, a + b, (3, 1, 8, 8), range(3), steps=5, dtype=torch.float64)
    assert torch.isfinite(state.x_t).all()


def test_sums_that_make_no_sense_are_one_sentence(three):
    a, *_ = three
    two = LinearConstraint(a.A, a.y[:2])
    with pytest.raises(ValueError, match="constraints for 3 and 2 samples are added: give all of them one batch, or 1"):
        a + two
    assert (a + LinearConstraint(a.A, a.y[:1]))(images())[0].shape == (3, 1, 8, 8)
    for weight in (-1, float("nan"), float("inf"), "2", None):
        with pytest.raises(ValueError, match="weight = .* of a constraint: give a number >= 0"):
            weight * a
    with pytest.raises(TypeError):
        a + 1


# ---- soft masks


@pytest.fixture
def soft(gaussian):
    """An image, weights from 0 to 1, and the posterior's mean and covariance given image + s n, s^2 = (1 - w) / w."""
    image = (gaussian.mean + torch.linalg.cholesky(gaussian.cov) @ images(1, 1).flatten()).view(1, 1, 8, 8)
    weights = torch.linspace(0.02, 0.98, 8, dtype=torch.float64).repeat(8, 1)[None, None]
    weights[..., 0, :] = 0
    return image, weights, torch.diag((weights / (1 - weights)).flatten())


def soft_constraint(image, weights, n=1):
    A = Mask(weights, soft=True)
    return LinearConstraint(A, A(image.expand(n, -1, -1, -1)))


def many(gaussian, constraint, **settings):
    """1,000 samples, whose noise is one sequence of random numbers."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(1000, 1, 8, 8, generator=generator, dtype=torch.float64)  # noqa: E731
    return sample(gaussian, constraint, (1000, 1, 8, 8), noise=noise, dtype=torch.float64, **settings).x_t


def test_weights_are_noise_levels_of_the_posterior(gaussian, soft):
    image, weights, precision = soft
    constraint, t = soft_constraint(image, weights), 400
    _, alpha, sigma = gaussian.schedule.level(t)
    x_t = alpha * images(1, 5) + sigma * images(1, 6)
    x0 = gaussian(x_t, t)
    V = lambda v: (sigma**2 / alpha * v.flatten(1) @ gaussian.jacobian(t).T).view_as(v)  # noqa: E731
    mean, _ = posterior(gaussian, precision, precision @ image.flatten(), given(gaussian, x_t, t))
    assert ((x0 + correction(constraint, x0, V, 60)).flatten() - mean).abs().max() < 1e-4
    e, residual = constraint(x0)
    assert torch.allclose(e, weights * (image - x0))
    assert torch.allclose(residual, (weights * (image - x0) ** 2).sum().div((weights > 0).sum()).sqrt())
    both = constraint + 2 * LinearConstraint(downsample((8, 8), 2), downsample((8, 8), 2)(image))
    assert both.noisy and both.A.variance[0, :64].equal(1 - weights.flatten()) and not both.A.variance[0, 64:].any()


def test_fast_samples_with_soft_masks_have_the_posterior_s_mean(gaussian, soft):
    """Over 1,000 samples in 24 steps; hard weights are exact."""
    image, weights, precision = soft
    x = many(gaussian, soft_constraint(image, weights, 1000), sampler=fast_sampler, vectors=4)
    mean, _ = posterior(gaussian, precision, precision @ image.flatten())
    error = x.flatten(1).mean(0) - mean
    assert error.square().mean().sqrt() < 0.06 < 0.1 * (gaussian.mean - mean).abs().max()
    weights[..., -1, :] = 1
    state = sample(gaussian, soft_constraint(image, weights), (1, 1, 8, 8), [0], sampler=fast_sampler, dtype=torch.float64)
    assert (state.x_t - image)[..., -1, :].abs().max() < 1e-6 < (state.x_t - image)[..., -2, :].abs().max()


def test_newton_samples_with_soft_masks_have_the_mean_of_independent_pixels(gaussian, soft):
    """White noise of unit variance as prior: the mean is w image + (1 - w) mean, over 1,000 samples of 100 steps, at eta = 1."""
    image, weights, _ = soft
    gaussian.cov = torch.eye(64, dtype=torch.float64)
    constraint, mean = soft_constraint(image, weights, 1000), weights * image + (1 - weights) * gaussian.mean.view(1, 1, 8, 8)
    x = many(gaussian, constraint, steps=100, newton_steps=1, eta=1.0)
    assert (x.mean(0) - mean).square().mean().sqrt() < 0.06
    x = many(gaussian, constraint, sampler=repaint, seeds=None, steps=100, resamples=1)
    assert (x.mean(0) - mean).square().mean().sqrt() < 0.06


def test_a_soft_mask_of_zeros_and_ones_is_the_hard_one(gaussian):
    image = images(1)
    for sampler in (newton_sampler, fast_sampler):
        hard, soft = (
            sample(gaussian, inpainting(image, left(), soft=s), image.shape, [0], 4, sampler=sampler, dtype=torch.float64)
            for s in (False, True)
        )
        assert torch.equal(hard.x_t, soft.x_t)


def test_what_a_soft_mask_holds_falls_with_the_noise(gaussian):
    weights = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0, 1, 1, 1], dtype=torch.float64).expand(1, 1, 8, 8)
    constraint = inpainting(images(1), weights, soft=True)
    held = [constraint.at(level).A.mask[0, 0, 0].sum().item() for level in [*gaussian.schedule.levels(20)[1:-1], CLEAN]]
    assert held[0] == 7 and held[-1] == 4 and held == sorted(held, reverse=True) and {5, 6} <= set(held)
    hard = inpainting(images(1), left())
    assert hard.at(CLEAN) is hard and torch.equal(constraint.at(CLEAN).y, images(1) * (weights == 1))
    total = constraint + hard
    assert total.at(CLEAN).terms[1][1] is hard and not total.at(CLEAN).noisy and (hard + hard).at(CLEAN).linear


def test_soft_masks_of_files_keep_their_values():
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    mask = make_mask(Image.fromarray(ramp), (8, 32), soft=True)
    expected = 1 - torch.from_numpy(ramp).float() / 255
    expected[expected >= 0.99], expected[expected <= 0.01] = 1, 0
    assert torch.allclose(mask[0, 0], expected)
    assert torch.allclose(make_mask(Image.fromarray(ramp), (8, 32), soft=True, invert=True), 1 - mask, atol=1e-6)
    image = torch.rand(1, 3, 8, 32)
    out = blend(-image, image, mask)
    assert torch.equal(out, torch.where(mask == 1, image, -image))
    assert torch.equal(blend(-image, image, mask, poisson=True), blend(-image, image, (mask == 1).float(), poisson=True))
    _, smaller, _ = fit(image, mask, 4, 4)
    assert torch.allclose(smaller[0, 0, 1:3, 4:12], mask[0, 0].view(4, 2, 16, 2).mean((1, 3))[1:3, 4:12], atol=0.02)


def test_soft_masks_in_latent_space_hide_only_the_hole():
    """The encoder sees all that has a weight above 0; a latent pixel has the least of its pixels' weights."""

    class Codec:
        def encode(self, x):
            self.seen = x
            return torch.nn.functional.avg_pool2d(x, 4)

    codec, image = Codec(), torch.rand(1, 3, 16, 16)
    weights = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    constraint = latent_inpainting(codec, image, weights, soft=True)
    assert torch.equal(codec.seen[..., 1:], image[..., 1:]) and not torch.equal(codec.seen[..., 0], image[..., 0])
    assert torch.allclose(constraint.A.mask.square()[0, 0, 0], weights[0, 0, 0, ::4], atol=1e-6)
    with pytest.raises(ValueError, match="values other than 0 .unknown. and 1"):
        latent_inpainting(codec, image, weights)
    with pytest.raises(ValueError, match="mask has values outside of 0"):
        inpainting(image, weights * 2, soft=True)
    total = constraint + LossConstraint(lambda x: x.flatten(1).sum(1))
    with pytest.raises(ValueError, match="a soft mask: this constraint has no A to weigh the noise with"):
        fast_sampler(None, total, (1, 3, 4, 4), [0])
