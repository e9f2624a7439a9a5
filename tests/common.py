"""What several test files use."""

from pathlib import Path

import torch
from torch import nn

from ldm.baselines import psld
from ldm.constraints import DecodedConstraint, LinearConstraint
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.operators import Mask, box_average, downsample, gaussian_blur
from ldm.sampling import DenoiserLike
from ldm.schedules import DiffusionSchedule, make_beta_schedule

ROOT = Path(__file__).parents[1]
UNET = "model.diffusion_model."  # how the names of its tensors begin in a checkpoint
PIXELS = {
    "target": "ldm.models.diffusion.ddpm.DDPM",
    "params": {
        "timesteps": 10,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": dict(image_size=8, in_channels=1, out_channels=1, model_channels=32, num_res_blocks=1,
                           attention_resolutions=[], channel_mult=[1], num_heads=4),
        },
    },
}  # fmt: skip


def reference():
    lines = (Path(__file__).parent / "data/sd-v1-state-dict.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return {name: [int(n) for n in shape.split("x")] for name, shape in rows}


def randomised(model, seed=0):
    """Every weight random, the zero-initialised ones too, at a scale that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.1 if p.ndim < 2 else (p[0].numel() or 1) ** -0.5
        p.data = noise * scale + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


def tiny_unet(seed=0):
    """A U-Net with attention for images [1, 8, 8], all its branches alive."""
    torch.manual_seed(seed)
    unet = UNetModel(8, 1, 32, 1, 1, (1, 2), channel_mult=(1, 2), num_heads=2)
    for p in unet.parameters():  # the published zero initialisation would make every branch the identity
        nn.init.normal_(p, std=0.05)
    return unet.eval()


class NoBackward(torch.autograd.Function):
    """The identity that no graph may record and no gradient may pass."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x):
        assert not torch.is_grad_enabled(), "an autograd graph is being recorded"
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise AssertionError("a backward pass was run")


class GaussianDenoiser(DenoiserLike):
    """The exact D for x_0 ~ N(mean, cov): E[x_0 | x_t], with J = dD/dx_t in closed form. Images are flattened to vectors."""

    def __init__(self, mean, cov, schedule):
        self.mean, self.cov, self.schedule = mean, cov, schedule
        self.calls = 0

    def jacobian(self, t):
        _, alpha, sigma = self.schedule.level(t)
        n = len(self.mean)
        return alpha * self.cov @ torch.linalg.inv(alpha**2 * self.cov + sigma**2 * torch.eye(n, dtype=self.cov.dtype))

    def __call__(self, x_t, t):
        self.calls += 1
        alpha = self.schedule.level(t).alpha
        delta = x_t.flatten(1) - alpha * self.mean.to(x_t)
        return (self.mean.to(x_t) + delta @ self.jacobian(t).to(x_t).T).view_as(x_t)


def smooth_gaussian(schedule=None):
    """The denoiser of images [1, 8, 8]: smooth Gaussian random fields of unit variance around a mean that is not 0."""
    schedule = DiffusionSchedule(make_beta_schedule("sqrt_linear", 1000)) if schedule is None else schedule
    at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).view(64, 2).double()
    cov = torch.exp(-0.5 * torch.cdist(at, at) ** 2) + 1e-5 * torch.eye(64, dtype=torch.float64)
    return GaussianDenoiser(torch.linspace(-0.5, 0.5, 64, dtype=torch.float64), cov, schedule)


def last(states):
    """The last state of a sampler's run."""
    for state in states:  # noqa: B007
        pass
    return state


def draw(gaussian, n, seed=0):
    """n images from the Gaussian prior itself."""
    noise = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = gaussian.mean + noise @ torch.linalg.cholesky(gaussian.cov).T
    return x.view(n, 1, 8, 8).float()


def half_mask(size=8):
    """[1, 1, size, size]: the left half is known."""
    mask = torch.ones(1, 1, size, size)
    mask[..., size // 2 :] = 0
    return mask


def known(images, mask):
    """The inpainting constraint without `inpainting`'s check of the pixel range, which a Gaussian does not respect."""
    return LinearConstraint(Mask(mask), Mask(mask)(images))


def matrix(A):
    """A on images [1, 8, 8] as a matrix, without rows of zeros."""
    columns = [A(e.view(1, 1, 8, 8)).flatten() for e in torch.eye(64, dtype=torch.float64)]
    dense = torch.stack(columns, 1)
    return dense[dense.abs().sum(1) > 0]


def posterior(gaussian, A, y, sigma_y, alpha=0.0, sigma=1.0, x_t=None):
    """Mean and covariance of x_0 given y (one measurement [1, ...]) and, if given, x_t, by the textbook formula."""
    cov, mean = gaussian.cov, gaussian.mean
    if x_t is not None:
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(64, dtype=torch.float64))
        mean, cov = mean + gain @ (x_t.flatten() - alpha * mean), cov - alpha * gain @ cov
    dense = matrix(A)
    given = y.flatten()[A.measured(torch.ones_like(y)).flatten() > 0]
    gain = cov @ dense.T @ torch.linalg.inv(dense @ cov @ dense.T + sigma_y**2 * torch.eye(len(dense), dtype=torch.float64))
    return mean + gain @ (given - dense @ mean), cov - gain @ dense @ cov


OPERATORS = {"half": Mask(half_mask()), "box": box_average((8, 8), 2), "super-resolution": downsample((8, 8), 4),
             "blur": gaussian_blur((8, 8), 0.7)}  # fmt: skip


def psld_on_pixels(D, constraint, *args, **kwargs):
    """PSLD with a decoder and an encoder that change nothing."""
    return psld(D, DecodedConstraint(lambda x: x, constraint.A, constraint.y), lambda x: x, *args, **kwargs)
