"""Diffusers pipelines as models: small ones of every family, of random weights, against the pipelines' own sampling."""

import json
from itertools import pairwise
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from common import randomised
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from ldm.constraints import inpainting, latent_inpainting
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.diffusers_models import PipelineDenoiser, from_diffusers
from ldm.inpainting import make_mask
from ldm.newton_sampler import jvp, sample, seeded_noise
from ldm.schedules import CLEAN

FAMILIES = ["pixels", "sd", "sd-v", "sdxl", "sd3", "flux", "sd-flow", "instaflow"]
TEXT = [name for name in FAMILIES if name != "pixels"]
PROMPTS = ["a red cat", "two dogs"]


class InstaFlowPipeline(diffusers.StableDiffusionPipeline):
    """Samples as diffusers' community pipeline of this name: x += v / steps, v = x0 - eps, at the times 1000 (1 - i / steps)."""

    @torch.no_grad()
    def __call__(self, prompts, num_inference_steps, latents, guidance_scale, negative_prompt=None, **_):
        tokens = self.encode_prompt(prompts, "cpu", 1, True, negative_prompt)
        for i in range(num_inference_steps):
            t = torch.full((2 * len(latents),), 1000 * (1 - i / num_inference_steps))
            v_u, v_c = self.unet(latents.repeat(2, 1, 1, 1), t, torch.cat(tokens[::-1])).sample.chunk(2)
            latents = latents + (v_u + guidance_scale * (v_c - v_u)) / num_inference_steps
        return SimpleNamespace(images=self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """CLIP's, of bytes only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [*bytes_to_unicode().values()]
    letters += [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=20)


def text_encoder(cls=CLIPTextModel, width=32):
    return cls(CLIPTextConfig(vocab_size=514, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              max_position_embeddings=20, projection_dim=width, bos_token_id=512, eos_token_id=513))  # fmt: skip


def vae(channels=4, **kwargs):
    return AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=8,
                         block_out_channels=(16, 32), latent_channels=channels, sample_size=16, **kwargs)  # fmt: skip


def unet(**kwargs):
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"cross_attention_dim": 32, "attention_head_dim": 2, **kwargs})  # fmt: skip


def ddim(**kwargs):
    options = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
    return DDIMScheduler(**{**options, "timestep_spacing": "trailing", **kwargs})


def build(family, tokenizer, scheduler=None):
    """A pipeline of the family's own class: every weight random, all its components small."""
    torch.manual_seed(0)
    euler = FlowMatchEulerDiscreteScheduler
    stable = dict(tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if family == "pixels":
        pipe = diffusers.DDIMPipeline(
            diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
                                  norm_num_groups=8, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                  up_block_types=("AttnUpBlock2D", "UpBlock2D")),
            scheduler or DDIMScheduler(clip_sample=False))  # fmt: skip
    elif family in ("sd", "sd-v", "sd-flow", "instaflow"):
        default = dict(sd=ddim(), instaflow=ddim()) | {"sd-v": ddim(prediction_type="v_prediction", timestep_spacing="leading"),
                                                       "sd-flow": euler(shift=1.5)}  # fmt: skip
        cls = InstaFlowPipeline if family == "instaflow" else diffusers.StableDiffusionPipeline
        pipe = cls(vae=vae(scaling_factor=0.3), text_encoder=text_encoder(), unet=unet(),
                   scheduler=scheduler or default[family], **stable)  # fmt: skip
    elif family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.2), text_encoder=text_encoder(), text_encoder_2=text_encoder(CLIPTextModelWithProjection, 16),
            tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler or ddim(), add_watermarker=False,
            unet=unet(cross_attention_dim=48, addition_embed_type="text_time", addition_time_embed_dim=8,
                      projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(1, 2)))  # fmt: skip
    elif family == "sd3":
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=diffusers.SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=2,
                                                        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
                                                        caption_projection_dim=32, pooled_projection_dim=48, out_channels=4),
            vae=vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=text_encoder(CLIPTextModelWithProjection), tokenizer=tokenizer,
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, 16), tokenizer_2=tokenizer,
            text_encoder_3=None, tokenizer_3=None, scheduler=scheduler or euler(shift=3.0))  # fmt: skip
    else:
        pipe = diffusers.FluxPipeline(
            transformer=diffusers.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
                                                         attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
                                                         pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True),
            vae=vae(scaling_factor=0.4, shift_factor=0.1), text_encoder=text_encoder(), tokenizer=tokenizer, tokenizer_2=tokenizer,
            text_encoder_2=T5EncoderModel(T5Config(vocab_size=514, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)),
            scheduler=scheduler or euler(use_dynamic_shifting=True))  # fmt: skip
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            randomised(component)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipelines(tokenizer):
    """Each family once, with its model for the sampler on pictures of 16 x 16 (pixels: 8 x 8)."""
    pipes = {family: build(family, tokenizer) for family in FAMILIES}
    return {family: (pipe, from_diffusers(pipe, size=(8, 8) if family == "pixels" else (16, 16))) for family, pipe in pipes.items()}


def denoiser(model, guidance=2.5, negative_prompts=None):
    if type(model).__name__ == "Pixels":
        return Denoiser(model.network, model.schedule, model.parameterization)
    return PipelineDenoiser(model, PROMPTS, guidance, negative_prompts)


def own_images(family, pipe, steps, x, guidance=2.5, negative_prompts=None):
    """The pictures [B, C, H, W] in 0 .. 1 of the pipeline's own sampling, from the noise x."""
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


@pytest.mark.parametrize("family", TEXT)
def test_negative_prompts_and_guidance(family, pipelines):
    pipe, model = pipelines[family]
    shape, negative = (2, model.channels, *model.latent_size), ["ugly", "a cat"]
    x = seeded_noise(shape, [3, 4])()
    state = sample(denoiser(model, 4.0, negative), None, shape, [3, 4], steps=3)
    theirs = own_images(family, pipe, 3, x, 4.0, negative).clamp(0, 1)
    assert ((model.decode(state.x_t) / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 1e-4
    if family != "sdxl":  # where no negative prompt is not an empty one
        assert torch.equal(LatentDenoiser(model, PROMPTS, 4.0).negative_tokens, model.encode_prompts(None))


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
    alone = sample(PipelineDenoiser(model, PROMPTS[1], 2.5), constraint, constraint.y.shape, [6], **options)
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
def test_bfloat16_weights_take_and_give_float32(family, tokenizer, pipelines):
    model = from_diffusers(build(family, tokenizer), size=pipelines[family][1].latent_size if family == "pixels" else (16, 16),
                           dtype=torch.bfloat16)  # fmt: skip
    shape = (2, model.channels, *model.latent_size)
    assert model.dtype == torch.bfloat16
    x, t = seeded_noise(shape, [3, 4])(), 500
    with torch.no_grad():
        x0, exact = (denoiser(m, 1.0)(x, t) for m in (model, pipelines[family][1]))
        assert x0.dtype == torch.float32 and model.decode(x0).dtype == torch.float32
    assert (x0 - exact).norm() < 0.1 * exact.norm()


def test_latents_mean_and_std_and_float16_of_sdxl(tokenizer):
    pipe = build("sdxl", tokenizer)
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


def test_sizes_come_from_the_configs_and_the_dynamic_shift_from_the_size(tokenizer, pipelines):
    for family, side in {"pixels": 8, "sd": 8, "sdxl": 8, "sd3": 8}.items():
        assert from_diffusers(build(family, tokenizer)).image_size == side
    assert pipelines["flux"][0].default_sample_size == from_diffusers(pipelines["flux"][0]).image_size
    pipe = pipelines["flux"][0]
    small, large = (from_diffusers(pipe, size=(n, n)) for n in (16, 128))
    assert small.schedule.levels(4)[2].sigma < large.schedule.levels(4)[2].sigma  # more noise for larger pictures
    with pytest.raises(ValueError, match=r"x_t has the size \[8, 8\], but the noise levels .* for \[64, 64\]"):
        sample(PipelineDenoiser(large, "a cat"), None, (1, 4, 8, 8), [0])
    other = from_diffusers(pipelines["sd"][0], size=(32, 24))  # without a dynamic shift any size goes
    assert sample(PipelineDenoiser(other, "a cat"), None, (1, 4, 8, 12), [0], steps=1).x_t.shape == (1, 4, 8, 12)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
                                  "UniPCMultistepScheduler"])  # fmt: skip
def test_other_solvers_of_the_same_diffusion_are_sampled_by_ddim(name, tokenizer, pipelines):
    """At their own time spacing, as the pipeline does after `DDIMScheduler.from_config(pipe.scheduler.config)`."""
    options = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1)
    scheduler = getattr(diffusers, name)(**options)
    model = from_diffusers(build("sd", tokenizer, scheduler))
    assert [level.t for level in model.schedule.levels(4)] == [751, 501, 251, 1, None]
    expected = pipelines["sd"][1].schedule
    assert torch.allclose(model.schedule.alphas_cumprod, expected.alphas_cumprod)
    spaced = getattr(diffusers, name)(**{**options, "timestep_spacing": "trailing"})
    assert [level.t for level in from_diffusers(build("sd", tokenizer, spaced)).schedule.levels(4)] == [999, 749, 499, 249, None]


def test_zero_terminal_signal_to_noise_ratio(tokenizer):
    """Rescaled betas: abar is 0 at the noisy end, where v-prediction gives x0 = -v."""
    pipe = build("sd", tokenizer, ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True))
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


def test_from_a_path_in_any_dtype(tokenizer, tmp_path):
    pipe = build("sd", tokenizer)
    pipe.save_pretrained(tmp_path)
    model = from_diffusers(tmp_path, device="cpu")
    assert model.dtype == torch.float32 and model.parameterization == "eps"
    assert torch.equal(model.encode_prompts(PROMPTS), from_diffusers(pipe).encode_prompts(PROMPTS))
    assert from_diffusers(str(tmp_path), device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_attention_slicing_changes_nothing(tokenizer, pipelines):
    pipe = build("sd", tokenizer)
    pipe.enable_attention_slicing("max")
    model = from_diffusers(pipe)
    shape = (2, 4, 8, 8)
    sliced = sample(denoiser(model), None, shape, [3, 4], steps=2).x_t
    torch.testing.assert_close(sliced, sample(denoiser(pipelines["sd"][1]), None, shape, [3, 4], steps=2).x_t, atol=1e-4, rtol=1e-4)


def refused(tokenizer, change):
    pipe = build("sd", tokenizer)
    change(pipe)
    with pytest.raises(ValueError) as error:
        from_diffusers(pipe)
    return str(error.value)


def test_what_is_unknown_is_refused_by_name(tokenizer, pipelines):
    schedulers = {
        "EDMEulerScheduler is not supported": diffusers.EDMEulerScheduler(),
        "FlowMatchHeunDiscreteScheduler is not supported": diffusers.FlowMatchHeunDiscreteScheduler(),
        "prediction_type = 'flow_prediction'": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),
        "stochastic_sampling = True": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    }  # fmt: skip
    for message, scheduler in schedulers.items():
        assert message in refused(tokenizer, lambda pipe, s=scheduler: pipe.register_modules(scheduler=s))
    assert "addition_embed_type = 'text'" in refused(tokenizer, lambda p: p.unet.register_to_config(addition_embed_type="text"))
    assert "time_cond_proj_dim = 256" in refused(tokenizer, lambda p: p.unet.register_to_config(time_cond_proj_dim=256))
    assert "takes 9 channels" in refused(tokenizer, lambda p: p.unet.register_to_config(in_channels=9))
    assert "vae is AutoencoderTiny" in refused(tokenizer, lambda p: p.register_modules(vae=diffusers.AutoencoderTiny()))
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
        PipelineDenoiser(model, 3)
    with pytest.raises(ValueError, match="prompts has 2 entries, but x_t has 3 samples"):
        PipelineDenoiser(model, PROMPTS)(torch.zeros(3, 4, 8, 8), 500)
    for steps in (0, 2.5, 1001):
        with pytest.raises(ValueError, match="steps = "):
            model.schedule.levels(steps)
