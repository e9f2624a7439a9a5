"""The problems that methods are compared on, by name: operators for images of any size, with their measurement noise.

    name          half, box, sr4, motion-blur ...: PROBLEMS
    name@sigma    the same with Gaussian noise of that standard deviation: sr4@0.05, motion-blur@0

The problems of the papers have their settings: DPS (Chung et al., ICLR 2023), DAPS (Zhang et al., CVPR 2025) and those after them,
at 256x256 with sigma_y = 0.05. At another size, lengths in pixels are scaled with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldm.masks import make_mask
from ldm.nonlinear import clipped, fourier_amplitude
from ldm.operators import Mask, Operator, box_average, downsample, gaussian_blur

PAPERS_SIZE, PAPERS_NOISE = 256, 0.05


@dataclass(frozen=True)
class Problem:
    """One of PROBLEMS. Called with the side of square images in pixels: the operator.

    label      in tables
    make       side -> operator
    sigma_y    standard deviation of the noise, images being in [-1, 1]
    on_latents  a mask of regions, which a latent model takes on latents; other problems go through the decoder
    """

    label: str
    make: Callable[[int], Operator]
    sigma_y: float = 0.0
    on_latents: bool = False

    def __call__(self, size: int) -> Operator:
        return self.make(size)


def scaled(length: float, size: int) -> float:
    """A length of the papers' images, in pixels at another size."""
    return length * size / PAPERS_SIZE


def rectangle(size: int, side: int) -> Mask:
    """All but the middle side x side pixels are known."""
    first = (size - side) // 2
    return Mask(make_mask((first, first, side, side), (size, size)))


def missing(size: int, fraction: float) -> Mask:
    """Exactly this fraction of the pixels is missing, at random places, the same in all channels and images."""
    order = torch.rand(size * size, generator=torch.Generator().manual_seed(0)).argsort()
    return Mask((order >= int(fraction * size * size)).float().view(1, 1, size, size))


def motion_blur(size: int) -> Operator:
    """Convolution with a random motion kernel of 61 x 61 pixels, edges reflected. The kernel is deepinv's (MotionBlurGenerator at
    its defaults, seed 0), the papers draw theirs by another generator."""
    try:
        from deepinv.physics import Blur  # takes seconds to import
        from deepinv.physics.generator import MotionBlurGenerator
    except ImportError:
        raise ValueError("motion-blur needs deepinv: pip install 'ldm[compare]'") from None
    from ldm.physics import from_deepinv

    side = 2 * int(scaled(30, size)) + 1
    kernel = MotionBlurGenerator((side, side), rng=torch.Generator().manual_seed(0)).step(1)["filter"]
    return from_deepinv(Blur(kernel, padding="reflect", use_fft=True))


PROBLEMS = {
    "half": Problem("right half missing", lambda size: Mask(make_mask("right", (size, size))), on_latents=True),
    "hole": Problem("centre hole", lambda size: rectangle(size, round(size * 14 / 32)), on_latents=True),
    "strokes": Problem("brush strokes", lambda size: Mask(make_mask("strokes", (size, size))), on_latents=True),
    "sparse": Problem("90 % of pixels missing", lambda size: Mask((torch.rand(
        1, 1, size, size, generator=torch.Generator().manual_seed(0)) < 0.1).float())),
    "sr4": Problem("x4 super-resolution", lambda size: downsample((size, size), 4)),
    "sr8": Problem("x8 super-resolution", lambda size: downsample((size, size), 8)),
    "blur": Problem("blur, noise 0.05", lambda size: gaussian_blur((size, size), size / 32 * 1.5), PAPERS_NOISE),
    # The papers'. Their super-resolution is sr4@0.05, sr8@0.05 (bicubic), and by means of blocks:
    "sr4-average": Problem("x4 super-resolution of means", lambda size: box_average((size, size), 4), PAPERS_NOISE),
    "sr8-average": Problem("x8 super-resolution of means", lambda size: box_average((size, size), 8), PAPERS_NOISE),
    "box": Problem("128x128 box missing", lambda size: rectangle(size, round(scaled(128, size))), PAPERS_NOISE, on_latents=True),
    "random70": Problem("70 % of pixels missing", lambda size: missing(size, 0.7), PAPERS_NOISE),
    "random92": Problem("92 % of pixels missing", lambda size: missing(size, 0.92), PAPERS_NOISE),
    "gaussian-blur": Problem("Gaussian blur, 61 pixels, std 3", lambda size: gaussian_blur((size, size), scaled(3, size), 10),
                             PAPERS_NOISE),
    "motion-blur": Problem("motion blur, 61 pixels", motion_blur, PAPERS_NOISE),
    "hdr": Problem("high dynamic range, factor 2", lambda size: clipped(2), PAPERS_NOISE),
    "phase-retrieval": Problem("phase retrieval, oversampling 2", lambda size: fourier_amplitude(2), PAPERS_NOISE),
}  # fmt: skip


def problem(name: str) -> tuple[Problem, float]:
    """(the Problem, sigma_y) of a name. "sr16" and the like are super-resolution by another factor. ValueError for other names."""
    key, at, noise = name.partition("@")
    if key not in PROBLEMS and key.startswith("sr") and key[2:].isdecimal():
        factor = int(key[2:])
        found = Problem(f"x{factor} super-resolution", lambda size: downsample((size, size), factor))
    elif key in PROBLEMS:
        found = PROBLEMS[key]
    else:
        raise ValueError(f"task = {name!r}: known are {', '.join(PROBLEMS)}, and sr with another factor (sr16)")
    try:
        sigma_y = float(noise) if at else found.sigma_y
    except ValueError:
        sigma_y = -1.0
    if not sigma_y >= 0:
        raise ValueError(f"task = {name!r}: after @ give the noise, a standard deviation >= 0, as in {key}@0.05")
    return found, sigma_y


def label(name: str) -> str:
    """What tables call a problem."""
    found, sigma_y = problem(name)
    return found.label if sigma_y == found.sigma_y else f"{found.label}, noise {sigma_y:g}"
