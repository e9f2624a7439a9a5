"""LatentDiffusion against the published names and yaml, LatentDenoiser against diffusers and the written-out formula."""

import re
import time

import diffusers
import pytest
import torch
from common import randomised, reference
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from omegaconf import OmegaConf
from published import WIDTH, X_T, on_meta, shapes, shipped, tiny_config

from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.newton_sampler import newton_sampler
from ldm.sampling import jvp
from ldm.util import instantiate_from_config

# As published, with everything that only training uses.
UPSTREAM = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false   # Note: different from the one we trained before
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False

    scheduler_config: # 10000 warmup steps
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params:
        warm_up_steps: [ 10000 ]
        cycle_lengths: [ 10000000000000 ] # incredibly large number to prevent corner cases
        f_start: [ 1.e-6 ]
        f_max: [ 1. ]
        f_min: [ 1. ]

    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32 # unused
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [ 4, 2, 1 ]
        num_res_blocks: 2
        channel_mult: [ 1, 2, 4, 4 ]
        num_heads: 8
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: True
        legacy: False

    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult:
          - 1
          - 2
          - 4
          - 4
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity

    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


@pytest.fixture(scope="module")
def model():
    return randomised(instantiate_from_config(tiny_config()))


def test_v1_has_the_published_names_and_shapes_and_meta_is_fast():
    start = time.perf_counter()
    model = on_meta(shipped("stable-diffusion/v1-inference"))
    assert time.perf_counter() - start < 10
    assert shapes(model) == reference()
    counts = {name: sum(p.numel() for p in getattr(model, name).parameters())
              for name in ("model", "first_stage_model", "cond_stage_model")}  # fmt: skip
    assert counts == {"model": 859_520_964, "first_stage_model": 83_653_863, "cond_stage_model": 123_060_480}
    assert model.schedule.alphas_cumprod.device.type == "cpu"  # usable before the weights are there
    assert model.scale_factor == 0.18215


def test_the_published_yaml_works_unchanged():
    config = OmegaConf.create(UPSTREAM)
    assert shapes(on_meta(config.model)) == reference()


@pytest.mark.parametrize(("name", "prediction"), [("v2-inference", "eps"), ("v2-inference-v", "v")])
def test_v2_differs_from_v1_as_published(name, prediction):
    model = on_meta(shipped(f"stable-diffusion/{name}"))
    found, v1 = shapes(model), reference()
    assert model.parameterization == prediction
    unet = {k for k in found if k.startswith("model.")}
    assert unet == {k for k in v1 if k.startswith("model.")}
    assert found["model.diffusion_model.input_blocks.1.1.proj_in.weight"] == [320, 320]
    assert found["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == [320, 1024]
    assert sum(p.numel() for p in model.model.parameters()) == 865_910_724
    assert {k: v for k, v in found.items() if k.startswith("first_stage_model.")} == {
        k: v for k, v in v1.items() if k.startswith("first_stage_model.")
    }
    assert found["cond_stage_model.model.positional_embedding"] == [77, 1024]
    assert found["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"] == [3072, 1024]


def test_encode_is_the_scaled_mean_and_decode_its_inverse_scale(model):
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    posterior = model.first_stage_model.encode(images)
    z = model.encode(images)
    assert z.shape == (2, 4, 2, 3)
    torch.testing.assert_close(z, 0.18215 * posterior.mode())
    draws = [model.encode(images, sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.testing.assert_close(draws[0], 0.18215 * posterior.sample(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(model.decode(z), model.first_stage_model.decode(posterior.mode()))


def test_scale_by_std_is_a_buffer_as_published():
    model = on_meta(tiny_config(scale_by_std=True, scale_factor=0.2))
    assert model.state_dict()["scale_factor"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("cond", [None, "__is_unconditional__"])
def test_an_unconditional_model_is_an_ordinary_denoiser(cond):
    config = tiny_config(cond_stage_config=cond, conditioning_key=None)
    config["params"]["unet_config"]["params"] |= {"use_spatial_transformer": False, "context_dim": None}
    model = randomised(instantiate_from_config(config))
    x0 = Denoiser(model.network, model.schedule, model.parameterization)(torch.randn(1, 4, 8, 8), 500)
    assert x0.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="no text encoder"):
        LatentDenoiser(model, "a cat")


def test_other_conditioning_is_refused():
    with pytest.raises(ValueError, match="conditioning_key = 'hybrid'"):
        on_meta(tiny_config(conditioning_key="hybrid"))


PROMPTS = ["a photograph of a cat", "zwölf Boxkämpfer"]


def written_out(model, x_t, t, s):
    """Guidance by two calls of the network, then x0 from eps or v."""
    alpha = model.schedule.alphas_cumprod[t].item() ** 0.5
    sigma = (1 - alpha**2) ** 0.5
    time = torch.full((len(x_t),), t)
    cond = model.network(x_t, time, model.encode_prompts(PROMPTS[: len(x_t)]))
    uncond = model.network(x_t, time, model.encode_prompts([""] * len(x_t)))
    out = uncond + s * (cond - uncond)
    return alpha * x_t - sigma * out if model.parameterization == "v" else (x_t - sigma * out) / alpha


@pytest.mark.parametrize("s", [0, 0.3, 1, 3, 7.5, -1])
def test_guidance_is_the_formula_at_any_scale(model, s):
    x0 = LatentDenoiser(model, PROMPTS, guidance=s)(X_T, 600)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, written_out(model, X_T, 600, s), rtol=1e-4, atol=1e-4)


def test_guidance_of_a_v_model():
    model = randomised(instantiate_from_config(tiny_config(parameterization="v")))
    x0 = LatentDenoiser(model, PROMPTS, guidance=3.0)(X_T, 600)
    torch.testing.assert_close(x0, written_out(model, X_T, 600, 3.0), rtol=1e-4, atol=1e-4)


def test_guidance_equals_diffusers(model):
    """Their U-Net from the published names by their converter, their DDIM scheduler, the guidance of their pipeline."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), cross_attention_dim=WIDTH, attention_head_dim=8, layers_per_block=2
    )
    state = convert_ldm_unet_checkpoint(model.state_dict(), unet.config)
    unet.load_state_dict(state)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(20)
    negatives = ["blurry", ""]
    context = torch.cat([model.encode_prompts(negatives), model.encode_prompts(PROMPTS)])
    D = LatentDenoiser(model, PROMPTS, guidance=5.0, negative_prompts=negatives)
    with torch.no_grad():
        for t in (scheduler.timesteps[0], scheduler.timesteps[-1]):
            uncond, cond = unet(torch.cat([X_T, X_T]), t, encoder_hidden_states=context).sample.chunk(2)
            expected = scheduler.step(uncond + 5.0 * (cond - uncond), t, X_T).pred_original_sample
            torch.testing.assert_close(D(X_T, t.item()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("s", "batch"), [(0, 2), (1, 2), (0.5, 4), (7.5, 4)])
def test_one_call_of_the_network_and_the_text_only_once(model, monkeypatch, s, batch):
    D = LatentDenoiser(model, PROMPTS, guidance=s)
    sizes = []
    handle = model.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr(model.cond_stage_model, "encode", None)
    D(X_T, 10)
    handle.remove()
    assert sizes == [batch]


def test_samples_do_not_mix_and_one_prompt_serves_all(model):
    together = LatentDenoiser(model, PROMPTS, 4.0)(X_T, 700)
    for i, prompt in enumerate(PROMPTS):
        alone = LatentDenoiser(model, [prompt], 4.0)(X_T[i : i + 1], 700)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)
    one = LatentDenoiser(model, "a cat", 4.0, "a dog")
    two = LatentDenoiser(model, ["a cat"] * 2, 4.0, ["a dog"] * 2)
    torch.testing.assert_close(one(X_T, 700), two(X_T, 700), rtol=1e-4, atol=1e-4)


def test_wrong_number_of_prompts_is_one_sentence(model):
    for D in (LatentDenoiser(model, PROMPTS + ["three"], 2.0), LatentDenoiser(model, "a", 2.0, ["1", "2", "3"])):
        with pytest.raises(ValueError, match=re.compile(r"prompts has 3 entries, but x_t has 2 samples[^\n]*$")):
            D(X_T, 10)


@pytest.mark.parametrize("built_in_inference_mode", [False, True])
def test_inference_mode_and_forward_mode_differentiation(model, built_in_inference_mode):
    with torch.inference_mode(built_in_inference_mode):
        D = LatentDenoiser(model, PROMPTS, guidance=3.0)
    with torch.inference_mode():
        v = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        exact = jvp(D, X_T, 400, v, mode="forward-ad")
        difference = (D(X_T + 1e-2 * v, 400) - D(X_T - 1e-2 * v, 400)) / 2e-2
    assert (exact - difference).norm() < 2e-2 * exact.norm()


def test_the_sampler_runs_on_latents(model):
    known = torch.zeros(1, 4, 8, 8)

    def constraint(x0):
        return known - x0, (known - x0).flatten(1).norm(dim=1)

    D = LatentDenoiser(model, "a", 2.0)
    states = list(newton_sampler(D, constraint, (1, 4, 8, 8), [0], steps=2, newton_steps=1))
    assert states[-1].nfe == 6 and states[-1].x_t.isfinite().all()


def test_half_precision_weights_take_and_give_float32(model):
    half = randomised(instantiate_from_config(tiny_config())).to(torch.bfloat16)
    x0 = LatentDenoiser(half, PROMPTS, guidance=2.0)(X_T, 100)
    assert x0.dtype == torch.float32 and half.encode_prompts(PROMPTS).dtype == torch.float32
    torch.testing.assert_close(x0, LatentDenoiser(model, PROMPTS, guidance=2.0)(X_T, 100), rtol=0.05, atol=0.05)
    assert half.decode(half.encode(torch.zeros(1, 3, 16, 16))).dtype == torch.float32
