"""Measurements from deepinv as operators of ours, non-linear ones too, and our samplers as a reconstructor of deepinv's."""

import warnings

import deepinv
import pytest
import torch
from common import GaussianDenoiser, draw, last
from deepinv import physics as P
from deepinv.physics.generator import MotionBlurGenerator

from ldm.constraints import DecodedConstraint, LinearConstraint
from ldm.fast_sampler import fast_sampler
from ldm.newton_sampler import newton_sampler
from ldm.nonlinear import NonlinearConstraint, NonlinearOperator, clipped, fourier_amplitude, measurement
from ldm.operators import Mask
from ldm.physics import SamplerReconstructor, from_deepinv, measure_physics

SIZE = (3, 16, 16)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(0)


def kernel(side=9):
    return MotionBlurGenerator((side, side), rng=generator()).step(1)["filter"]


def k_space():
    return (torch.rand(1, 1, 16, 16, generator=generator()) < 0.4).float()


LINEAR = {  # name: (the physics, shape of an image)
    "motion blur, valid": (lambda: P.Blur(kernel(), padding="valid"), SIZE),
    "motion blur, reflected": (lambda: P.Blur(kernel(), padding="reflect", use_fft=True), SIZE),
    "Gaussian blur by FFT": (lambda: P.BlurFFT(SIZE, P.functional.gaussian_blur(sigma=(1.0, 1.0))), SIZE),
    "blur that varies": (lambda: P.SpaceVaryingBlur(filters=kernel()[:, :, None].repeat(1, 1, 2, 1, 1),
                                                    multipliers=torch.rand(1, 1, 2, 16, 16), padding="circular"), SIZE),
    "down-sampling": (lambda: P.Downsampling(SIZE, filter="bicubic", factor=4), SIZE),
    "down-sampling as MATLAB": (lambda: P.DownsamplingMatlab(factor=4), SIZE),
    "up-sampling": (lambda: P.Upsampling(SIZE, filter="bilinear", factor=2), (3, 8, 8)),
    "random inpainting": (lambda: P.Inpainting(SIZE, mask=0.3, rng=generator()), SIZE),
    "box inpainting": (lambda: P.Inpainting(SIZE, mask=torch.nn.functional.pad(torch.zeros(1, 8, 8), [4] * 4, value=1.0)), SIZE),
    "denoising": (lambda: P.Denoising(), SIZE),
    "compressed sensing": (lambda: P.CompressedSensing(100, SIZE, rng=generator()), SIZE),
    "single-pixel camera": (lambda: P.SinglePixelCamera(60, (1, 16, 16), rng=generator()), (1, 16, 16)),
    "structured random": (lambda: P.StructuredRandom(SIZE, SIZE, rng=generator()), SIZE),
    "MRI": (lambda: P.MRI(mask=k_space(), img_size=(2, 16, 16)), (2, 16, 16)),
    "MRI, four coils": (lambda: P.MultiCoilMRI(mask=k_space(), coil_maps=torch.view_as_complex(randn(1, 4, 16, 16, 2)),
                                               img_size=(16, 16)), (2, 16, 16)),
    "tomography": (lambda: P.Tomography(20, 16), (1, 16, 16)),
    "demosaicking": (lambda: P.Demosaicing(SIZE), SIZE),
    "colorisation": (lambda: P.Decolorize(), SIZE),
    "unmixing": (lambda: P.HyperSpectralUnmixing(E=5, C=12), (5, 16, 16)),
}  # fmt: skip
NONLINEAR = {  # name: (the operator of images in [-1, 1])
    "random phase retrieval": lambda: from_deepinv(P.RandomPhaseRetrieval(400, SIZE, rng=generator()), unit=True),
    "structured phase retrieval": lambda: from_deepinv(P.StructuredRandomPhaseRetrieval(SIZE, SIZE, n_layers=2)),
    "a function of deepinv": lambda: from_deepinv(P.Physics(A=lambda x, **kwargs: torch.exp(-x)), unit=True),
    "a function after a blur": lambda: from_deepinv(P.Physics(A=lambda x, **k: x**3) * P.Blur(kernel(), padding="circular")),
    "high dynamic range": clipped,
    "Fourier amplitudes": fourier_amplitude,
}


def made(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deepinv about its own defaults
        return LINEAR[name][0]()


@pytest.mark.parametrize("name", LINEAR)
def test_linear_physics(name):
    """<A x, y> = <x, A^T y>, and A A^+ A x = A x up to deepinv's iterations; all the same inside inference mode."""
    physics, shape = made(name), LINEAR[name][1]
    A, x = from_deepinv(physics), randn(2, *shape)
    y = A(x)
    v = randn(*y.shape, seed=1)
    assert abs((y * v).sum() - (x * A.adjoint(v)).sum()) < 1e-6 * y.norm() * v.norm()
    assert (A(A.pseudo_inverse(y)) - y).norm() < 0.02 * y.norm()
    with torch.inference_mode():
        torch.testing.assert_close(A(x), y)
        torch.testing.assert_close(A.adjoint(v), A.adjoint(v.clone()))
        e, residual = LinearConstraint(A, y + 0.1)(x)
    assert e.shape == x.shape and residual.min() > 0
    torch.testing.assert_close(A(x[1:]), y[1:], atol=1e-5, rtol=1e-5)
    assert A(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_physics(name):
    """e is minus the gradient of |y - A(x)|^2 / 2, and the derivative forwards and backwards are adjoint, in inference mode too."""
    A, x = NONLINEAR[name](), 0.9 * torch.rand(2, *SIZE, generator=generator())
    y = A(x).detach() + 0.1 * randn(*A(x).shape)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * (y - A(x)).square().sum(), x)
    x = x.detach()
    with torch.inference_mode():
        constraint = measurement(A, y)
        e, residual = constraint(x)
        derivative, r = constraint.linearised(x)
        v, w = randn(*y.shape, seed=1), randn(*x.shape, seed=2)
        forward = derivative(w)
        mismatch = (forward * v).sum() - (w * derivative.adjoint(v)).sum()
    assert isinstance(constraint, NonlinearConstraint) and not constraint.linear
    torch.testing.assert_close(e, -gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(residual, (y - A(x)).square().flatten(1).mean(1).sqrt())
    torch.testing.assert_close(r, y - A(x))
    assert abs(mismatch) < 0.01 * forward.norm() * v.norm()


def test_masks_are_ours():
    for name in ("random inpainting", "box inpainting", "demosaicking"):
        assert isinstance(from_deepinv(made(name)), Mask)
    soft = P.Inpainting((1, 4, 4), mask=torch.full((1, 4, 4), 0.5))
    assert torch.equal(from_deepinv(soft)(torch.ones(1, 1, 4, 4)), torch.full((1, 1, 4, 4), 0.5))


def test_the_scales_of_high_dynamic_range_and_phase_retrieval():
    """As DPS and DAPS define them: twice as bright and clipped; |F u| of the image in [0, 1], padded to 1.5 times its size."""
    x = torch.tensor([-0.7, -0.2, 0.3, 0.9]).view(1, 1, 2, 2)
    torch.testing.assert_close(clipped(2)(x).flatten(), torch.tensor([-1.0, -0.4, 0.6, 1.0]))
    x = torch.rand(1, 3, 256, 256, generator=generator()) * 2 - 1
    y = fourier_amplitude(2)(x)
    assert y.shape == (1, 3, 384, 384)
    torch.testing.assert_close(y.square().sum(), ((x + 1) / 2).square().sum())  # Parseval
    torch.testing.assert_close(y[0, :, 192, 192], ((x + 1) / 2).sum((0, 2, 3)) / 384)  # the mean is in the middle


@pytest.mark.parametrize("noise", [P.GaussianNoise(0.1), P.GaussianNoise(0.1, rng=torch.Generator()), P.PoissonNoise(0.1),
                                   P.UniformNoise(0.1), P.GammaNoise(5.0)])  # fmt: skip
def test_noise_is_an_image_s_own(noise):
    """The same alone or in a batch, and torch's own random numbers go on as if nothing was drawn."""
    physics, x = P.Denoising(noise), torch.rand(3, *SIZE, generator=generator()) + 0.1
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    y = measure_physics(physics, x, [4, 5, 6])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(measure_physics(physics, x[1:2], [5]), y[1:2]) and not torch.equal(y, x)
    assert torch.equal(measure_physics(P.Denoising(P.ZeroNoise()), x, [4, 5, 6]), x)


def test_posterior_of_a_gaussian_under_deepinv_s_blur(gaussian):
    """For a Gaussian the fast sampler's mean is the conditional mean in closed form, through the adapter too."""
    A = from_deepinv(P.BlurFFT((1, 8, 8), P.functional.gaussian_blur(sigma=(1.0, 1.0))))
    truth = draw(gaussian, 1)
    y = A(truth)
    samples = last(fast_sampler(gaussian, LinearConstraint(A, y), (64, 1, 8, 8), range(64), steps=40, sigma_y=0.05)).x_t
    matrix = A(torch.eye(64).view(64, 1, 8, 8)).flatten(1).T.double()
    gain = gaussian.cov @ matrix.T @ torch.linalg.inv(matrix @ gaussian.cov @ matrix.T + 0.05**2 * torch.eye(64).double())
    mean = gaussian.mean + gain @ (y.flatten().double() - matrix @ gaussian.mean)
    spread = (gaussian.cov - gain @ matrix @ gaussian.cov).diagonal().sqrt()
    z = (samples.flatten(1).double().mean(0) - mean) / (spread / 8)
    assert z.square().mean().sqrt() < 2


def test_both_samplers_solve_a_nonlinear_measurement(gaussian):
    """High dynamic range on a Gaussian: the residual goes down."""
    A, truth = clipped(2), 0.4 * draw(gaussian, 4)
    y = A(truth)
    free = measurement(A, y).residual(last(newton_sampler(gaussian, None, (4, 1, 8, 8), range(4))).x_t)
    for sampler, settings in ((newton_sampler, dict(steps=20)), (fast_sampler, dict(steps=20))):
        guided = measurement(A, y).residual(last(sampler(gaussian, measurement(A, y), (4, 1, 8, 8), range(4), **settings)).x_t)
        assert (guided < 0.45 * free).all(), sampler


def test_a_decoder_below_a_nonlinear_measurement():
    decode, z = (lambda z: torch.tanh(z).repeat_interleave(2, 3)), randn(2, 3, 8, 4)
    A = from_deepinv(P.RandomPhaseRetrieval(50, (3, 8, 8), rng=generator()), unit=True)
    y = A(decode(z)) + 0.1
    with torch.inference_mode():
        e, residual = DecodedConstraint(decode, A, y)(z)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * (y - A(decode(z))).square().sum(), z)
    torch.testing.assert_close(e, -gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(residual, torch.full((2,), 0.1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("physics, most", [
    (P.Blur(P.functional.gaussian_blur(sigma=(1.0, 1.0)), padding="circular", noise_model=P.GaussianNoise(0.02)), 0.03),
    (P.Physics(A=lambda x, **kwargs: x**3, noise_model=P.GaussianNoise(0.02)), 0.07),
])  # fmt: skip
def test_our_samplers_in_a_script_of_deepinv(gaussian, physics, most):
    """model(y, physics) gives images in [0, 1] that agree with y, if the physics is linear up to its noise of 0.02."""
    truth = (0.15 * draw(gaussian, 2) + 0.5).clamp(0, 1)
    faint = GaussianDenoiser(0.3 * gaussian.mean, 0.09 * gaussian.cov, gaussian.schedule)  # images of [0, 1] in [-1, 1]
    torch.manual_seed(0)
    y = physics(truth)
    model = SamplerReconstructor(faint, (1, 8, 8), steps=20)
    x = model(y, physics)
    assert isinstance(model, deepinv.models.Reconstructor)
    assert x.shape == truth.shape and x.min() >= 0 and x.max() <= 1
    assert (physics.A(x) - y).square().mean().sqrt() < most < 0.5 * (physics.A(truth.flip(0)) - y).square().mean().sqrt()
    assert torch.equal(model(y[1:], physics), SamplerReconstructor(faint, (1, 8, 8), seed=0, steps=20)(y[1:], physics))


def test_wrong_physics_is_one_sentence():
    x = torch.zeros(1, *SIZE)
    detached, foreign = (P.Physics(A=lambda x, **k: x.detach() ** 2), P.Physics(A=lambda x, **k: torch.from_numpy(x.numpy())))
    sensing = from_deepinv(made("compressed sensing"))
    for make, words in [
        (lambda: from_deepinv(torch.nn.Identity()), "physics is a Identity: give an object of deepinv.physics"),
        (lambda: from_deepinv(P.Denoising(), unit=True), "unit = True with Denoising, which is linear"),
        (lambda: sensing(torch.zeros(1, 3, 8, 8)), r"CompressedSensing cannot take a tensor of shape \[1, 3, 8, 8\]"),
        (lambda: from_deepinv(P.Pansharpen(SIZE))(x), "Pansharpen gives a list of measurements"),
        (lambda: measurement(from_deepinv(detached), x + 1)(x + 2), "Physics has a derivative of zero"),
        (lambda: measurement(from_deepinv(foreign), x)(x + 2), "Physics has no vjp"),
        (lambda: clipped().adjoint(x), "A is not linear"),
        (lambda: NonlinearOperator(lambda x: x.detach()).vjp(x, x), "A has no derivative"),
        (lambda: measure_physics(P.Denoising(), x, [1, 2]), "seeds has 2 entries, but x has 1 images"),
        (lambda: clipped(1), "scale = 1"), (lambda: fourier_amplitude(-1), "oversampling = -1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make()
