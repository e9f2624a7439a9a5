"""A large image tied to a small one: the constraint in closed form, exactness, windows, forward passes only."""

import pytest
import torch
from common import GaussianDenoiser, NoBackward, last, smooth_gaussian

from ldm.checkpoints import load_model
from ldm.denoisers import LatentDenoiser
from ldm.fast_sampler import fast_sampler
from ldm.multiscale import Enlargement
from ldm.operators import downsample


class Pixels:
    """A model without an autoencoder, of one channel."""

    downsampling, multiple, channels = 1, 2, 1

    def encode(self, x):
        return x

    decode = encode


@pytest.fixture(scope="module")
def enlarged():
    """Of a Gaussian of 8x8 pixels in [-1, 1], tied to 4x4; and the matrix C of its covariance."""
    unit = smooth_gaussian()
    D = GaussianDenoiser(unit.mean * 0.2, unit.cov * 0.04, unit.schedule)
    x = D.mean + torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).double() @ torch.linalg.cholesky(D.cov).T
    big = Enlargement(Pixels(), torch.zeros(1, 1, 4, 4), 2)
    return D, Enlargement(Pixels(), big.A(x.view(1, 1, 8, 8)).float(), 2)


@pytest.mark.parametrize("name", ["constraint", "latent_constraint"])
def test_samples_have_the_mean_of_the_gaussian_given_the_small_image(enlarged, name):
    D, big = enlarged
    constraint = getattr(big, name)
    assert big.shape == (1, 1, 8, 8)
    operator, y = (big.A, big.small) if name == "constraint" else (constraint.A, constraint.y)
    A = operator(torch.eye(64).double().view(64, 1, 8, 8)).flatten(1).T
    gain = D.cov @ A.T @ torch.linalg.inv(A @ D.cov @ A.T)
    exact = D.mean + gain @ (y.double().flatten() - A @ D.mean)
    state = last(fast_sampler(D, constraint, (256, 1, 8, 8), range(256), steps=24))
    assert state.residual.max() < 0.02
    error = (state.x_t.double().mean(0).flatten() - exact).square().mean().sqrt()
    assert error < 0.1 * (exact - D.mean).square().mean().sqrt()


def test_the_exact_image_is_within_limits_and_has_the_small_one():
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(2, 3, 4, 6, generator=generator).mul(2).clamp(-1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    small = downsample((32, 48), 4)(large).clamp(-1, 1)  # areas of white, black and full colours
    big = Enlargement(Pixels(), small, 4)
    for x in (big.upsampled, big.exact(big.upsampled + 0.3 * torch.randn(2, 3, 32, 48, generator=generator))):
        assert x.shape == (2, 3, 32, 48) and x.abs().max() <= 1
        assert (big.A(x) - small).abs().max() < 0.03 and (big.A(x) - small).abs().mean() < 0.004
    assert torch.equal(big.exact(big.upsampled, rounds=0), big.upsampled)


def test_windows_of_the_shipped_model_forward_only():
    """96x96 pixels by windows of 64x64, tied to 48x48: the decoded image comes close, the one made exact is equal."""
    model = load_model("tiny", device="cpu")
    small = torch.full((1, 3, 48, 48), 1.0)
    small[..., 12:36, 12:36] = torch.tensor([0.8, -0.7, -0.6]).view(3, 1, 1)
    big = Enlargement(model, small, 2)
    D = LatentDenoiser(model, "red apple").tile(model.image_size, 0.25, batch=4)
    network, seen = D.network, []
    D.network = lambda x, *others: (seen.append(x.shape), NoBackward.apply(network(x, *others)))[1]
    state = last(fast_sampler(D, big.constraint, big.shape, [0], steps=4, start=big.start(D, 0.4, [0])))
    free = last(fast_sampler(D, None, big.shape, [0], steps=4, start=big.start(D, 0.4, [0])))
    with torch.inference_mode():
        image = model.decode(state.x_t)
        assert state.residual.mean() < 0.75 * big.constraint.residual(free.x_t).mean()
    assert big.constraint.backward_passes == 0 and not any(p.requires_grad for p in [image, state.x_t])
    assert all(shape[1:] == (4, 16, 16) for shape in seen)
    assert (big.A(big.exact(image)) - small).abs().mean() < 0.004


@pytest.mark.parametrize("small, factor, message", [
    (torch.zeros(1, 3, 8, 8), 1, r"factor = 1: give an integer from 2"),
    (torch.zeros(1, 3, 8, 8), 2.5, r"factor = 2.5: give an integer from 2"),
    (torch.zeros(1, 3, 7, 8), 3, r"small of 7 x 8 pixels by factor = 3 is 21 x 24: give a size of multiples of 2"),
    (torch.zeros(3, 8, 8), 2, r"small is torch.float32 \[3, 8, 8\]"),
    (torch.full((1, 3, 8, 8), 2.0), 2, r"small has values from 2 to 2"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(small, factor, message):
    with pytest.raises(ValueError, match=message):
        Enlargement(Pixels(), small, factor)


def test_a_sampler_of_another_size_is_refused(enlarged):
    D, big = enlarged
    with pytest.raises(ValueError, match=r"start has an x_t of shape \[1, 1, 8, 8\], but shape is \[1, 1, 4, 4\]"):
        fast_sampler(D, big.constraint, (1, 1, 4, 4), [0], start=big.start(D, 0.5, [0]))
