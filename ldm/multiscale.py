"""A large image of one plan: a small image is sampled as a whole, and tied to the down-sampled version of the large one.

    big = Enlargement(model, small, 4)                                    # small: a sample of the model's own size
    D = LatentDenoiser(model, prompt, 1.0).tile(model.image_size, 0.25)   # detail, in windows
    *_, state = fast_sampler(D, big.constraint, big.shape, seeds, steps=6, start=big.start(D, 0.4, seeds))
    image = big.exact(model.decode(state.x_t))                            # A image = small

Windows alone have no common plan (MultiDiffusion, Bar-Tal et al. 2023): each draws the prompt. Joint multi-scale sampling ties the
scales by a constraint (ZoomLDM, Yellapragada et al., CVPR 2025); here with a text-to-image model, which does not know of scales.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.constraints import EncoderConstraint, LinearConstraint
from ldm.images import check_image
from ldm.operators import box_average, downsample
from ldm.sampling import DenoiserLike, noised
from ldm.schedules import Level


class Enlargement:
    """The images x [B, 3, f h, f w] whose down-sampled version A x is `small`, bicubic and anti-aliased as everywhere.

    model   with encode, decode and downsampling: a LatentDiffusion, or `from_diffusers(...)`
    small   [B, 3, h, w] in [-1, 1]
    factor  f, an integer from 2. f h and f w have to be what the model takes. ValueError for what does not fit

    shape: of the large latents, [B, C, f h / d, f w / d] with d = model.downsampling.
    """

    def __init__(self, model: Any, small: Tensor, factor: int = 4):
        h, w = check_image(small, "small").shape[2:]
        if int(factor) != factor or factor < 2:
            raise ValueError(f"factor = {factor}: give an integer from 2")
        self.model, self.small, self.factor, cell = model, small, int(factor), model.downsampling
        size = (self.factor * h, self.factor * w)
        if any(n % (cell * model.multiple) for n in size):
            raise ValueError(f"small of {h} x {w} pixels by factor = {factor} is {size[0]} x {size[1]}: "
                             f"give a size of multiples of {cell * model.multiple}")  # fmt: skip
        self.A = downsample(size, self.factor)
        self.shape = (len(small), model.channels, size[0] // cell, size[1] // cell)

    @cached_property
    def upsampled(self) -> Tensor:
        """A^+ small, within [-1, 1]: [B, 3, f h, f w]."""
        return self.exact(self.A.pseudo_inverse(self.small))

    @cached_property
    def latents(self) -> Tensor:
        """Of the up-sampled image."""
        with torch.inference_mode(False), torch.no_grad():
            return self.model.encode(self.upsampled.clone())

    @cached_property
    def constraint(self) -> EncoderConstraint:
        """A Dec(x0) = small, by the encoder's difference: forward passes only. Three calls of the decoder and four of the encoder
        at each step of `fast_sampler`."""
        return EncoderConstraint(self.model.decode, self.model.encode, self.A, self.small)

    @cached_property
    def latent_constraint(self) -> LinearConstraint:
        """The same for means of f x f latents, without encoder and decoder: they are those of the up-sampled image. Latents are
        no linear function of the image, so that the large image keeps the plan and not the colours."""
        B = box_average(self.shape[2:], self.factor)
        return LinearConstraint(B, B(self.latents))

    def start(self, D: DenoiserLike, strength: float, seeds: Sequence[int]) -> tuple[Tensor, Level]:
        """A sampler's `start`: the up-sampled image with noise, see `ldm.sampling.noised`."""
        return noised(D, self.latents, strength, seeds)

    def exact(self, x: Tensor, rounds: int = 50) -> Tensor:
        """An image near x [B, 3, f h, f w] with A x = small: x + A^+ (small - A x), in turn with the limits -1 and 1. Equal up to
        .03 next to hard edges, less than .004 on average."""
        for _ in range(rounds):
            x = (x + self.A.pseudo_inverse(self.small - self.A(x))).clamp(-1, 1)
        return x
