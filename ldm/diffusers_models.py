"""Pipelines of diffusers as models for our sampler: D(x_t, t), encode, decode, prompts, and the noise levels.

    model = from_diffusers("path or hub name")          # or a pipeline object
    constraint = latent_inpainting(model, image, mask)
    D = LatentDenoiser(model, "a mountain lake", guidance=3.0)
    state = sample(D, constraint, constraint.y.shape, seeds=[0])

All constants (betas, prediction type, scaling and shift factors, sample size, time spacing, flow shift) come from the pipeline's
own configs. The steps are ours, DDIM or Euler (ldm/diffusers_schedules.py). What only the pipelines' own sampling adds (clipping or
thresholding of x0, safety checker, watermark) is not part of D.
"""

import copy
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from einops import rearrange

from ldm.denoisers import LatentDenoiser
from ldm.diffusers_pipeline import PipelineModel
from ldm.diffusers_schedules import REVERSED
from ldm.diffusers_text_to_image import TextToImage
from ldm.util import resolve_device


def unpack(context, width, pooled):
    """The tokens [B, M, width] and the pooled embedding [B, pooled] of a context by `encode_prompts`."""
    return context[:, 0, :-pooled].unflatten(1, (-1, width)), context[:, 0, -pooled:]


class Pixels(PipelineModel):
    """DDPMPipeline and DDIMPipeline: an unconditional UNet2DModel on pixels; encode and decode are the identity."""

    downsampling, conditional = 1, False

    def check(self):
        config = self.net.config
        if type(self.net).__name__ != "UNet2DModel":
            raise ValueError(f"unet is {type(self.net).__name__}: {type(self.pipeline).__name__} is supported with UNet2DModel")
        if config.num_class_embeds is not None or config.class_embed_type is not None:
            raise ValueError("the UNet2DModel is class-conditional, which is not supported")
        if config.out_channels != config.in_channels:
            raise ValueError(
                f"the UNet2DModel predicts {config.out_channels} channels of {config.in_channels}: learned variances "
                "are not supported"
            )

    def encode(self, images):
        return images

    def decode(self, z):
        return z

    def encode_prompts(self, prompts):
        raise ValueError(f"{type(self.pipeline).__name__} has no text encoder: it is unconditional, take ldm.denoisers.Denoiser")

    def predict(self, x_t, t, context):
        return self.net(x_t, t, return_dict=False)[0]


def guidance_embedding(model, x_t):
    """What a U-Net that was distilled for guidance takes of its scale, [B, width]; None for others."""
    width = model.net.config.get("time_cond_proj_dim")
    if width is None:
        return None
    scale = torch.full((1,), model.embedded_guidance - 1.0, device=x_t.device)
    return model.pipeline.get_guidance_scale_embedding(scale, width).to(x_t).expand(len(x_t), -1)


class StableDiffusion(PipelineModel):
    """StableDiffusionPipeline, versions 1 and 2, rectified flows of its U-Net (InstaFlow), and latent consistency models, whose
    U-Net takes the scale of guidance as an input, `embedded_guidance`."""

    embedded_guidance = 8.5

    def embed(self, prompts):
        return self.pipeline.encode_prompt(prompts, self.device, 1, False)[0], None

    def predict(self, x_t, t, context):
        scale = guidance_embedding(self, x_t)
        return self.net(x_t, t, encoder_hidden_states=context, timestep_cond=scale, return_dict=False)[0]


class StableDiffusionXL(PipelineModel):
    """StableDiffusionXLPipeline: two text encoders, and the images' size as a condition (without crop)."""

    addition, embedded_guidance = "text_time", 8.5  # the latter as of StableDiffusion

    def embed(self, prompts):
        tokens, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return tokens, pooled

    def encode_prompts(self, prompts):
        context = super().encode_prompts(prompts)
        zeros = prompts is None and self.pipeline.config.get("force_zeros_for_empty_prompt", True)
        return torch.zeros_like(context) if zeros else context

    def predict(self, x_t, t, context):
        config = self.net.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        tokens, pooled = unpack(context, config.cross_attention_dim, pooled)
        h, w = (n * self.downsampling for n in x_t.shape[2:])
        time_ids = torch.tensor([[h, w, 0, 0, h, w]], dtype=x_t.dtype, device=x_t.device).expand(len(x_t), -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.net(x_t, t, encoder_hidden_states=tokens, timestep_cond=guidance_embedding(self, x_t), added_cond_kwargs=added,
                        return_dict=False)[0]  # fmt: skip

    def vae_dtype(self):
        """Its float16 autoencoder overflows where its config says so: then it becomes float32, and stays."""
        vae = self.pipeline.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(dtype=torch.float32)
        return vae.dtype


class StableDiffusion3(PipelineModel):
    """StableDiffusion3Pipeline: a flow, two or three text encoders."""

    component, uniform = "transformer", False

    @property
    def patch(self):
        return self.pipeline.transformer.config.patch_size

    def embed(self, prompts):
        tokens, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, self.device, do_classifier_free_guidance=False)
        return tokens, pooled

    def predict(self, x_t, t, context):
        config = self.net.config
        tokens, pooled = unpack(context, config.joint_attention_dim, config.pooled_projection_dim)
        return self.net(x_t, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=t, return_dict=False)[0]


class Flux(PipelineModel):
    """FluxPipeline: a flow on 2 x 2 patches of latents. Models distilled for guidance (FLUX.1-dev) take its scale as an input,
    `embedded_guidance`; classifier-free guidance is diffusers' true_cfg_scale."""

    component, patch = "transformer", 2
    embedded_guidance = 3.5

    @property
    def default_size(self):
        return self.pipeline.default_sample_size

    @property
    def channels(self):
        return self.net.config.in_channels // 4

    def embed(self, prompts):
        return self.pipeline.encode_prompt(prompts, None, self.device)[:2]

    def predict(self, x_t, t, context):
        config, (h, w) = self.net.config, (n // 2 for n in x_t.shape[2:])
        tokens, pooled = unpack(context, config.joint_attention_dim, config.pooled_projection_dim)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(x_t)  # [h w, 3]
        guidance = torch.full_like(t, self.embedded_guidance) if config.guidance_embeds else None
        out = self.net(hidden_states=rearrange(x_t, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
                       timestep=t / self.schedule.scale, guidance=guidance, encoder_hidden_states=tokens, pooled_projections=pooled,
                       txt_ids=tokens.new_zeros(tokens.shape[1], 3), img_ids=places, return_dict=False)[0]  # fmt: skip
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)


FAMILIES = {  # pipeline's class: (adapter, the prediction where the configs do not tell)
    "DDPMPipeline": (Pixels, None), "DDIMPipeline": (Pixels, None),
    "StableDiffusionPipeline": (StableDiffusion, None), "LatentConsistencyModelPipeline": (StableDiffusion, None),
    "StableDiffusionXLPipeline": (StableDiffusionXL, None),
    "StableDiffusion3Pipeline": (StableDiffusion3, None), "FluxPipeline": (Flux, None),
    "InstaFlowPipeline": (StableDiffusion, REVERSED),
    **{name: (TextToImage, None) for name in (
        "SanaPipeline", "PixArtSigmaPipeline", "Lumina2Pipeline", "ChromaPipeline", "QwenImagePipeline", "ZImagePipeline",
        "Flux2Pipeline", "Flux2KleinPipeline")},
}  # fmt: skip


def only_variant(folder):
    """The variant ("fp16") of the weights in a pipeline's folder where some component has no plain ones; None: all have."""
    variants, plain = set(), True
    for component in (path for path in Path(folder).iterdir() if path.is_dir()):
        files = [path.name for path in component.iterdir() if path.suffix in (".safetensors", ".bin")]
        found = [re.fullmatch(r"[^.]+?(?:\.([a-z]\w*))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)", name) for name in files]
        own = {match[1] for match in found if match}
        plain = plain and (None in own or not own)
        variants |= own if None not in own else set()
    if len(variants) > 1:
        raise ValueError(f"{folder} holds no plain weights, but several variants: give variant={' or '.join(sorted(variants))}")
    return None if plain else variants.pop()


def from_diffusers(
    source: str | Path | diffusers.DiffusionPipeline,
    size: Sequence[int] | None = None,
    prediction: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    vae: torch.nn.Module | None = None,
    **kwargs: Any,
) -> PipelineModel:
    """A diffusers pipeline as a model for the sampler: a PipelineModel.

    source      a pipeline object, (unet, scheduler) of a pixel model, or a path or hub name for DiffusionPipeline.from_pretrained,
                with further arguments `kwargs` (custom_pipeline ...)
    size        (height, width) of the images, in pixels; None: the pipeline's own. Noise levels of flows may depend on it
    prediction  "eps", "v", "x0", "velocity" (eps - x0) or "-velocity" (x0 - eps: InstaFlow loaded as a plain
                StableDiffusionPipeline) instead of the scheduler's prediction_type
    variant     of the weights, "fp16"; None: the plain ones, or in a folder the only variant there is
    vae         instead of the pipeline's autoencoder: an AutoencoderTiny, say, whose decoder's gradient is cheap. The pipeline
                keeps its own, so that two models can share a network: one to guide through, one for the last decoding
    device, dtype   None: where and what the pipeline is; of a path or name "auto" and float32

    ValueError, naming it, for a pipeline, scheduler, component or prediction type that is not supported.
    """
    if isinstance(source, (str, Path)):
        source = Path(source).expanduser() if Path(source).expanduser().is_dir() else source
        if isinstance(source, Path) and variant is None:
            variant = only_variant(source)
        kwargs |= {} if variant is None else {"variant": variant}
        with warnings.catch_warnings():  # the newer name of the argument is unknown to older versions, which would ignore it
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
            pipeline = diffusers.DiffusionPipeline.from_pretrained(str(source), torch_dtype=dtype or torch.float32, **kwargs)
        pipeline.to(resolve_device("auto" if device is None else device))
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False)  # the decoder's gradient is that of its input: less to be kept for it
    else:
        kwargs |= {} if variant is None else {"variant": variant}
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: only for a path or name, but source is a {type(source).__name__}")
        pipeline = diffusers.DDPMPipeline(*source) if isinstance(source, (tuple, list)) else source
        if device is not None or dtype is not None:
            pipeline.to(*[x for x in (device and resolve_device(device), dtype) if x is not None])
    if vae is not None:
        pipeline = copy.copy(pipeline)
        pipeline.register_modules(vae=vae)
    known = [c.__name__ for c in type(pipeline).__mro__ if c.__name__ in FAMILIES]
    if not known:
        raise ValueError(f"{type(pipeline).__name__} is not supported; known are {', '.join(FAMILIES)}")
    adapter, own = FAMILIES[known[0]]
    return adapter(pipeline, size, prediction or own)


def __getattr__(name):
    if name != "PipelineDenoiser":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("ldm.diffusers_models.PipelineDenoiser is now ldm.denoisers.LatentDenoiser", DeprecationWarning, stacklevel=2)
    return LatentDenoiser
