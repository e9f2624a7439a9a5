"""Every sampler on every kind of published model, at random weights: shapes, seeds, labels, guidance, the decoder's derivative."""

import pytest
import torch
from common import last
from published import built

from ldm.baselines import ddnm, diffpir, dps, gradient_steps, mpgd, psld, repaint
from ldm.constraints import DecodedConstraint, EncoderConstraint, LinearConstraint, inpainting, latent_inpainting
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.fast_sampler import fast_sampler
from ldm.newton_sampler import newton_sampler
from ldm.operators import box_average
from ldm.sampling import jvp

KINDS = {  # config: what else than x_t its D takes
    "adm/ffhq-256": None, "adm/imagenet-256-classes": [3, 7], "latent-diffusion/ffhq-ldm-vq-4": None,
    "latent-diffusion/cin256-v2": [3, 7], "latent-diffusion/lsun_churches-ldm-kl-8": None, "latent-diffusion/bsr_sr": "an image",
}  # fmt: skip
SAMPLERS = {
    newton_sampler: dict(steps=2, newton_steps=1), fast_sampler: dict(steps=3), dps: dict(steps=2), repaint: dict(steps=2),
    gradient_steps: dict(steps=2, gradient_steps=1), mpgd: dict(steps=2), ddnm: dict(steps=2), diffpir: dict(steps=2),
    psld: dict(steps=2),
}  # fmt: skip
THROUGH_A_DECODER = (newton_sampler, fast_sampler, dps, gradient_steps, psld)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """(model, D for two samples, the shape of one, whether it works on latents)."""
    model = built(request.param)
    condition = randn(2, 3, 8, 8, seed=5) if KINDS[request.param] == "an image" else KINDS[request.param]
    assert model.conditional == (condition is not None)
    D = LatentDenoiser(model, condition) if model.conditional else Denoiser(model.network, model.schedule, model.parameterization)
    return model, D, (model.channels, 8, 8), request.param.startswith("latent")


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.__name__)
def test_every_sampler_runs(kind, sampler):
    model, D, shape, latent = kind
    side = 8 * (model.first_stage_model.downsampling if latent else 1)
    images, mask = randn(2, 3, side, side).clamp(-1, 1), torch.ones(1, 1, side, side)
    mask[..., side // 2 :] = 0
    settings = SAMPLERS[sampler] | ({"encode": model.encode} if sampler is psld and latent else {})
    if sampler in THROUGH_A_DECODER and latent:
        A = box_average((side, side), 2)
        constraint = DecodedConstraint(model.decode, A, A(images))
    elif sampler is psld:
        pytest.skip("on pixels there is no decoder")
    else:
        constraint = latent_inpainting(model, images, mask) if latent else inpainting(images, mask)
    state = last(sampler(D=D, constraint=constraint, shape=(2, *shape), seeds=[1, 2], **settings))
    assert state.x_t.shape == (2, *shape) and state.x_t.isfinite().all() and state.residual.shape == (2,)


def test_the_jacobian_product_of_each_network(kind):
    """Differences and forward-mode differentiation agree: the dropped variance, labels and attention are no obstacle to either."""
    _, D, shape, _ = kind
    x_t, v = randn(2, *shape), randn(2, *shape, seed=1)
    x_t, v = x_t.double(), v.double()
    by_difference, exact = (jvp(D, x_t, 500, v, mode=mode, h=1e-2) for mode in ("difference", "forward-ad"))
    assert (by_difference - exact).norm() < 0.05 * exact.norm()


def test_labels_are_taken_as_prompts_are():
    """One for all or one for each; guidance is away from the label for no class, or from any other."""
    model, x_t = built("latent-diffusion/cin256-v2"), randn(2, 3, 8, 8)
    D = lambda *args: LatentDenoiser(model, *args)(x_t, 500)  # noqa: E731
    torch.testing.assert_close(D(7), D([7, 7]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(D([3, 7])[1:], LatentDenoiser(model, 7)(x_t[1:], 500), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        conditional, free = (D(label) for label in (7, 1000))
        torch.testing.assert_close(D(7, 3.0), free + 3 * (conditional - free), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(D(7, 3.0, 1000), D(7, 3.0), atol=1e-6, rtol=1e-6)
    assert (D(7, 3.0, 5) - D(7, 3.0)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="labels = 1001: give integers from 0 to 1000"):
        D(1001)
    with pytest.raises(ValueError, match="prompts has 3 entries, but x_t has 2 samples"):
        D([1, 2, 3])


def test_pixel_models_with_classes_have_no_guidance_without_a_second_class():
    model, x_t = built("adm/imagenet-256-classes"), randn(2, 3, 8, 8)
    assert LatentDenoiser(model, [3, 7])(x_t, 500).shape == x_t.shape
    with pytest.raises(ValueError, match="no label for no class"):
        LatentDenoiser(model, 3, guidance=2.0)
    guided = LatentDenoiser(model, 3, 2.0, negative_prompts=7)(x_t, 500)
    assert (guided - LatentDenoiser(model, 3)(x_t, 500)).abs().max() > 1e-3


def test_the_constraint_without_a_derivative_works_through_a_quantiser():
    """VAE-space Newton needs the autoencoder forwards only; the gradient through the decoder is the straight-through one."""
    model = built("latent-diffusion/ffhq-ldm-vq-4")
    A, images, z = box_average((32, 32), 2), randn(2, 3, 32, 32).clamp(-1, 1), randn(2, 3, 8, 8)
    y = A(images)
    e, residual = EncoderConstraint(model.decode, model.encode, A, y)(z)
    assert e.shape == z.shape and e.isfinite().all() and residual.min() > 0
    e, _ = DecodedConstraint(model.decode, A, y)(z)
    codes = model.first_stage_model.quantize(z)
    plain = lambda z: model.first_stage_model.decode(z, force_not_quantize=True)  # noqa: E731
    expected, _ = DecodedConstraint(plain, A, y)(codes)
    torch.testing.assert_close(e, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(latent_inpainting(model, images, torch.ones(1, 1, 32, 32).triu()), LinearConstraint)
