"""Layer inference: EM against formulas and known layers, completions, and compositions with their truth."""

import math

import pytest
import torch

from ldm import layers
from ldm.checkpoints import load_model
from ldm.data.compositions import compositions, opaque
from ldm.data.emoji import sample_emoji
from ldm.denoisers import LatentDenoiser
from ldm.layers import colour_mask, complete, discs, finished, infer_layers, iou, mixture_mask, otsu_mask


def two_layers(seed=0, b=2, n=32, noise=(0.1, 0.3)):
    """(x, mask, means, variances) of two random layers, seen through a mask with noise of its own for each layer."""
    g = torch.Generator().manual_seed(seed)
    means = torch.rand(2, b, 3, n, n, generator=g) * 2 - 1
    mask = discs(range(seed, seed + b), (n, n))
    layer = means + torch.randn(means.shape, generator=g) * torch.tensor(noise).view(2, 1, 1, 1, 1)
    return mask * layer[0] + (1 - mask) * layer[1], mask, means, torch.full_like(means, 0.2**2)


def test_one_step_is_the_posterior_of_two_gaussians():
    x, _, means, _ = two_layers()
    variances, prior = torch.rand(means.shape) + 0.1, torch.rand(2, 1, 32, 32).clamp(0.1, 0.9)
    p, q = (torch.distributions.Normal(means[k], variances[k].sqrt()).log_prob(x).sum(1, keepdim=True).exp() for k in (0, 1))
    for outliers in (0.0, 0.1):
        m, likelihood = mixture_mask(x, means, variances, prior, outliers=outliers, steps=1)
        f, g = ((1 - outliers) * density + outliers / 8 for density in (p, q))
        both = prior * f + (1 - prior) * g
        assert torch.allclose(m, prior * f / both, atol=1e-5)
        assert torch.allclose(likelihood, both.log().mean((1, 2, 3)), atol=1e-4)


def test_em_recovers_the_mask_and_the_likelihood_never_falls():
    x, mask, means, variances = two_layers()
    prior = torch.full((1, 1, 32, 32), 0.5)
    runs = [mixture_mask(x, means, variances, prior, outliers=0.0, steps=steps) for steps in (1, 2, 3, 6, 20)]
    values = torch.stack([likelihood for _, likelihood in runs])
    assert (values.diff(dim=0) > -1e-5).all() and (values[-1] > values[0] + 0.1).all()
    assert ((runs[-1][0] - mask).abs().mean((1, 2, 3)) < 0.02).all() and (iou(runs[-1][0], mask) > 0.9).all()
    alone = mixture_mask(x[1:], means[:, 1:], variances[:, 1:], prior, outliers=0.0, steps=20)[0]
    assert torch.allclose(alone, runs[-1][0][1:], atol=1e-5)


def test_the_area_is_met_and_a_window_makes_smooth_masks():
    x, mask, means, variances = two_layers(noise=(0.4, 0.4))
    prior = torch.full((1, 1, 32, 32), 0.3)
    for area in (0.05, 0.4):
        assert torch.allclose(mixture_mask(x, means, variances, prior, area)[0].mean((1, 2, 3)), torch.tensor(area), atol=1e-4)
    plain, smooth = (mixture_mask(x, means, variances, prior, window=window)[0] for window in (1, 5))
    step = lambda m: (m[..., 1:] - m[..., :-1]).abs().mean()  # noqa: E731
    assert step(smooth) < 0.5 * step(plain) and (iou(smooth, mask) > 0.6).all()
    for wrong, message in [
        (dict(window=2), "window = 2: give an odd number"),
        (dict(outliers=1.0), "outliers = 1.0: give a part"),
        (dict(area=1.0), "area = 1.0: give a part of the image"),
        (dict(prior=prior * 0), "probabilities above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixture_mask(**dict(x=x, means=means, variances=variances, prior=prior) | wrong)


def test_each_pixel_is_hidden_from_half_of_the_completions():
    masks = layers._halves(3, 6, 8, (64, 44))
    assert masks.shape == (6, 1, 64, 44) and torch.equal(masks.sum(0), torch.full((1, 64, 44), 3.0))
    assert (masks[..., :8, :8] == masks[..., :1, :1]).all() and not torch.equal(masks[0], masks[2])


def test_where_completions_are_the_true_layers_the_mask_is_found(monkeypatch):
    """Of two patterned layers, from any start; a disc of colour on white is the foreground where it has something."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    truth = discs([4, 4], (64, 64))
    fg = torch.where(truth > 0, torch.stack([0.5 + 0.4 * x, -y, x * 0 - 0.5]), torch.ones(()))
    bg = torch.stack([-0.5 - 0.4 * x, x * y, y]).expand(2, -1, -1, -1)
    image = truth * fg + (1 - truth) * bg
    calls = []

    def true_layers(model, D, image, known, seeds, evaluations):
        calls.append((len(image), len(set(seeds))))
        n, g = len(image) // 2, torch.Generator().manual_seed(len(calls))
        drawn = torch.cat([fg[:1].expand(n, -1, -1, -1), bg[:1].expand(n, -1, -1, -1)])
        return (drawn + 0.05 * torch.randn(drawn.shape, generator=g)).clamp(-1, 1)

    monkeypatch.setattr(layers, "complete", true_layers)
    *_, found = infer_layers(None, None, image, [0, 1], rounds=2, area=None, window=3)
    assert calls == [(16, 16)] * 2 and (iou(found.mask, truth) > 0.9).all()
    done = finished(None, None, image, found, [0, 1])
    assert (done.recomposed - image).square().mean() < 0.01
    for count, n in ((2, 3), (1, 4)):
        with pytest.raises(ValueError, match=f"{count} seeds for 2 images and {n} completions"):
            next(infer_layers(None, None, image, range(count), completions=n))


def test_a_completion_keeps_what_is_known_and_may_know_nothing():
    model = load_model("tiny", device="cpu")
    image, known = sample_emoji()[0][[9, 9]], torch.zeros(2, 1, 64, 64)
    known[0, ..., :32] = 1
    found = complete(model, LatentDenoiser(model, ""), image, known, [0, 0], 5)
    assert found.shape == image.shape and found.abs().max() <= 1
    left, right = ((found - image)[0, :, :, part].square().mean().sqrt() for part in (slice(32), slice(32, None)))
    assert left < 0.15 < right and not torch.allclose(found[0], found[1], atol=0.5)


def test_compositions_are_what_their_layers_make():
    c = compositions([1, 8])
    assert torch.equal(c.image, c.mask * c.foreground + (1 - c.mask) * c.background) and c.image.shape == (2, 3, 64, 64)
    assert (c.foreground[(c.mask == 0).expand(-1, 3, -1, -1)] == 1).all() and (0.08 < c.mask.mean((1, 2, 3))).all()
    assert torch.equal(c.background[0], sample_emoji()[0][20]) and torch.equal(compositions([8]).image[0], c.image[1])
    ring = torch.ones(1, 3, 9, 9)
    ring[..., 2:7, 2:7], ring[..., 3:6, 3:6] = -1, 1
    assert opaque(ring).sum() == 25  # the white inside belongs to it
    with pytest.raises(ValueError, match="numbers = \\[32\\]"):
        compositions([32])


def test_masks_of_brightness_and_colour():
    image = torch.full((1, 3, 20, 20), 0.8)
    image[..., 5:10, 4:14] = torch.tensor([-0.9, -0.5, -0.9]).view(3, 1, 1)
    wanted = (image[:, 1:2] < 0).float()
    assert torch.equal(otsu_mask(image), wanted) and torch.equal(otsu_mask(-image), wanted)
    image[..., :2, :] = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1)
    assert torch.equal(colour_mask(image, area=50 / 400, clusters=3), wanted) and iou(wanted, wanted) == 1
    assert math.isclose(iou(torch.ones_like(wanted), wanted).item(), 50 / 400, abs_tol=1e-6)
