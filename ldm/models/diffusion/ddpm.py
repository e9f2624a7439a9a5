"""Diffusion models as checkpoints hold them: the U-Net under `model.diffusion_model` and the noise schedule's buffers.

Inference shells only. Training is in ldm/training.py, sampling in ldm/newton_sampler.py.
"""

import torch
from torch import nn

from ldm.denoisers import PREDICTIONS
from ldm.images import check_finite
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.labels import class_labels
from ldm.schedules import DiffusionSchedule, FlowSchedule, make_beta_schedule, with_zero_terminal_snr
from ldm.util import instantiate_from_config

# What published configs carry for upstream's own training and logging, without meaning for the network.
TRAINING_KEYS = {
    "base_learning_rate", "ckpt_path", "clip_denoised", "cond_stage_forward", "cond_stage_key",
    "cond_stage_trainable", "elbo_weight", "finetune_keys", "first_stage_key", "force_null_conditioning",
    "given_betas", "ignore_keys", "l_simple_weight", "learn_logvar", "load_only_unet", "log_every_t", "logvar_init",
    "loss_type", "make_it_fit", "monitor", "num_timesteps_cond", "original_elbo_weight", "reset_ema",
    "reset_num_ema_updates", "scale_by_std", "scheduler_config", "ucg_training", "unet_trainable", "use_ema",
    "use_positional_encodings", "v_posterior",
}  # fmt: skip


# How a condition c reaches the U-Net, by the conditioning_key of published configs.
CONDITIONINGS = {
    None:        lambda unet, x, t, c: unet(x, t, c),                        # c is None
    "crossattn": lambda unet, x, t, c: unet(x, t, c),                        # tokens [B, M, context_dim]
    "adm":       lambda unet, x, t, c: unet(x, t, y=c),                      # class labels [B]
    "concat":    lambda unet, x, t, c: unet(torch.cat([x, c], dim=1), t),    # an image or a latent of x's height and width
}  # fmt: skip


class DiffusionWrapper(nn.Module):
    """The network as samplers call it, whatever its condition: (x_t [B, C, H, W], t [B], condition) -> prediction of x_t's shape.

    Holds the U-Net under the published name `diffusion_model`. A U-Net with learned variance (Nichol & Dhariwal 2021) gives
    twice the channels: the second half is dropped here, since no sampler of ours uses the variance.
    """

    def __init__(self, unet_config, conditioning_key=None):
        super().__init__()
        self.diffusion_model = instantiate_from_config(unet_config)
        self.conditioning_key = conditioning_key

    def forward(self, x, t, condition=None):
        out = CONDITIONINGS[self.conditioning_key](self.diffusion_model, x, t, condition)
        return out.chunk(2, dim=1)[0] if out.shape[1] == 2 * x.shape[1] else out


class DDPM(nn.Module):
    """A denoising diffusion model on pixels (Ho et al. 2020), or a rectified flow (Liu et al. 2023).

    parameterization: what the network predicts, "eps", "v" or "x0", or "velocity": then it is a flow with times up to
    `timesteps`, and the betas mean nothing.
    conditioning_key: None, or "adm" for a class-conditional model; a LatentDiffusion takes more.
    zero_terminal_snr: the schedule ends at pure noise (Lin et al. 2023).
    `schedule` (DiffusionSchedule or FlowSchedule) is what all computations use; the buffers exist because checkpoints hold them.
    """

    def __init__(
        self,
        unet_config,
        timesteps=1000,
        beta_schedule="linear",
        linear_start=1e-4,
        linear_end=2e-2,
        cosine_s=8e-3,
        image_size=256,
        channels=3,
        parameterization="eps",
        conditioning_key=None,
        zero_terminal_snr=False,
        **training_keys,
    ):
        super().__init__()
        if unknown := sorted(set(training_keys) - TRAINING_KEYS):
            raise ValueError(f"unknown model parameters in the config: {', '.join(unknown)}")
        if training_keys.get("given_betas") is not None:
            raise ValueError("given_betas is not supported: give beta_schedule, linear_start and linear_end")
        if parameterization not in PREDICTIONS:
            raise ValueError(f"parameterization = {parameterization!r}: known are {', '.join(map(repr, PREDICTIONS))}")
        self.image_size = image_size
        self.channels = channels
        self.parameterization = parameterization
        if conditioning_key not in CONDITIONINGS:
            known = ", ".join(map(repr, CONDITIONINGS))
            raise ValueError(f"conditioning_key = {conditioning_key!r}: known are {known}")
        self.conditioning_key = conditioning_key
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        if parameterization == "velocity":
            self.schedule = FlowSchedule(scale=timesteps)
            return
        with torch.device("cpu"):  # real numbers even where the weights are built on "meta", to be loaded later
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
            betas = with_zero_terminal_snr(betas) if zero_terminal_snr else betas
            self.schedule = DiffusionSchedule(betas)
            for name, values in published_buffers(betas).items():
                self.register_buffer(name, values.float())

    @property
    def network(self):
        """(x_t [B, C, H, W], t [B], condition) -> prediction of x_t's shape. The condition is what `encode_prompts` gives."""
        return self.model

    @property
    def unet(self):
        """The U-Net inside the network, with its own arguments and all its output channels."""
        return self.model.diffusion_model

    @property
    def dtype(self):
        """Of the U-Net's weights."""
        return next(self.model.parameters()).dtype

    @property
    def device(self):
        """Where the U-Net's weights are, and x_t belongs."""
        return next(self.model.parameters()).device

    @property
    def downsampling(self):
        """Pixels per pixel of x_t: 1, but for latents."""
        return 1

    @property
    def multiple(self):
        """What the height and width of x_t have to be divisible by."""
        return self.unet.multiple

    def encode(self, images):
        """The images themselves, as this model has no autoencoder."""
        return images

    def decode(self, z):
        """z itself."""
        return z

    @property
    def conditional(self):
        """Whether the network needs a condition, prompts or class labels."""
        return self.conditioning_key is not None

    def forward(self, x_t, t, condition=None):
        return self.network(x_t, t, condition)

    def encode_prompts(self, prompts):
        """Class labels -> labels [B], int64, the network's condition. See `class_labels` for what may be given."""
        if self.conditioning_key != "adm":
            raise ValueError("this model takes no prompts and no labels: it is unconditional")
        return class_labels(prompts, self.unet.num_classes).to(self.unet.label_emb.weight.device)

    def encode_negatives(self, prompts):
        """The condition that guidance leads away from: `encode_prompts`, but for pipelines with other words around them."""
        return self.encode_prompts(prompts)


class LatentDiffusion(DDPM):
    """Diffusion in the latent space of an autoencoder, with or without a condition (Rombach et al. 2022).

    Images are [B, 3, H, W] in -1 .. 1, latents z [B, channels, H/f, W/f] with f = first_stage_model.downsampling. All of them
    are float32, whatever the dtype of the weights. The remaining arguments are those of DDPM. The condition is text or a class
    by cross-attention ("crossattn": Stable Diffusion, cin256-v2), an image ("concat": bsr_sr), or there is none.
    """

    def __init__(
        self,
        first_stage_config,         # the autoencoder
        cond_stage_config=None,     # the encoder of the condition; None or "__is_unconditional__": there is none
        conditioning_key=None,      # how the condition reaches the U-Net: "crossattn" or "concat"
        concat_mode=True,           # without conditioning_key: "concat" instead of "crossattn"
        scale_factor=1.0,           # z = scale_factor * (the autoencoder's latent), which brings z to unit variance
        scale_by_std=False,         # scale_factor was measured in training: it stands in the checkpoint, as a buffer
        **ddpm,
    ):  # fmt: skip
        conditional = cond_stage_config not in (None, "__is_unconditional__")
        if conditional and conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, **ddpm)
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        else:
            self.scale_factor = float(scale_factor)
        self.first_stage_model = instantiate_from_config(first_stage_config)
        self.cond_stage_model = instantiate_from_config(cond_stage_config) if conditional else None

    @property
    def downsampling(self):
        """Pixels per latent pixel: f."""
        return self.first_stage_model.downsampling

    @property
    def conditional(self):
        return self.cond_stage_model is not None

    def encode(self, images, sample=False, generator=None):
        """Images [B, 3, H, W] in -1 .. 1 -> z [B, channels, H/f, W/f]: of a variational autoencoder the posterior's mean, or
        (sample) a draw; of a VQ autoencoder the latent before quantisation."""
        z = self.first_stage_model.encode(images)
        if isinstance(z, DiagonalGaussianDistribution):
            z = z.sample(generator) if sample else z.mode()
        return self.scale_factor * z

    def decode(self, z):
        """Latents z [B, channels, h, w] -> images [B, 3, f h, f w], about -1 .. 1, not clipped. FloatingPointError where a value
        is NaN or infinite."""
        image = self.first_stage_model.decode(z / self.scale_factor)
        return check_finite(image, "the decoder's image")

    def encode_prompts(self, prompts):
        """The condition of the network, from a string or a list of B strings, "" being the empty prompt (text), from class labels
        (`class_labels`), or from images [B, C, H, W] (concat). None is the empty prompt."""
        prompts = "" if prompts is None else prompts
        if self.cond_stage_model is None:
            raise ValueError("this model has no text encoder and takes no labels: it is unconditional")
        return self.cond_stage_model(prompts) if self.conditioning_key == "concat" else self.cond_stage_model.encode(prompts)


def published_buffers(betas):
    """The schedule's buffers by their names in published checkpoints, each [T] in float64 (Ho et al. 2020, eqs. 4 and 7)."""
    abar = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([abar.new_ones(1), abar[:-1]])
    variance = betas * (1 - previous) / (1 - abar)
    return {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": abar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - abar),
    }


SCHEDULE_BUFFERS = frozenset(published_buffers(torch.tensor([0.5])))  # their names: loading and saving leave them out
