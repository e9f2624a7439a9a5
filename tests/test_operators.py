import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from ldm.constraints import LinearConstraint, inpainting
from ldm.operators import Identity, Mask, box_average, downsample, gaussian_blur, measure, resample


def noise_image(b, c, h, w, seed=0, dtype=torch.float64):
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


@st.composite
def operator_and_shape(draw, kinds=("identity", "mask", "downsample", "box", "blur", "compose")):
    kind = draw(st.sampled_from(kinds))
    factor = draw(st.sampled_from([1, 2, 3, 4, 5]))
    h, w = factor * draw(st.integers(1, 8)), factor * draw(st.integers(1, 8))
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 3])), h, w)
    if kind == "identity":
        return Identity(), shape
    if kind == "mask":
        mask_shape = (draw(st.sampled_from([1, shape[0]])), draw(st.sampled_from([1, shape[1]])), h, w)
        return Mask(torch.rand(mask_shape) < draw(st.floats(0, 1))), shape
    if kind == "downsample":
        return downsample((h, w), factor), shape
    if kind == "box":
        return box_average((h, w), factor), shape
    blur = gaussian_blur((h, w), draw(st.floats(0.2, 6)))
    if kind == "blur":
        return blur, shape
    return Mask(torch.rand(1, 1, h // factor, w // factor) < 0.5) @ downsample((h, w), factor) @ blur, shape


@settings(max_examples=150, deadline=None)
@given(operator_and_shape(), st.integers(0, 2**31))
def test_adjoint(operator, seed):
    """<A x, y> = <x, A^T y>."""
    A, shape = operator
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Ax = A(x)
    y = torch.randn(Ax.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    left, right = (Ax * y).sum(), (x * A.adjoint(y)).sum()
    assert A.adjoint(y).shape == x.shape
    assert abs(left - right) <= 1e-10 * (1 + Ax.norm() * y.norm())


@pytest.mark.parametrize("factor", [1, 1.5, 2, 3, 4, 8, 12])
def test_downsample_equals_torchvision(factor):
    x = noise_image(2, 3, 48, 72, dtype=torch.float32)
    y = downsample((48, 72), factor)(x)
    expected = TF.resize(x, [round(48 / factor), round(72 / factor)], TF.InterpolationMode.BICUBIC, antialias=True)
    assert y.shape == expected.shape and (y - expected).abs().max() < 1e-5


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_downsample_equals_pil(factor):
    x = noise_image(1, 1, 32, 64, dtype=torch.float32)
    small = Image.fromarray(x[0, 0].numpy()).resize((64 // factor, 32 // factor), Image.Resampling.BICUBIC)
    assert np.abs(downsample((32, 64), factor)(x)[0, 0].numpy() - np.asarray(small)).max() < 1e-3


@pytest.mark.parametrize("std", [0.5, 2.3, 10])
def test_blur_equals_scipy(std):
    x = noise_image(2, 1, 12, 9)
    expected = gaussian_filter(x.numpy(), (0, 0, std, std), mode="reflect")
    assert np.abs(gaussian_blur((12, 9), std)(x).numpy() - expected).max() < 1e-12


def test_box_average_and_constants():
    x = noise_image(2, 3, 12, 8)
    assert torch.allclose(box_average((12, 8), 4)(x), torch.nn.functional.avg_pool2d(x, 4))
    for A in (downsample((12, 8), 4), box_average((12, 8), 4), gaussian_blur((12, 8), 3)):
        assert torch.allclose(A(torch.full((1, 1, 12, 8), 0.7, dtype=torch.float64)), torch.tensor(0.7, dtype=torch.float64))


def test_composition_is_applied_right_to_left():
    x = noise_image(1, 1, 8, 8)
    A, B = box_average((8, 8), 2), gaussian_blur((8, 8), 1)
    assert torch.equal((A @ B)(x), A(B(x)))


def test_operators_follow_dtype_and_device():
    A = downsample((8, 8), 2)
    for dtype in (torch.float32, torch.float64, torch.float32):
        assert A(noise_image(1, 1, 8, 8, dtype=dtype)).dtype == dtype


def test_measurement_noise():
    x = noise_image(2000, 1, 8, 8)
    A = box_average((8, 8), 2)
    noise = (measure(A, x, 0.05, range(2000)) - A(x)).flatten(1)
    assert abs(noise.std() - 0.05) < 0.001 and abs(noise.mean()) < 0.001
    assert torch.equal(measure(A, x[3:4], 0.05, [3])[0], measure(A, x, 0.05, range(2000))[3])  # alone as in the batch
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    y = measure(Mask(mask), x, 0.05, range(2000))
    assert (y[..., 4:] == 0).all() and abs((y - x)[..., :4].std() - 0.05) < 0.001
    assert torch.equal(measure(A, x), A(x))


def test_linear_constraint_is_the_gradient_direction():
    """e = A^T (y - A x0) is minus the gradient of |y - A x0|^2 / 2, the residual its root mean square."""
    A, x = downsample((8, 8), 2), noise_image(3, 1, 8, 8)
    y = A(noise_image(3, 1, 8, 8, seed=1))
    e, residual = LinearConstraint(A, y)(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * (y - A(x)).square().sum(), x)
    assert torch.allclose(e, -gradient)
    assert torch.allclose(residual, (y - A(x)).square().mean(dim=(1, 2, 3)).sqrt())


def test_inpainting_residual_counts_known_pixels_only():
    image, mask = noise_image(3, 1, 4, 4, dtype=torch.float32), torch.zeros(3, 1, 4, 4)
    mask[0, ..., :1] = 1
    mask[1] = 1
    e, residual = inpainting(image, mask)(image + 0.5)
    assert torch.allclose(residual, torch.tensor([0.5, 0.5, 0.0])) and torch.allclose(e, -0.5 * mask)


@pytest.mark.parametrize("make, message", [
    (lambda: Mask(torch.full((1, 1, 4, 4), 0.5)), "values other than 0"),
    (lambda: Mask(torch.ones(4, 4)), "mask has shape \\[4, 4\\]"),
    (lambda: Mask(torch.ones(1, 1, 4, 5))(torch.zeros(1, 1, 4, 4)), "mask has shape \\[1, 1, 4, 5\\], but the image"),
    (lambda: Mask(torch.ones(2, 1, 4, 4))(torch.zeros(1, 1, 4, 4)), "one mask per image"),
    (lambda: downsample((10, 10), 4), "factor = 4 does not divide"), (lambda: downsample((8, 8), 0), "factor = 0"),
    (lambda: downsample((8, 8), 16), "factor = 16"), (lambda: box_average((8, 8), 1.6), "needs an integer"),
    (lambda: gaussian_blur((8, 8), 0), "std = 0"), (lambda: downsample((8, 8), 2)(torch.zeros(1, 1, 9, 8)), "made for \\[8, 8\\]"),
    (lambda: measure(Identity(), torch.zeros(1, 1, 2, 2), -1), "sigma_y = -1"),
    (lambda: measure(Identity(), torch.zeros(1, 1, 2, 2), 0.1), "seeds is missing"),
    (lambda: inpainting(torch.full((1, 1, 4, 4), float("nan")), torch.ones(1, 1, 4, 4)), "image has 16 values that are NaN"),
    (lambda: inpainting(torch.full((1, 1, 4, 4), 255.0), torch.ones(1, 1, 4, 4)), "must lie in \\[-1, 1\\]"),
    (lambda: LinearConstraint(Identity(), torch.tensor([[[[float("inf")]]]])), "y has 1 values"),
])  # fmt: skip
def test_bad_input_is_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "size, to, canvas", [((64, 48), (21, 16), None), ((64, 48), (21, 16), (64, 64)), ((9, 9), (9, 4), (16, 9))]
)
def test_resample_takes_any_factor_and_a_part_of_a_canvas(size, to, canvas):
    generator = torch.Generator().manual_seed(0)
    H, W = canvas or size
    x = torch.rand(2, 3, H, W, generator=generator)
    A = resample(size, to, canvas)
    expected = TF.resize(x[..., : size[0], : size[1]], list(to), TF.InterpolationMode.BICUBIC, antialias=True)
    assert torch.allclose(A(x), expected, atol=2e-6)
    y = torch.rand(A(x).shape, generator=generator)
    assert (A(x) * y).sum() == pytest.approx((x * A.adjoint(y)).sum().item(), rel=1e-4)
    assert A.pseudo_inverse(y)[..., size[0] :, :].abs().sum() == 0


def test_resample_does_not_enlarge():
    with pytest.raises(ValueError, match=r"to = \(8, 17\)"):
        resample((16, 16), (8, 17))
