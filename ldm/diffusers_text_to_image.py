"""Text-to-image transformers of diffusers, all by one adapter: an evaluation is a single step of the pipeline's own call.

How prompts, masks, positions, times and packed latents reach the network, and with which sign its output leaves it, stands in the
pipeline's `__call__` and nowhere else. So that is what runs, with a scheduler that hands over the network's output. The noise
levels come from there too: from the point where the call has set the scheduler's timesteps.
"""

import copy
import functools
import inspect

import torch
from torch.nn.utils.rnn import pad_sequence

from ldm.diffusers_pipeline import PipelineModel, check_prompts
from ldm.diffusers_schedules import FLOW_SCHEDULER


class Reached(Exception):
    """Ends a pipeline's call at the point of interest, with what there is to know then."""


class OneStep:
    """In the place of a pipeline's scheduler: one step at the time t [1], which ends the call with what the network predicts."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, scheduler, t):
        self.config, self.timesteps = scheduler.config, t

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        pass

    def set_begin_index(self, index):
        pass

    def scale_model_input(self, x_t, t):
        return x_t

    def step(self, out, *args, **kwargs):
        raise Reached(out)


class TextToImage(PipelineModel):
    """SANA, PixArt-Sigma, Lumina 2, Chroma, Qwen-Image, Z-Image, FLUX.2: text encoder, transformer, autoencoder.

    Guidance is plain classifier-free guidance with the scale s of `LatentDenoiser`. The pipelines of Qwen-Image and Lumina 2 also
    rescale the guided output, which is no part of D; Z-Image's guidance_scale is s - 1. A network that takes a guidance scale as
    an input (FLUX.2) gets `embedded_guidance`. x_t of FLUX.2 are the 2 x 2 patches that its pipeline calls latents. Compile the
    transformer (pipe.transformer.compile()), not D.
    """

    component = "transformer"

    def __init__(self, pipeline, size=None, prediction=None):
        self.embedded_guidance = {"ZImagePipeline": 0.0, "Flux2Pipeline": 4.0, "QwenImagePipeline": None}.get(
            type(pipeline).__name__, 1.0
        )  # the guidance_scale that leaves the prompt alone
        self.mask_dtype = None  # of the text encoder's mask, which networks look at
        super().__init__(pipeline, size, prediction)

    @property
    def packed(self):
        """Whether the network takes a list of 2 x 2 patches: then the pipeline has functions for both ways."""
        return hasattr(self.pipeline, "_unpack_latents")  # all that pipelines tell

    @property
    def channels(self):
        return self.net.config.in_channels // (4 if self.packed else 1)

    @property
    def multiple(self):
        config = self.net.config
        return 2 if self.packed else max(config.get("all_patch_size") or [config.patch_size])

    @property
    def default_size(self):
        own = self.net.config.get("sample_size") or getattr(self.pipeline, "default_sample_size", 128)  # not all have one
        return own * self.pipeline.vae_scale_factor // self.downsampling

    def call(self, scheduler, x_t, context, steps=1):
        """The pipeline's call with this scheduler for x_t [B, C, h, w] and a context [B, M, width + 1], up to `Reached`."""
        pipeline, call, mask = copy.copy(self.pipeline), type(self.pipeline).__call__, self.mask_name()
        vars(pipeline).update(
            scheduler=scheduler, maybe_free_model_hooks=lambda: None, _progress_bar_config=dict(disable=True)
        )  # components stay where they are, as if the loop went on
        embeds, known = context[..., :-1], context[..., -1] > 0.5
        if type(self.pipeline).__name__ == "ZImagePipeline":
            embeds = [tokens[those] for tokens, those in zip(embeds, known, strict=True)]
        height, width = (n * self.downsampling for n in x_t.shape[2:])
        given = dict(
            prompt_embeds=embeds, latents=self.pipeline._pack_latents(x_t, *x_t.shape) if self.packed else x_t, height=height,
            width=width, num_inference_steps=steps, guidance_scale=self.embedded_guidance, true_cfg_scale=1.0,
            use_resolution_binning=False)  # fmt: skip
        given |= {} if mask is None else {mask: known.to(self.mask_dtype or torch.int64)}
        given = {name: value for name, value in given.items() if name in inspect.signature(call).parameters}
        try:
            call.__wrapped__(pipeline, **given)  # without its torch.no_grad
        except Reached as reached:
            return reached.args[0]

    def predict(self, x_t, t, context):
        rounds = type(self.pipeline.scheduler).__name__ != FLOW_SCHEDULER  # its times down to integers
        out = self.call(OneStep(self.pipeline.scheduler, (t[:1] + 0.01).long() if rounds else t[:1]), x_t, context)
        if self.packed:
            height, width = (n * self.downsampling for n in x_t.shape[2:])
            out = self.pipeline._unpack_latents(out, height, width, self.pipeline.vae_scale_factor)
        elif out.ndim == 3:
            out = out.transpose(1, 2)  # [B, h w, C]
        return out.reshape(x_t.shape)

    def set_timesteps(self, scheduler, steps):
        """As the pipeline's own call does."""

        @functools.wraps(type(scheduler).set_timesteps)
        def set_timesteps(*args, **kwargs):
            type(scheduler).set_timesteps(scheduler, *args, **kwargs)
            raise Reached(None)

        spied = copy.copy(scheduler)
        spied.set_timesteps = set_timesteps
        x_t = torch.zeros(1, self.channels, *self.latent_size, device=self.device, dtype=self.dtype)
        self.call(spied, x_t, torch.ones(1, 1, 2, device=self.device, dtype=self.dtype), steps)

    def mask_name(self):
        """Of the call's argument that tells tokens from padding; None if there is none."""
        names = inspect.signature(type(self.pipeline).__call__).parameters
        return next((name for name in names if name.startswith("prompt") and name.endswith("mask")), None)

    def encode_prompts(self, prompts, negative=False):
        """As in PipelineModel. The context's last channel is 1 for tokens and 0 for padding."""
        prompts = check_prompts(prompts)
        encode, call = (inspect.signature(f).parameters for f in (self.pipeline.encode_prompt, type(self.pipeline).__call__))
        halves = "negative_prompt" in encode  # some pipelines treat negative prompts in a way of their own
        given = {name: call[name].default for name in encode if name in call}
        given |= dict(prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if halves and negative:
            given |= dict(prompt=[""] * len(prompts), negative_prompt=prompts, do_classifier_free_guidance=True)
        out = self.pipeline.encode_prompt(**{name: value for name, value in given.items() if name in encode})
        if halves:
            out = out[len(out) // 2 :] if negative else out[: len(out) // 2]
        tokens, mask = out[0], out[-1] if len(out) > 1 and torch.is_tensor(out[-1]) and out[-1].ndim == 2 else None
        if mask is not None:
            self.mask_dtype = mask.dtype
        elif torch.is_tensor(tokens):
            mask = tokens.new_ones(tokens.shape[:2])
        else:  # a list of as many tokens as there are
            mask = pad_sequence([x.new_ones(len(x)) for x in tokens], batch_first=True)
            tokens = pad_sequence(list(tokens), batch_first=True)
        return torch.cat([tokens, mask[..., None].to(tokens)], -1).float()

    def encode_negatives(self, prompts):
        """A negative prompt or several -> context."""
        return self.encode_prompts(prompts, negative=True)
