"""Diffusers pipelines distilled to a few steps, and their tiny autoencoders."""

from itertools import pairwise

import diffusers
import pytest
import torch
from common import randomised
from pipelines import PROMPTS, build, denoiser, unet

from ldm.constraints import DecodedConstraint
from ldm.denoisers import LatentDenoiser
from ldm.diffusers_models import from_diffusers
from ldm.inpainting import make_mask
from ldm.newton_sampler import sample
from ldm.operators import Mask
from ldm.sampling import seeded_noise


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_few_step_models_at_their_scheduler_s_times(name):
    """x0 and the next x_t of every step: TCD's with gamma 0 is DDIM's; LCM noises x0 anew."""
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                                         steps_offset=1)  # fmt: skip
    pipe = build("sd", scheduler)
    model = from_diffusers(pipe, size=(16, 16))
    D, levels = denoiser(model, 1.0), model.schedule.levels(4)
    scheduler.set_timesteps(4)
    assert [level.t for level in levels[:-1]] == scheduler.timesteps.tolist() == [999, 759, 499, 259]
    options = dict(eta=0.0) if name == "TCDScheduler" else {}
    for now, to in pairwise(levels):
        x = seeded_noise((2, 4, 8, 8), [1, 2])()
        with torch.no_grad():
            x0, out = D(x, now.t), D.predict(x, torch.full((2,), now.t))
        theirs = scheduler.step(out, now.t, x, generator=torch.Generator().manual_seed(5), return_dict=False, **options)
        if name == "TCDScheduler":
            ours = model.schedule.step(x, x0, now, to if to.sigma else model.schedule.level(0))
        else:
            torch.testing.assert_close(x0, theirs[1], atol=1e-3, rtol=1e-4)  # c_skip and c_out are nearly 0 and 1
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
            ours = to.alpha * x0 + to.sigma * noise
        torch.testing.assert_close(ours, theirs[0], atol=1e-3, rtol=1e-4)
    if name == "TCDScheduler":
        state = sample(denoiser(model), None, (2, 4, 8, 8), [3, 4], steps=4)
        images = pipe(PROMPTS, guidance_scale=2.5, latents=seeded_noise((2, 4, 8, 8), [3, 4])(), eta=0.0, num_inference_steps=4,
                      output_type="pt").images  # fmt: skip
        assert ((model.decode(state.x_t) / 2 + 0.5).clamp(0, 1) - images).abs().max() < 0.05  # its last step ends at t = 0
    assert len(model.schedule.log_levels(8)) == 9
    with pytest.raises(ValueError, match="steps = 51: give an integer from 1 to 50"):
        model.schedule.levels(51)


@pytest.mark.parametrize("cls", ["LatentConsistencyModelPipeline", "StableDiffusionPipeline"])
def test_a_unet_that_takes_the_scale_of_guidance(cls):
    """One step of LCM's scheduler is D, at the scale that the network is told."""
    parts = build("sd").components | dict(unet=randomised(unet(time_cond_proj_dim=16)), scheduler=diffusers.LCMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1))  # fmt: skip
    pipe = getattr(diffusers, cls)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    model, shape, images = from_diffusers(pipe, size=(16, 16)), (2, 4, 8, 8), []
    for scale in (8.5, 2.0):
        model.embedded_guidance = scale
        state = sample(LatentDenoiser(model, PROMPTS), None, shape, [3, 4], steps=1)
        theirs = pipe(PROMPTS, height=16, width=16, num_inference_steps=1, guidance_scale=scale, output_type="pt",
                      latents=seeded_noise(shape, [3, 4])()).images  # fmt: skip
        images.append((model.decode(state.x_t) / 2 + 0.5).clamp(0, 1))
        assert (images[-1] - theirs).abs().max() < 1e-3
    assert (images[0] - images[1]).abs().max() > 0.01


def test_a_tiny_autoencoder_to_guide_through():
    pipe = build("sd")
    model = from_diffusers(pipe, size=(16, 16))
    tiny = randomised(diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                                num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))  # fmt: skip
    quick = from_diffusers(pipe, size=(16, 16), vae=tiny)
    assert quick.net is model.net and model.pipeline.vae is pipe.vae is not tiny and quick.downsampling == 2
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(quick.encode(images), tiny.encode(images).latents)
        torch.testing.assert_close(quick.decode(quick.encode(images)), tiny.decode(tiny.encode(images).latents).sample)
    A = Mask(make_mask("right", (16, 16)))
    constraint = DecodedConstraint(quick.decode, A, A(images))
    state = sample(denoiser(model), constraint, (2, 4, 8, 8), [0, 1], steps=2, newton_steps=1)
    assert constraint.backward_passes == 2 and model.decode(state.x_t).shape == images.shape
    pipe = build("sd")
    pipe.vae = tiny  # as diffusers' own documentation does it
    x = seeded_noise((2, 4, 8, 8), [3, 4])()
    theirs = pipe(PROMPTS, guidance_scale=2.5, latents=x, num_inference_steps=3, output_type="pt").images
    ours = quick.decode(sample(denoiser(quick), None, x.shape, [3, 4], steps=3).x_t)
    assert ((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 1e-2  # this decoder magnifies rounding
