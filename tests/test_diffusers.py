"""Diffusers pipelines as models: small ones of every family, of random weights, against the pipelines' own sampling."""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from common import randomised
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import FAMILIES, PROMPTS, build, ddim, denoiser

from ldm.constraints import inpainting, latent_inpainting
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.diffusers_models import from_diffusers
from ldm.inpainting import make_mask
from ldm.newton_sampler import sample
from ldm.sampling import jvp, seeded_noise
from ldm.schedules import CLEAN, DiffusionSchedule, make_beta_schedule

TEXT = [name for name in FAMILIES if name != "pixels"]


@pytest.fixture(scope="module")
def pipelines():
    """Each family once, with its model for the sampler on images of 16 x 16 (pixels: 8 x 8)."""
    pipes = {family: build(family) for family in FAMILIES}
    return {family: (pipe, from_diffusers(pipe, size=(8, 8) if family == "pixels" else (16, 16))) for family, pipe in pipes.items()}


def own_images(family, pipe, steps, x, guidance=2.5, negative_prompts=None):
    """The images [B, C, H, W] in 0 .. 1 of the pipeline's own sampling, from the noise x."""
    options = dict(num_inference_steps=steps, output_type="pt")
    if family == "pixels":
        return pipe(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)], **options).images
    if family == "flux":
        packed = pipe._pack_latents(x, *x.shape)
        return pipe(PROMPTS, negative_prompt=negative_prompts or ["", ""], height=16, width=16, guidance_scale=3.5,
                    true_cfg_scale=guidance, latents=packed, **options).images  # fmt: skip
    if family == "sd-flow":  # what StableDiffusionPipeline asks of a scheduler, and this one lacks; our noise levels are Flux's
        pipe.scheduler.init_noise_sigma = 1.0
        options["sigmas"] = np.linspace(1, 1 / steps, steps)
    return pipe(PROMPTS, negative_prompt=negative_prompts, guidance_scale=guidance, latents=x.clone(), **options).images


@pytest.mark.parametrize("family", FAMILIES)
def test_unconstrained_samples_are_the_pipelines_own(family, pipelines):
    pipe, model = pipelines[family]
    shape = (2, model.channels, *model.latent_size)
    x = seeded_noise(shape, [3, 4])()
    state = sample(denoiser(model), None, shape, [3, 4], steps=5)
    ours = (model.decode(state.x_t) / 2 + 0.5).clamp(0, 1)
    theirs = own_images(family, pipe, 5, x).clamp(0, 1)
    assert ours.std() > 0.05 and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "instaflow"])  # it has no scheduler of its own
def test_a_step_is_the_scheduler_s_at_every_time(family, pipelines):
    """x0 and the next x_t, from the network's prediction, by diffusers' own scheduler."""
    pipe, model = pipelines[family]
    D, steps = denoiser(model, guidance=1.0), 10
    own, levels = getattr(model.schedule, "scheduler", pipe.scheduler), model.schedule.levels(steps)
    own.num_inference_steps = steps
    assert levels[-1] == (None, 1.0, 0.0) and len(levels) == steps + 1
    for now, to in pairwise(levels):
        x = seeded_noise((2, model.channels, *model.latent_size), [1, 2])()
        with torch.no_grad():
            out = D.predict(x, torch.full((2,), now.t))
            x0 = D(x, now.t)
        if family in ("sd3", "flux", "sd-flow"):
            index = own.index_for_timestep(torch.tensor(now.t, dtype=torch.float32))
            own._step_index = index
            assert abs(own.sigmas[index] - now.sigma) < 1e-6
            theirs = own.step(out, own.timesteps[index], x).prev_sample
            torch.testing.assert_close(x0, x - own.sigmas[index] * out, atol=1e-5, rtol=1e-5)
        else:
            step = own.step(out, now.t, x)
            theirs = step.prev_sample
            torch.testing.assert_close(x0, step.pred_original_sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.schedule.step(x, x0, now, to), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sd-v", "sd3", "flux"])
def test_x0_is_the_scheduler_s_at_all_thousand_times(family, pipelines):
    """Of one and the same prediction: `pred_original_sample` of DDIM, x_t - sigma v of the flows."""
    pipe, model = pipelines[family]
    x, out = (seeded_noise((1, model.channels, *model.latent_size), [seed])() for seed in (1, 2))
    D = Denoiser(lambda x_t, t: out, model.schedule, model.parameterization)
    if family in ("sd3", "flux"):
        levels, sigmas = model.schedule.levels(1000)[:-1], model.schedule.scheduler.sigmas
        theirs = [x - sigma * out for sigma in sigmas[:-1]]
    else:
        pipe.scheduler.set_timesteps(1000)
        levels = [model.schedule.level(t) for t in range(1000)]
        theirs = [pipe.scheduler.step(out, t, x).pred_original_sample for t in range(1000)]
    for now, expected in zip(levels, theirs, strict=True):
        torch.testing.assert_close(D(x, now.t), expected, atol=1e-5, rtol=1e-5)
    assert len({now.t for now in levels}) == 1000


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_fixed_and_dynamic_shift_and_no_guidance_embedding(family):
    """The other way round than above: FLUX.1-schnell's fixed shift, without guidance as an input; SD3 with a dynamic one."""
    dynamic = family == "sd3"
    pipe = build(family, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=1.5))
    if family == "flux":
        pipe.transformer = randomised(type(pipe.transformer).from_config({**pipe.transformer.config, "guidance_embeds": False}))
    model = from_diffusers(pipe, size=(16, 16))
    shape = (2, 4, 8, 8)
    state = sample(denoiser(model), None, shape, [3, 4], steps=4)
    theirs = own_images(family, pipe, 4, seeded_noise(shape, [3, 4])()).clamp(0, 1)
    assert ((model.decode(state.x_t) / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 1e-4
    assert model.fixed_size == dynamic


@pytest.mark.parametrize("family", TEXT)
def test_negative_prompts_and_guidance(family, pipelines):
    pipe, model = pipelines[family]
    shape, negative = (2, model.channels, *model.latent_size), ["ugly", "a cat"]
    x = seeded_noise(shape, [3, 4])()
    state = sample(denoiser(model, 4.0, negative), None, shape, [3, 4], steps=3)
    theirs = own_images(family, pipe, 3, x, 4.0, negative).clamp(0, 1)
    assert ((model.decode(state.x_t) / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 1e-4
    if family != "sdxl":  # where no negative prompt is not an empty one
        assert torch.equal(LatentDenoiser(model, PROMPTS, 4.0).negative, model.encode_prompts(None))


@pytest.mark.parametrize("family", TEXT)
def test_constrained_alone_and_in_a_batch(family, pipelines):
    _, model = pipelines[family]
    images = 0.5 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = make_mask("right", (16, 16))
    constraint = latent_inpainting(model, images, mask)
    assert constraint.y.shape == (2, model.channels, 8, 8)
    options = dict(steps=3, newton_steps=1, h=0.1)  # a long difference: short ones magnify the rounding that a batch changes
    free = sample(denoiser(model), None, constraint.y.shape, [5, 6], steps=3)
    state = sample(denoiser(model), constraint, constraint.y.shape, [5, 6], **options)
    assert state.nfe == 3 * 3 and torch.isfinite(state.x_t).all()
    assert not torch.allclose(state.x_t, free.x_t, atol=1e-2)
    constraint = latent_inpainting(model, images[1:], mask)
    alone = sample(LatentDenoiser(model, PROMPTS[1], 2.5), constraint, constraint.y.shape, [6], **options)
    torch.testing.assert_close(alone.x_t[0], state.x_t[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_forward_differentiation(family, pipelines):
    _, model = pipelines[family]
    D, x = denoiser(model), seeded_noise((2, model.channels, 8, 8), [1, 2])()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = model.schedule.levels(4)[1].t
    with torch.inference_mode():
        exact, difference = (jvp(D, x, t, v, h=0.02, mode=mode) for mode in ("forward-ad", "difference"))
    assert (exact - difference).norm() < 0.05 * exact.norm()


def test_pixels_are_constrained_as_they_are(pipelines):
    pipe, model = pipelines["pixels"]
    images = torch.rand(2, 3, 8, 8) - 0.5
    constraint = inpainting(images, make_mask("left", (8, 8)))
    state = sample(denoiser(model), constraint, images.shape, [0, 1], steps=4, newton_steps=1)
    assert state.nfe == 12 and torch.equal(model.encode(images), model.decode(images))
    parts = from_diffusers((pipe.unet, pipe.scheduler))
    assert parts.image_size == 8 and parts.channels == 3 and parts.downsampling == 1
    with pytest.raises(ValueError, match="has no text encoder"):
        LatentDenoiser(model, "a cat")


@pytest.mark.parametrize("family", TEXT)
def test_encode_is_the_posterior_s_mean_and_decode_its_inverse_in_scale(family, pipelines):
    pipe, model = pipelines[family]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(images).latent_dist.mean
        z = model.encode(images)
        torch.testing.assert_close(z, (mean - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor)
        torch.testing.assert_close(model.decode(z), pipe.vae.decode(mean).sample, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(model.decode(z.requires_grad_()).sum(), z)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_take_and_give_float32(family, pipelines):
    model = from_diffusers(build(family), size=pipelines[family][1].latent_size if family == "pixels" else (16, 16),
                           dtype=torch.bfloat16)  # fmt: skip
    shape = (2, model.channels, *model.latent_size)
    assert model.dtype == torch.bfloat16
    x, t = seeded_noise(shape, [3, 4])(), 500
    with torch.no_grad():
        x0, exact = (denoiser(m, 1.0)(x, t) for m in (model, pipelines[family][1]))
        assert x0.dtype == torch.float32 and model.decode(x0).dtype == torch.float32
    assert (x0 - exact).norm() < 0.1 * exact.norm()


def test_latents_mean_and_std_and_float16_of_sdxl():
    pipe = build("sdxl")
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    model = from_diffusers(pipe)
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        mean = pipe.vae.encode(images).latent_dist.mean
        own = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]])[..., None, None]
        torch.testing.assert_close(model.encode(images), (mean - own[0]) * 0.2 / own[1])
        torch.testing.assert_close(model.decode(model.encode(images)), pipe.vae.decode(mean).sample, atol=1e-4, rtol=1e-4)
    pipe.vae.half()
    assert model.vae_dtype() == torch.float32 == pipe.vae.dtype


def test_sizes_come_from_the_configs_and_the_dynamic_shift_from_the_size(pipelines):
    for family, side in {"pixels": 8, "sd": 8, "sdxl": 8, "sd3": 8}.items():
        assert from_diffusers(build(family)).image_size == side
    assert pipelines["flux"][0].default_sample_size == from_diffusers(pipelines["flux"][0]).image_size
    pipe = pipelines["flux"][0]
    small, large = (from_diffusers(pipe, size=(n, n)) for n in (16, 128))
    assert small.schedule.levels(4)[2].sigma < large.schedule.levels(4)[2].sigma  # more noise for larger images
    with pytest.raises(ValueError, match=r"x_t has the size \[8, 8\], but the noise levels .* for \[64, 64\]"):
        sample(LatentDenoiser(large, "a cat"), None, (1, 4, 8, 8), [0])
    other = from_diffusers(pipelines["sd"][0], size=(32, 24))  # without a dynamic shift any size goes
    assert sample(LatentDenoiser(other, "a cat"), None, (1, 4, 8, 12), [0], steps=1).x_t.shape == (1, 4, 8, 12)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
                                  "UniPCMultistepScheduler"])  # fmt: skip
def test_other_solvers_of_the_same_diffusion_are_sampled_by_ddim(name, pipelines):
    """At their own time spacing, as the pipeline does after `DDIMScheduler.from_config(pipe.scheduler.config)`."""
    options = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1)
    scheduler = getattr(diffusers, name)(**options)
    model = from_diffusers(build("sd", scheduler))
    assert [level.t for level in model.schedule.levels(4)] == [751, 501, 251, 1, None]
    expected = pipelines["sd"][1].schedule
    assert torch.allclose(model.schedule.alphas_cumprod, expected.alphas_cumprod)
    spaced = getattr(diffusers, name)(**{**options, "timestep_spacing": "trailing"})
    assert [level.t for level in from_diffusers(build("sd", spaced)).schedule.levels(4)] == [999, 749, 499, 249, None]


def test_zero_terminal_signal_to_noise_ratio():
    """Rescaled betas: abar is 0 at the noisy end, where v-prediction gives x0 = -v."""
    pipe = build("sd", ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True))
    model = from_diffusers(pipe)
    assert model.schedule.levels(5)[0].alpha < 1e-3
    shape = (2, 4, 8, 8)
    state = sample(denoiser(model), None, shape, [3, 4], steps=5)
    theirs = own_images("sd", pipe, 5, seeded_noise(shape, [3, 4])())
    assert ((model.decode(state.x_t) / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 1e-4


def test_a_flow_that_is_loaded_as_a_plain_pipeline(pipelines):
    """InstaFlow's configs are Stable Diffusion's: the user says what it predicts, and with which sign."""
    pipe, instaflow = pipelines["instaflow"]
    plain = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    same, opposite = (from_diffusers(plain, (16, 16), prediction) for prediction in ("-velocity", "velocity"))
    x = seeded_noise((2, 4, 8, 8), [1, 2])()
    with torch.no_grad():
        x0, a, b = (denoiser(model)(x, 300.0) for model in (instaflow, same, opposite))
    assert torch.equal(x0, a) and torch.allclose(a - x, x - b, atol=1e-5)
    assert same.schedule.levels(4) == instaflow.schedule.levels(4) == [*map(same.schedule.level, (1000, 750, 500, 250)), CLEAN]


def test_betas_are_float64_where_they_are_a_formula_s():
    for schedule, ours in {"linear": "sqrt_linear", "scaled_linear": "linear"}.items():
        scheduler = ddim(beta_schedule=schedule)
        model = from_diffusers(build("sd", scheduler))
        exact = DiffusionSchedule(make_beta_schedule(ours, 1000, 0.00085, 0.012)).alphas_cumprod
        assert torch.equal(model.schedule.alphas_cumprod, exact)
        assert torch.allclose(exact.float(), scheduler.alphas_cumprod, rtol=1e-4)
    for options in (dict(trained_betas=[0.001, 0.002, 0.004]), dict(rescale_betas_zero_snr=True)):
        scheduler = ddim(**options)
        abar = from_diffusers(build("sd", scheduler)).schedule.alphas_cumprod
        assert torch.allclose(abar.float(), scheduler.alphas_cumprod, atol=1e-6)


def test_from_a_path_in_any_dtype(tmp_path):
    pipe = build("sd")
    pipe.save_pretrained(tmp_path)
    model = from_diffusers(tmp_path, device="cpu")
    assert model.dtype == torch.float32 and model.parameterization == "eps"
    assert not any(p.requires_grad for p in model.pipeline.vae.parameters())
    assert torch.equal(model.encode_prompts(PROMPTS), from_diffusers(pipe).encode_prompts(PROMPTS))
    assert from_diffusers(str(tmp_path), device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def refused(change):
    pipe = build("sd")
    change(pipe)
    with pytest.raises(ValueError) as error:
        from_diffusers(pipe)
    return str(error.value)


def test_what_is_unknown_is_refused_by_name(pipelines):
    schedulers = {
        "EDMEulerScheduler is not supported": diffusers.EDMEulerScheduler(),
        "FlowMatchHeunDiscreteScheduler is not supported": diffusers.FlowMatchHeunDiscreteScheduler(),
        "prediction_type = 'flow_prediction'": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),
        "stochastic_sampling = True": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    }  # fmt: skip
    for message, scheduler in schedulers.items():
        assert message in refused(lambda pipe, s=scheduler: pipe.register_modules(scheduler=s))
    assert "addition_embed_type = 'text'" in refused(lambda p: p.unet.register_to_config(addition_embed_type="text"))
    assert "class_embed_type = 'timestep'" in refused(lambda p: p.unet.register_to_config(class_embed_type="timestep"))
    assert "takes 9 channels" in refused(lambda p: p.unet.register_to_config(in_channels=9))
    assert "vae is AsymmetricAutoencoderKL" in refused(lambda p: p.register_modules(vae=diffusers.AsymmetricAutoencoderKL()))
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipelines["sd"][0].components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline is not supported; known are DDPMPipeline"):
        from_diffusers(inpaint)
    blocks = dict(block_out_channels=(32, 32), down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)
    with pytest.raises(ValueError, match="UNet2DModel is class-conditional"):
        from_diffusers((diffusers.UNet2DModel(num_class_embeds=3, **blocks), ddim()))
    with pytest.raises(ValueError, match="predicts 6 channels of 3: learned variances"):
        from_diffusers((diffusers.UNet2DModel(out_channels=6, **blocks), ddim()))


def test_wrong_arguments_are_one_sentence(pipelines):
    pipe, model = pipelines["sd"]
    for arguments, message in [
        (dict(prediction="noise"), "prediction = 'noise': known are"), (dict(size=(20, 15)), r"size = \(20, 15\)"),
        (dict(variant="fp16"), "variant: only for a path"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            from_diffusers(pipe, **arguments)
    with pytest.raises(ValueError, match="prediction = 'eps': with FlowMatch"):
        from_diffusers(pipelines["sd3"][0], prediction="eps")
    with pytest.raises(ValueError, match=r"x_t has shape \[1, 4, 7, 8\], but this pipeline takes \[B, 4, h, w\]"):
        model.network(torch.zeros(1, 4, 7, 8), torch.zeros(1), None)
    with pytest.raises(ValueError, match=r"images have shape \[1, 3, 15, 16\]"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="prompts = 3: give a string"):
        LatentDenoiser(model, 3)
    with pytest.raises(ValueError, match="prompts has 2 entries, but x_t has 3 samples"):
        LatentDenoiser(model, PROMPTS)(torch.zeros(3, 4, 8, 8), 500)
    for steps in (0, 2.5, 1001):
        with pytest.raises(ValueError, match="steps = "):
            model.schedule.levels(steps)
