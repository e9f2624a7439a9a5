"""The autoencoders between images and latents (Rombach et al. 2022), at the path that published configs name."""

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.quantize import VectorQuantizer
from ldm.modules.tiling import tiled
from ldm.util import memory_advice


class Autoencoder(nn.Module):
    """What both kinds share: the networks, tiles, slices, and the checks of shapes and dtypes.

    Images x: [B, in_channels, H, W] in -1 .. 1, H and W divisible by `downsampling` (8 for Stable Diffusion).
    Latents z: [B, embed_dim, H/downsampling, W/downsampling], not yet multiplied by the diffusion model's scale_factor.
    Results have the input's dtype; the weights may be float16 or bfloat16 under float32 images and latents.

    For large images: `tile(...)`, and `slicing = True` for one sample of the batch at a time; both off by default.
    """

    def __init__(self, ddconfig, embed_dim, moments):
        """moments: how many numbers the encoder gives for each of the latent's, 2 for a mean and a log-variance."""
        super().__init__()
        z_channels = ddconfig["z_channels"]
        self.in_channels = ddconfig["in_channels"]
        self.embed_dim = embed_dim or z_channels
        self.downsampling = 2 ** (len(ddconfig.get("ch_mult", (1, 2, 4, 8))) - 1)
        self.slicing = False
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(moments * z_channels, moments * self.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.embed_dim, z_channels, 1)
        self.tile(None)

    def tile(self, size: int | None = 512, overlap: float = 0.25) -> "Autoencoder":
        """Encode and decode images larger than size x size in overlapping tiles, blended linearly; None: all at once.

        size: of the tiles, in pixels, a multiple of `downsampling`
        overlap: of neighbouring tiles, as a fraction of size, 0 .. 0.5; tiles that do not fit evenly overlap more
        Activations then take the memory of one tile. Tiles do not see each other, so that the result approximates the
        untiled one; it is equal where the image fits into one tile. Returns self. Raises ValueError on other values.
        """
        if size is not None and (size < self.downsampling or size % self.downsampling):
            raise ValueError(f"size = {size}: give a positive multiple of {self.downsampling}, or None for no tiling")
        if not 0 <= overlap <= 0.5:
            raise ValueError(f"overlap = {overlap}: give a fraction of the tile from 0 to 0.5")
        self.tile_size = None if size is None else int(size) // self.downsampling  # in latent pixels
        self.tile_overlap = None if self.tile_size is None else round(overlap * self.tile_size)
        return self

    def decode(self, z: Tensor) -> Tensor:
        """Latent [B, embed_dim, h, w] -> image [B, out_ch, f*h, f*w], about -1 .. 1 (not clamped).

        Raises ValueError on another shape or an integer dtype.
        """
        self._check("z", z, self.embed_dim, 1)
        return self._in_parts(self._decode, z, 1, self.downsampling)

    def _encode(self, x):
        return self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype))).to(x.dtype)

    def _decode(self, z):
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))).to(z.dtype)

    def _in_parts(self, network, x, cell_in, cell_out):
        if self.slicing and len(x) > 1:
            return torch.cat([self._in_parts(network, part, cell_in, cell_out) for part in x.split(1)])
        with memory_advice(
            f"a tensor of shape {list(x.shape)} is too much for the autoencoder in the memory of {x.device}: call "
            "model.first_stage_model.tile(), with a smaller size if need be, or set its slicing = True"
        ):
            if self.tile_size is None:
                return network(x)
            return tiled(network, x, self.tile_size, self.tile_overlap, cell_in, cell_out)

    def _check(self, name, x, channels, multiple):
        if x.ndim != 4 or x.shape[1] != channels or any(n == 0 or n % multiple for n in x.shape[2:]):
            raise ValueError(
                f"{name} has shape {list(x.shape)}, but this autoencoder takes [B, {channels}, H, W] with "
                f"positive multiples of {multiple} as H and W"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}, but this autoencoder takes floating-point numbers")


class AutoencoderKL(Autoencoder):
    """Variational autoencoder with a diagonal Gaussian latent. Shapes, ranges and dtypes: see Autoencoder."""

    def __init__(
        self,
        ddconfig,  # arguments of Encoder and Decoder
        lossconfig=None,  # of the training; not instantiated
        embed_dim=None,  # channels of the latent; by default ddconfig's z_channels
        ckpt_path=None,  # where upstream's training began; ldm.checkpoints.load_model reads the weights
        ignore_keys=(),  # this and the rest: upstream's training and logging
        image_key="image",
        colorize_nlabels=None,
        monitor=None,
    ):
        if not ddconfig.get("double_z", True):
            raise ValueError("double_z = False in ddconfig: AutoencoderKL needs True, a mean and a log-variance")
        super().__init__(ddconfig, embed_dim, moments=2)

    def encode(self, x):
        """Image [B, in_channels, H, W] in -1 .. 1 -> DiagonalGaussianDistribution of z [B, embed_dim, H/f, W/f].

        `encode(x).mode()` is the latent without noise; f is `downsampling`. Raises ValueError on another shape or an
        integer dtype.
        """
        self._check("x", x, self.in_channels, self.downsampling)
        return DiagonalGaussianDistribution(self._in_parts(self._encode, x, self.downsampling, 1))

    def forward(
        self, x: Tensor, sample_posterior: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """(reconstruction of x, posterior), from the posterior's mean or (sample_posterior) a sample of it."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode()), posterior


class VQModel(Autoencoder):
    """Autoencoder with a vector-quantised latent (VQGAN, Esser et al. 2021): each pixel of z is one of n_embed codes.

    `encode` gives quantised latents, `decode` takes any latent as it is. Shapes, ranges and dtypes: see Autoencoder.
    """

    def __init__(
        self,
        ddconfig,  # arguments of Encoder and Decoder
        lossconfig=None,  # of the training; not instantiated
        n_embed=None,  # how many codes
        embed_dim=None,  # channels of the latent; by default ddconfig's z_channels
        ckpt_path=None,  # where upstream's training began; ldm.checkpoints.load_model reads the weights
        ignore_keys=(),  # this and the rest: upstream's training and logging
        image_key="image",
        colorize_nlabels=None,
        monitor=None,
        batch_resize_range=None,
        scheduler_config=None,
        lr_g_factor=1.0,
        remap=None,
        sane_index_shape=False,
        use_ema=False,
    ):
        if ddconfig.get("double_z", True):
            raise ValueError("double_z = True in ddconfig: a quantised latent has no variance, give False")
        if not isinstance(n_embed, int) or n_embed < 1:
            raise ValueError(f"n_embed = {n_embed}: give the number of codes, a positive integer")
        super().__init__(ddconfig, embed_dim, moments=1)
        self.quantize = VectorQuantizer(n_embed, self.embed_dim)

    def encode(self, x):
        """Image [B, in_channels, H, W] in -1 .. 1 -> z [B, embed_dim, H/f, W/f], each pixel one of the codes.

        f is `downsampling`. The gradient passes straight through the quantiser. Raises ValueError on another shape or an
        integer dtype.
        """
        return self.quantize(self.encode_unquantised(x))

    def encode_unquantised(self, x: Tensor) -> Tensor:
        """Image [B, in_channels, H, W] in -1 .. 1 -> z [B, embed_dim, H/f, W/f] before it is quantised."""
        self._check("x", x, self.in_channels, self.downsampling)
        return self._in_parts(self._encode, x, self.downsampling, 1)

    def forward(self, x):
        """(reconstruction of x, its latent), as decode(encode(x)) gives it."""
        z = self.encode(x)
        return self.decode(z), z


class VQModelInterface(VQModel):
    """A VQModel as latent diffusion uses it: `encode` gives latents before quantisation, `decode` quantises first.

    The sampler works on the continuous latents. The gradient passes straight through the quantiser.
    """

    def __init__(self, embed_dim, **kwargs):
        super().__init__(embed_dim=embed_dim, **kwargs)

    def encode(self, x):
        """Image [B, in_channels, H, W] in -1 .. 1 -> z [B, embed_dim, H/f, W/f], not quantised."""
        return self.encode_unquantised(x)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latent [B, embed_dim, h, w] -> image [B, out_ch, f*h, f*w], about -1 .. 1 (not clamped), of the nearest codes,
        or (force_not_quantize) of z as it is. Raises ValueError on another shape or an integer dtype.
        """
        self._check("z", z, self.embed_dim, 1)
        return super().decode(z if force_not_quantize else self.quantize(z))
