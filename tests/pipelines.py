"""Small diffusers pipelines of every family, with random weights: nothing is fetched."""

import functools
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from common import randomised
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from ldm.denoisers import Denoiser, LatentDenoiser

PROMPTS = ["a red cat", "two dogs"]
FAMILIES = ["pixels", "sd", "sd-v", "sdxl", "sd3", "flux", "sd-flow", "instaflow"]


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


@functools.cache
def tokenizer():
    """CLIP's, of bytes only."""
    letters = [*bytes_to_unicode().values()]
    letters += [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
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


def build(family, scheduler=None):
    """A pipeline of the family's own class: every weight random, all its components small."""
    torch.manual_seed(0)
    euler = FlowMatchEulerDiscreteScheduler
    stable = dict(tokenizer=tokenizer(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
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
            tokenizer=tokenizer(), tokenizer_2=tokenizer(), scheduler=scheduler or ddim(), add_watermarker=False,
            unet=unet(cross_attention_dim=48, addition_embed_type="text_time", addition_time_embed_dim=8,
                      projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(1, 2)))  # fmt: skip
    elif family == "sd3":
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=diffusers.SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=2,
                                                        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
                                                        caption_projection_dim=32, pooled_projection_dim=48, out_channels=4),
            vae=vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=text_encoder(CLIPTextModelWithProjection), tokenizer=tokenizer(),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, 16), tokenizer_2=tokenizer(),
            text_encoder_3=None, tokenizer_3=None, scheduler=scheduler or euler(shift=3.0))  # fmt: skip
    else:
        pipe = diffusers.FluxPipeline(
            transformer=diffusers.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
                                                         attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
                                                         pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True),
            vae=vae(scaling_factor=0.4, shift_factor=0.1), text_encoder=text_encoder(),
            text_encoder_2=T5EncoderModel(T5Config(vocab_size=514, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)),
            tokenizer=tokenizer(), tokenizer_2=tokenizer(),
            scheduler=scheduler or euler(use_dynamic_shifting=True))  # fmt: skip
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            randomised(component)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(model, guidance=2.5, negative_prompts=None):
    """D of a pipeline's model, for PROMPTS where it takes text."""
    if type(model).__name__ == "Pixels":
        return Denoiser(model.network, model.schedule, model.parameterization)
    return LatentDenoiser(model, PROMPTS, guidance, negative_prompts)
