"""Text-to-image transformers of diffusers through the one adapter: small ones of random weights against their pipelines."""

import diffusers
import pytest
import torch
from common import randomised
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import ddim, tokenizer, vae
from transformers import T5Config, T5EncoderModel

from ldm.constraints import latent_inpainting
from ldm.denoisers import LatentDenoiser
from ldm.diffusers_models import from_diffusers
from ldm.masks import make_mask
from ldm.newton_sampler import sample
from ldm.profiles import profile
from ldm.sampling import jvp, seeded_noise

PROMPTS, NEGATIVES = ["a red cat", "two dogs"], ["ugly", "a blurred photo"]
FAMILIES = ["sana", "pixart", "lumina2", "chroma", "qwen", "z-image", "flux2"]


class Encoder(T5EncoderModel):
    """Stands for any text encoder: hidden states of its two layers, again and again, by token numbers and a mask."""

    def __init__(self):
        super().__init__(T5Config(vocab_size=514, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2))

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, use_cache=False):
        out = super().forward(input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states)
        out.hidden_states = out.hidden_states and out.hidden_states * 11
        return out


def chat_tokenizer():
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }} {% endfor %}"
    return words


def build(family):
    """A pipeline of the family's own class: every weight random, all its components small."""
    torch.manual_seed(0)
    flow, words = FlowMatchEulerDiscreteScheduler(shift=1.5), chat_tokenizer()
    common = dict(tokenizer=words, text_encoder=Encoder(), scheduler=flow, vae=vae(scaling_factor=0.4, shift_factor=0.1))
    if family == "sana":
        net = diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=4)  # fmt: skip
        scheduler = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1)  # fmt: skip
        dc = diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()), scaling_factor=0.4)  # fmt: skip
        pipe = diffusers.SanaPipeline(transformer=net, **common | dict(scheduler=scheduler, vae=dc))
    elif family == "pixart":
        net = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, sample_size=8, caption_channels=16,
            norm_num_groups=4)  # fmt: skip
        pipe = diffusers.PixArtSigmaPipeline(transformer=net, **common | dict(scheduler=ddim(), vae=vae(scaling_factor=0.4)))
    elif family == "lumina2":
        net = diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
            multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=16)  # fmt: skip
        pipe = diffusers.Lumina2Pipeline(transformer=net, **common)
    elif family == "chroma":
        net = diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe = diffusers.ChromaPipeline(transformer=net, **common | dict(scheduler=scheduler))
    elif family == "qwen":
        net = diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8))  # fmt: skip
        video = diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1, 0.2, 0.3, 0.4],
            latents_std=[1.0, 2.0, 3.0, 4.0])  # fmt: skip
        pipe = diffusers.QwenImagePipeline(transformer=net, **common | dict(vae=video))
    elif family == "z-image":
        net = diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 8],
            axes_lens=[600, 32, 32])  # fmt: skip
        pipe = diffusers.ZImagePipeline(transformer=net, **common)
    else:
        net = diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48,
            timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4))  # fmt: skip
        patches = diffusers.AutoencoderKLFlux2(
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=(8, 16),
            layers_per_block=1, latent_channels=4, norm_num_groups=4)  # fmt: skip
        patches.bn.running_mean.normal_(), patches.bn.running_var.uniform_(0.5, 2)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        cls = diffusers.Flux2KleinPipeline if family == "klein" else diffusers.Flux2Pipeline
        pipe = cls(
            transformer=net, **common | dict(scheduler=scheduler, vae=patches))  # fmt: skip
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            randomised(component)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def models():
    return {family: from_diffusers(build(family), size=(32, 32) if family == "sana" else (16, 16)) for family in FAMILIES}


def own_images(family, pipe, steps, x, guidance=1.0, negatives=None):
    """The images [B, 3, H, W] in 0 .. 1 of the pipeline's own sampling, from the noise x."""
    side = x.shape[-1] * pipe.vae_scale_factor * (2 if family in ("flux2", "klein") else 1)
    options = dict(num_inference_steps=steps, output_type="pt", height=side, width=side, guidance_scale=guidance)
    if negatives:
        options["negative_prompt"] = negatives
    if family in ("chroma", "qwen"):
        x = pipe._pack_latents(x, *x.shape)
    if family in ("sana", "pixart"):
        options["use_resolution_binning"] = False
    if family == "lumina2":
        options["cfg_normalization"] = False
    if family == "z-image":
        options["guidance_scale"] = guidance - 1
    if family == "flux2":
        options["guidance_scale"] = 4.0
    if family == "qwen":
        options |= dict(guidance_scale=None, true_cfg_scale=1.0)
    return pipe(prompt=list(PROMPTS), latents=x.clone(), **options).images


@pytest.mark.parametrize("family", [*FAMILIES, "klein"])
def test_unconstrained_samples_are_the_pipelines_own(family, models):
    model = models.get(family) or from_diffusers(build(family), size=(16, 16))
    shape = (2, model.channels, *model.latent_size)
    x = seeded_noise(shape, [3, 4])()
    state = sample(LatentDenoiser(model, PROMPTS), None, shape, [3, 4], steps=4)
    ours = (model.decode(state.x_t) / 2 + 0.5).clamp(0, 1)
    theirs = own_images(family, model.pipeline, 4, x).clamp(0, 1)
    assert ours.std() > 0.05 and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4
    assert not torch.allclose(sample(LatentDenoiser(model, "a lake"), None, shape, [3, 4], steps=4).x_t, state.x_t, atol=1e-3)


@pytest.mark.parametrize("family", ["sana", "pixart", "lumina2", "chroma", "z-image"])  # the others rescale, or have none
def test_guidance_and_negative_prompts(family, models):
    model = models[family]
    shape = (2, model.channels, *model.latent_size)
    x = seeded_noise(shape, [3, 4])()
    state = sample(LatentDenoiser(model, PROMPTS, 1.5, NEGATIVES), None, shape, [3, 4], steps=3)
    theirs = own_images(family, model.pipeline, 3, x, 1.5, list(NEGATIVES)).clamp(0, 1)
    rounding = 1e-3 if family == "pixart" else 1e-4  # eps is divided by a small alpha, and its betas are float32
    assert ((model.decode(state.x_t) / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < rounding


@pytest.mark.parametrize("family", ["qwen", "z-image"])  # whose contexts are as long as their prompts
def test_padding_changes_nothing(family, models):
    model = models[family]
    x = seeded_noise((1, model.channels, *model.latent_size), [3])()
    guided = LatentDenoiser(model, "a cat", 2.5, "a very long text of what is not wanted")
    assert guided.condition.shape == guided.negative.shape
    t = model.schedule.levels(4)[1].t
    with torch.no_grad():
        text, negative = LatentDenoiser(model, "a cat")(x, t), LatentDenoiser(model, "a very long text of what is not wanted")(x, t)
        torch.testing.assert_close(guided(x, t), negative + 2.5 * (text - negative), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_constrained_with_exact_products_and_gradients(family, models):
    """A sample is the same alone and in a batch; J v by forward differentiation, J^T v, and the decoder's gradient exist."""
    model = models[family]
    size = [n * model.downsampling for n in model.latent_size]
    images = 0.5 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    constraint = latent_inpainting(model, images, make_mask("right", size))
    options = dict(steps=2, newton_steps=1, h=0.1)  # a long difference: short ones magnify the rounding that a batch changes
    both = sample(LatentDenoiser(model, PROMPTS), constraint, constraint.y.shape, [5, 6], **options)
    assert both.nfe == 6 and torch.isfinite(both.x_t).all()
    constraint = latent_inpainting(model, images[1:], make_mask("right", size))
    D = LatentDenoiser(model, PROMPTS[1])
    alone = sample(D, constraint, constraint.y.shape, [6], **options)
    torch.testing.assert_close(alone.x_t[0], both.x_t[1], atol=2e-3, rtol=2e-3)

    x, v = (seeded_noise(constraint.y.shape, [seed])() for seed in (1, 2))
    t = model.schedule.levels(4)[1].t
    exact, difference = (jvp(D, x, t, v, h=0.002, mode=mode) for mode in ("forward-ad", "difference"))
    assert (exact - difference).norm() < 0.05 * exact.norm()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(D(x, t), x, v)
    assert abs((gradient * v).sum() - (exact * v).sum()) < 1e-3 * exact.norm() * v.norm()
    (gradient,) = torch.autograd.grad(model.decode(x).sum(), x)
    assert gradient.abs().max() > 0


def test_sizes_and_levels_are_the_pipelines_own(models):
    sides = {family: model.channels for family, model in models.items()}
    assert sides == dict.fromkeys(FAMILIES, 4) | {"flux2": 16}
    assert models["flux2"].downsampling == 4 and models["flux2"].latent_size == (4, 4)
    for family in ("chroma", "flux2"):  # whose shift follows the size
        pipe = models[family].pipeline
        small, large = (from_diffusers(pipe, size=(n, n)).schedule.levels(4) for n in (16, 128))
        assert small[2].sigma < large[2].sigma
        with pytest.raises(ValueError, match="noise levels of this pipeline, which depend on it"):
            LatentDenoiser(models[family], "a cat")(torch.zeros(1, models[family].channels, 16, 16), 500.0)
    sana = [round(level.sigma, 4) for level in models["sana"].schedule.levels(4)]  # shift 3 of 1 - i (1 - 1/1000) / 4
    assert sana == [0.9997, 0.8996, 0.7496, 0.4997, 0.0]


def test_profiles_know_their_guidance(models):
    large = {family: from_diffusers(models[family].pipeline, size=(128, 128)) for family in ("sana", "flux2")}
    assert {family: profile(model, "inpainting").guidance for family, model in large.items()} == {"sana": 5.0, "flux2": 1.0}
    assert profile(models["qwen"], "inpainting").kind == "tiny-flow"


def test_what_does_not_fit_is_one_sentence(models):
    model = models["chroma"]
    with pytest.raises(ValueError, match=r"x_t has shape \[1, 4, 7, 8\], but this pipeline takes \[B, 4, h, w\]"):
        model.network(torch.zeros(1, 4, 7, 8), torch.zeros(1), None)
    with pytest.raises(ValueError, match="prompts = 3: give a string"):
        LatentDenoiser(model, 3)
    with pytest.raises(ValueError, match=r"size = \(18, 16\): give \(height, width\) of images in positive multiples of 4 pixels"):
        from_diffusers(model.pipeline, size=(18, 16))
    with pytest.raises(ValueError, match="vae is AsymmetricAutoencoderKL; known are AutoencoderKL, AutoencoderTiny"):
        from_diffusers(model.pipeline, vae=diffusers.AsymmetricAutoencoderKL())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_and_weights_that_come_and_go(family, models):
    """16-bit weights take and give float32; offloaded ones stay where they are between two evaluations."""
    exact = models[family]
    x, t = seeded_noise((2, exact.channels, *exact.latent_size), [3, 4])(), 500  # pipelines round their times to 16 bits too
    expected = LatentDenoiser(exact, PROMPTS)(x, t)
    size = [n * exact.downsampling for n in exact.latent_size]
    half = from_diffusers(build(family), size=size, dtype=torch.bfloat16)
    x0 = LatentDenoiser(half, PROMPTS)(x, t)
    assert half.dtype == torch.bfloat16 and x0.dtype == torch.float32
    assert (x0 - expected).norm() < 0.1 * expected.norm()
    pipe = build(family)
    pipe.enable_model_cpu_offload(device="cpu")
    model = from_diffusers(pipe, size=size)
    assert torch.allclose(LatentDenoiser(model, PROMPTS)(x, t), expected, atol=1e-4, rtol=1e-4)
    assert hasattr(pipe.transformer, "_hf_hook") and model.decode(x).dtype == torch.float32
