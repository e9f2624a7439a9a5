"""NaN and infinity never reach an image silently, and float64 never reaches the tensors of a float32 model."""

import pytest
import torch
from common import GaussianDenoiser
from pipelines import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ldm
from ldm.constraints import LinearConstraint
from ldm.diffusers_models import from_diffusers
from ldm.images import save_image
from ldm.inpainting import blend, make_mask
from ldm.operators import Mask, downsample, gaussian_blur, measure
from ldm.schedules import DiffusionSchedule, FlowSchedule, make_beta_schedule

AUTOENCODER = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": {
    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
    "num_res_blocks": 1, "attn_resolutions": []}}}  # fmt: skip
UNET = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
    "attention_resolutions": [], "num_heads": 2}}  # fmt: skip


class NoFloat64(TorchDispatchMode):
    """An error where an operation on other tensors gives a float64 tensor, which a device without float64 does not have. The
    schedule's own numbers, float64 on the CPU throughout, may stay."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = ({x.dtype for x in tree_leaves(part) if torch.is_tensor(x)} for part in ((args, kwargs), result))
        assert torch.float64 not in made or given <= {torch.float64}, f"{function} makes float64 of {given}"
        return result


def latent_diffusion():
    return ldm.util.instantiate_from_config({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "image_size": 8, "channels": 4, "first_stage_config": AUTOENCODER, "unet_config": UNET}}).eval()  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_decoder_that_gives_no_numbers_is_named(value):
    model = latent_diffusion()
    assert torch.isfinite(model.decode(torch.zeros(1, 4, 8, 8))).all()
    model.first_stage_model.decoder.conv_out.bias.data[1] = value
    with pytest.raises(FloatingPointError, match="the decoder's image has 256 of 768 values that are NaN or infinite: .*float32"):
        model.decode(torch.zeros(1, 4, 8, 8))
    pipe = from_diffusers(build("sd"))
    pipe.pipeline.vae.decoder.conv_out.bias.data[1] = value
    with pytest.raises(FloatingPointError, match="the decoder's image has 256 of 768 values that are NaN or infinite: .*float32"):
        pipe.decode(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("sampler", [ldm.newton_sampler, ldm.fast_sampler])
def test_a_network_that_gives_no_numbers_is_named(sampler, schedule):
    D = ldm.Denoiser(lambda x_t, t: x_t / (t > 500).view(-1, 1, 1, 1), schedule, "x0")  # infinite from the middle on
    with pytest.raises(FloatingPointError, match="x0 is not finite.*float32"):
        list(sampler(D, None, (1, 1, 8, 8), [0], 6))


def test_no_stage_after_the_decoder_saves_them(tmp_path):
    image, mask = torch.zeros(1, 3, 8, 8), make_mask("left", (8, 8))
    bad = image.masked_fill(mask == 0, float("nan"))
    with pytest.raises(FloatingPointError, match="the sampled image"):
        blend(bad, image, mask)
    with pytest.raises(FloatingPointError, match="the image has 96 of 192 values"):
        save_image(bad[0], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schedule", [DiffusionSchedule(make_beta_schedule("sqrt_linear", 1000)), FlowSchedule(scale=1000.0)])
def test_training_noise_is_made_without_float64_on_the_device(schedule):
    """On the "meta" device, where every tensor that is made or moved there is seen; and the values on the CPU."""

    class OnTheDevice(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert not (torch.is_tensor(result) and result.is_meta and result.dtype == torch.float64), f"{function} gives float64"
            return result

    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([1, 500, 999])
    with OnTheDevice():
        x_t, alpha, sigma = schedule.add_noise(x0.to("meta"), t.to("meta"), noise.to("meta"))
    assert x_t.shape == x0.shape and x_t.dtype == alpha.dtype == sigma.dtype == torch.float32
    x_t, alpha, sigma = schedule.add_noise(x0, t, noise)
    for i, level in enumerate(schedule.level(int(time)) for time in t):
        assert abs(alpha[i].item() - level.alpha) < 1e-6 and abs(sigma[i].item() - level.sigma) < 1e-6
        assert torch.allclose(x_t[i], level.alpha * x0[i] + level.sigma * noise[i], atol=1e-5)


def test_sampling_in_float32_makes_no_float64():
    schedule = DiffusionSchedule(make_beta_schedule("sqrt_linear", 1000))
    mean, cov = torch.zeros(64), torch.eye(64)
    image = torch.rand(2, 1, 8, 8) * 2 - 1
    for A in (Mask(make_mask("left", (8, 8))), downsample((8, 8), 2), gaussian_blur((8, 8), 1.0)):
        y = measure(A, image, 0.1, [0, 1])
        A(image), A.adjoint(y), A.pseudo_inverse(y)  # the matrices are made once, in float64 on the CPU
        constraint = LinearConstraint(A, y)
        for sampler in (ldm.newton_sampler, ldm.fast_sampler):
            with NoFloat64():
                *_, state = sampler(GaussianDenoiser(mean, cov, schedule), constraint, (2, 1, 8, 8), [0, 1], 3)
            assert torch.isfinite(state.x_t).all()
