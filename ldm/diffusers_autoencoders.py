"""Diffusers' autoencoders by two functions, whatever their classes return: images [B, 3, H, W] <-> latents [B, C, h, w].

Latents are those of the autoencoder's own scale; `statistics` has what takes them to unit variance. FLUX.2's are 2 x 2 patches.
"""

import torch
from einops import rearrange

CHANNELS = {  # class: the config's name for the number of channels
    "AutoencoderKL": "latent_channels", "AutoencoderTiny": "latent_channels", "AutoencoderDC": "latent_channels",
    "AutoencoderKLQwenImage": "z_dim", "AutoencoderKLFlux2": "latent_channels",
}  # fmt: skip


def kind(vae):
    """The name of its class. ValueError for one that is not known."""
    name = type(vae).__name__
    if name not in CHANNELS:
        raise ValueError(f"vae is {name}; known are {', '.join(CHANNELS)}")
    return name


def channels(vae):
    """Of a latent."""
    name = kind(vae)
    return vae.config[CHANNELS[name]] * (4 if name == "AutoencoderKLFlux2" else 1)


def downsampling(vae):
    """Pixels per latent pixel."""
    name, config = kind(vae), vae.config
    if name == "AutoencoderKLQwenImage":
        return 2 ** len(config.temperal_downsample)
    blocks = config.encoder_block_out_channels if name == "AutoencoderDC" else config.block_out_channels
    return 2 ** (len(blocks) - (0 if name == "AutoencoderKLFlux2" else 1))


def encode(vae, images):
    """The latents of images in [-1, 1]; of a distribution its mean."""
    name = kind(vae)
    out = vae.encode(images[:, :, None] if name == "AutoencoderKLQwenImage" else images)  # a video of one image
    if name == "AutoencoderTiny":
        return out.latents
    if name == "AutoencoderDC":
        return out.latent
    z = out.latent_dist.mode()
    if name == "AutoencoderKLFlux2":
        return rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
    return z[:, :, 0] if name == "AutoencoderKLQwenImage" else z


def decode(vae, z):
    """The images of latents."""
    name = kind(vae)
    if name == "AutoencoderKLQwenImage":
        return vae.decode(z[:, :, None]).sample[:, :, 0]
    return vae.decode(rearrange(z, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2) if name == "AutoencoderKLFlux2" else z).sample


def statistics(vae, like):
    """What takes latents to unit variance, (z - mean) / std: two numbers, or tensors [1, C, 1, 1] of like's dtype and device."""
    config = vae.config
    if kind(vae) == "AutoencoderKLFlux2":
        mean, variance = (x.to(like).view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + config.batch_norm_eps).sqrt()
    mean, std = config.get("shift_factor") or 0.0, 1 / config.get("scaling_factor", 1.0)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, own = (torch.tensor(config[name]).to(like).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        std = own * std
    return mean, std
