"""What the adapters of diffusers pipelines share: a pipeline as a model, D's network with its noise levels, encode and decode."""

import math
from contextlib import contextmanager

import numpy as np
import torch

from ldm import diffusers_autoencoders as autoencoders
from ldm.diffusers_schedules import FLOW_SCHEDULER, dynamic_shift, read_scheduler
from ldm.images import check_finite


@contextmanager
def ordinary_tensors():
    """Inference mode off, whether gradients are recorded as it is: weights that an offloading hook moves to the device meanwhile
    would else become inference tensors, which a later gradient (of the decoder) could not pass."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


class Network:
    """(x_t [B, channels, h, w], t [B], context) -> prediction of x_t's shape and dtype, whatever the dtype of the weights."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x_t, t, context=None):
        model, size = self.model, tuple(x_t.shape[2:])
        if x_t.ndim != 4 or x_t.shape[1] != model.channels or any(n % model.multiple for n in size):
            raise ValueError(
                f"x_t has shape {list(x_t.shape)}, but this pipeline takes [B, {model.channels}, h, w] with h and w "
                f"divisible by {model.multiple}"
            )
        if model.fixed_size and size != model.latent_size:
            raise ValueError(
                f"x_t has the size {list(size)}, but the noise levels of this pipeline, which depend on it, are those "
                f"for {list(model.latent_size)}: give from_diffusers the size in pixels"
            )
        with ordinary_tensors():
            out = model.predict(x_t.to(model.dtype), t, context if context is None else context.to(model.dtype))
        return -out.to(x_t.dtype) if model.reversed else out.to(x_t.dtype)


class PipelineModel:
    """What the sampler, constraints and `LatentDenoiser` need of a model (ldm.models.diffusion.ddpm.LatentDiffusion), here of a
    diffusers pipeline on latents.

    network, schedule, parameterization   see Denoiser
    channels, latent_size, image_size     of x_t: [B, channels, *latent_size] by default; image_size is the shorter side
    downsampling                          pixels per latent pixel
    device, dtype                         where x_t belongs, and of the network's weights

    Each family below adds `embed`, a list of prompts -> (tokens [B, M, width], pooled embedding [B, P] or None), and `predict`, the
    network on tensors of its own dtype. Components keep their place: offloading, attention slicing, VAE tiling, quantisation and
    LoRA of the pipeline stay in force.
    """

    component = "unet"  # of the pipeline: the network
    default_size = None  # of latents, where it does not stand in the network's config
    patch: int | None = None  # side of the patches of a transformer, in latent pixels
    addition: str | None = None  # a U-Net's addition_embed_type
    conditional = True  # whether the network takes prompts
    uniform = True  # before the shift, sigma is 1, 1 - 1/steps ... 1/steps (Flux); otherwise what a flow's scheduler takes (SD3)

    def __init__(self, pipeline, size=None, prediction=None):
        self.pipeline = pipeline
        self.net = pipeline.components[self.component]
        self.dtype = self.net.dtype
        self.check()
        own = self.default_size or self.net.config.sample_size
        own = (own, own) if isinstance(own, int) else tuple(own)
        size = tuple(n * self.downsampling for n in own) if size is None else tuple(size)
        multiple = self.downsampling * self.multiple
        if len(size) != 2 or min(size) < 1 or any(n % multiple for n in size):
            raise ValueError(f"size = {size}: give (height, width) of images in positive multiples of {multiple} pixels")
        self.latent_size = tuple(n // self.downsampling for n in size)
        self.image_size = min(self.latent_size)
        self.network = Network(self)
        self.schedule, self.parameterization, self.reversed = read_scheduler(pipeline.scheduler, prediction, self.set_timesteps)
        self.fixed_size = bool(pipeline.scheduler.config.get("use_dynamic_shifting"))  # noise levels are those of one size

    def set_timesteps(self, scheduler, steps):
        """As the pipeline sets those of its flow's scheduler, at this size."""
        if type(scheduler).__name__ != FLOW_SCHEDULER:
            return scheduler.set_timesteps(steps)
        tokens = math.prod(n // (self.patch or 1) for n in self.latent_size)
        sigmas = np.linspace(1.0, 1 / steps, steps) if self.uniform else None
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=dynamic_shift(scheduler.config, tokens))

    def parameters(self):
        """Those of all components, as of a module."""
        return (p for part in self._modules() for p in part.parameters())

    def buffers(self):
        """Likewise."""
        return (b for part in self._modules() for b in part.buffers())

    def _modules(self):
        return [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]

    @property
    def device(self):
        return self.pipeline._execution_device  # of the computation, where components are offloaded

    @property
    def channels(self):
        return self.net.config.in_channels

    @property
    def downsampling(self):
        return autoencoders.downsampling(self.pipeline.vae)

    @property
    def multiple(self):
        """What the height and width of x_t have to be divisible by."""
        return self.patch or 2 ** (len(self.net.config.block_out_channels) - 1)

    def check(self):
        """ValueError, with the name of what it is, for components that this adapter would misread."""
        config, channels = self.net.config, autoencoders.channels(self.pipeline.vae)
        if self.channels != channels:
            raise ValueError(
                f"the network takes {self.channels} channels, but the autoencoder's latents have {channels}: give the plain "
                "text-to-image pipeline"
            )
        for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if config.get(name) is not None:
                raise ValueError(f"{name} = {config[name]!r} in the network's config is not supported")
        if config.get("addition_embed_type") != self.addition:
            raise ValueError(
                f"addition_embed_type = {config.get('addition_embed_type')!r} in the network's config: "
                f"{type(self.pipeline).__name__} is supported with {self.addition!r}"
            )

    def encode(self, images):
        """Images [B, 3, H, W] in -1 .. 1 -> z [B, channels, H/f, W/f], the posterior's mean, shifted and scaled."""
        f = self.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or any(n == 0 or n % f for n in images.shape[2:]):
            raise ValueError(
                f"images have shape {list(images.shape)}, but this pipeline takes [B, 3, H, W] with H and W divisible by {f}"
            )
        mean, std = autoencoders.statistics(self.pipeline.vae, images)
        with ordinary_tensors():
            z = autoencoders.encode(self.pipeline.vae, images.to(self.device, self.vae_dtype()))
        return (z.to(images) - mean) / std

    def decode(self, z):
        """Latents z [B, channels, h, w] -> images [B, 3, f h, f w], about -1 .. 1, not clipped. Differentiable.
        FloatingPointError where a value is NaN or infinite."""
        mean, std = autoencoders.statistics(self.pipeline.vae, z)
        with ordinary_tensors():
            image = autoencoders.decode(self.pipeline.vae, (z * std + mean).to(self.device, self.vae_dtype()))
        return check_finite(image.to(z), "the decoder's image")

    def vae_dtype(self):
        return self.pipeline.vae.dtype

    def encode_prompts(self, prompts):
        """A string or a list of B strings -> context [B, M, width] float32 for `network`; None: for no negative prompt. Where the
        network takes a pooled embedding too, both travel as one vector, [B, 1, M * width + P]."""
        tokens, pooled = self.embed(check_prompts(prompts))
        return (tokens if pooled is None else torch.cat([tokens.flatten(1), pooled.to(tokens)], 1)[:, None]).float()

    def encode_negatives(self, prompts):
        """Likewise, of negative prompts."""
        return self.encode_prompts(prompts)


def check_prompts(prompts):
    """A list of strings. ValueError for what is no prompt."""
    prompts = [prompts or ""] if prompts is None or isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts = {prompts!r}: give a string or a list of at least one string")
    return list(prompts)
