"""Models, tasks and measures of compare.py."""

import functools
import sys

import torch
from tiny import Judge
from torch.nn.functional import interpolate

from ldm.checkpoints import load_model
from ldm.constraints import DecodedConstraint, LinearConstraint, latent_inpainting
from ldm.data.emoji import Emoji
from ldm.data.mnist import MNIST
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.images import from_uint8
from ldm.inpainting import make_mask
from ldm.metrics import lpips_distance, lpips_weights, psnr, ssim
from ldm.operators import Mask, downsample, gaussian_blur, measure
from ldm.solver import log_levels
from ldm.util import ROOT

sys.path.append(str(ROOT / "mnist"))
from quality import judge  # noqa: E402

NOISE = 0.05
MEASURES = ["residual", "psnr", "ssim", "lpips", "accuracy"]  # one number per image; kid is one of the whole set


def operator(name, size):
    """The tasks' operators on pictures of size x size pixels, and their sigma_y."""
    if name == "half":
        return Mask(make_mask("right", (size, size))), 0.0
    if name == "hole":
        side = round(size * 14 / 32)
        return Mask(make_mask(((size - side) // 2, (size - side) // 2, side, side), (size, size))), 0.0
    if name == "strokes":
        return Mask(make_mask("strokes", (size, size))), 0.0
    if name == "sparse":
        return Mask((torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)) < 0.1).float()), 0.0
    if name == "sr4":
        return downsample((size, size), 4), 0.0
    return gaussian_blur((size, size), size / 32 * 1.5), NOISE


TASKS = ["half", "hole", "strokes", "sparse", "sr4", "blur"]


def fast_steps(budget, schedule, late=0.3, vectors=1, grid="log"):
    """The most diffusion steps that `fast_sampler` takes `budget` evaluations for: 1 + vectors each, but 1 where J is left out."""

    def cost(steps):
        *levels, last = log_levels(schedule, steps)[:-1] if grid == "log" else schedule.levels(steps)[:-1]
        return len(levels) + 1 + vectors * sum(level.sigma >= late * level.alpha for level in levels)

    return next((steps - 1 for steps in range(5, 201) if cost(steps) > budget), 200)


class Task:
    """A measurement of all images, and what the methods need to know of it."""

    def __init__(self, model, name):
        self.name, self.images, self.D, self.schedule, self.shape = name, model.images, model.D, model.D.schedule, model.shape
        self.A, sigma_y = operator(name, model.images.shape[3])
        self.y = measure(self.A, self.images, sigma_y, range(10_000, 10_000 + len(self.images)) if sigma_y else None)
        self.pixels = LinearConstraint(self.A, self.y)
        self.linear, self.encode = model.first_stage is None or name in ("half", "hole", "strokes"), None
        if not self.linear:
            self.encode = model.first_stage.encode if hasattr(self.A, "pseudo_inverse") else None
        self.noise = dict(sigma_y=sigma_y) if self.linear else {}
        self.first_stage = model.first_stage

    def constraint(self, part):
        """The constraint of the images `part`, a slice; on latents for masks, through the decoder for the rest of tiny's tasks."""
        if self.first_stage is None:
            return LinearConstraint(self.A, self.y[part])
        if self.linear:
            return latent_inpainting(self.first_stage, self.images[part], self.A.mask.to(self.images.device))
        return DecodedConstraint(self.first_stage.decode, self.A, self.y[part])


class _Model:
    def task(self, name):
        if name not in self.tasks:
            self.tasks[name] = Task(self, name)
        return self.tasks[name]


class Mnist(_Model):
    """Digits from the front of the test set; features and labels of the shipped classifier, KID to 5,000 others."""

    def __init__(self, data, n, device):
        test, model = MNIST(data, train=False), load_model("mnist", device=device)
        self.images, self.labels = from_uint8(test.images[:n]).to(device), test.labels[:n]
        self.D = Denoiser(model.network, model.schedule, model.parameterization)
        self.first_stage, self.shape, self.tasks = None, (1, 32, 32), {}
        self.classifier = load_model("mnist-classifier", device="cpu")
        self.reference = judge(self.classifier, from_uint8(test.images[1000:6000]), "cpu")[0]

    def measure(self, x, task):
        features, p = judge(self.classifier, x.clamp(-1, 1).cpu(), "cpu")
        return pictures_measures(x, task) | dict(features=features, accuracy=(p.argmax(1) == self.labels).float())


class Tiny(_Model):
    """Held-out emoji, without prompts; features of the shipped CLIP, KID to the other held-out pictures."""

    def __init__(self, data, n, device):
        held_out, model = Emoji(data, train=False), load_model("tiny", device=device)
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        self.images = from_uint8(held_out.images[order[:n]]).to(device)
        self.D, self.first_stage, self.tasks = LatentDenoiser(model, ""), model, {}
        self.shape, self.judge = (model.channels, model.image_size, model.image_size), Judge(device)
        self.reference = self.judge.features(from_uint8(held_out.images[order[n:]]))

    def measure(self, z, task):
        with torch.inference_mode():
            x = torch.cat([self.first_stage.decode(part) for part in z.split(32)]).clamp(-1, 1)
        # Label accuracy has no meaning here.
        return pictures_measures(x, task) | dict(features=self.judge.features(x), accuracy=torch.full((len(x),), float("nan")))


def pictures_measures(x, task):
    """One number per image [N], on the CPU. LPIPS takes pictures of 64 x 64 pixels and more: smaller ones are enlarged, grey ones
    tripled."""
    truth = task.images
    measured = task.pixels.rms(task.pixels.residual(x))
    large = [interpolate(v, size=max(64, v.shape[3]), mode="bilinear").expand(-1, 3, -1, -1) for v in (x, truth)]
    lpips = lpips_distance(*large) if lpips_weights() else torch.full_like(measured, float("nan"))
    values = dict(residual=measured, psnr=psnr(x, truth), ssim=ssim(x, truth), lpips=lpips)
    return {k: v.cpu() for k, v in values.items()}


def kernel(a, b):
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


@functools.lru_cache(maxsize=1)
def within(reference):
    """Mean kernel between different pictures of the reference."""
    rr, m = kernel(reference, reference), len(reference)
    return (rr.sum() - rr.diagonal().sum()) / (m * (m - 1))


def kernels(features, reference):
    """The parts of the kernel distance (unbiased MMD^2, kernel (x.y/d + 1)^3, as ldm.metrics.kernel_distance, of all features)."""
    return kernel(features, features), kernel(features, reference).mean(1), within(reference)


def kid(parts, index):
    """Kernel distance of the images `index` [n]; pairs of an image with itself are left out, also where it was drawn twice."""
    ff, fr, rr = parts
    other = index[:, None] != index
    return ((ff[index][:, index] * other).sum() / other.sum() - 2 * fr[index].mean() + rr).item()


def bootstrap(n, draws=1000, seed=0):
    return torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))


def intervals(values, reference):
    """Mean and 95 % percentile bootstrap interval of each measure: {name, name_low, name_high}."""
    n = len(values["residual"])
    draws, row = bootstrap(n), {}
    for name in MEASURES:
        v = values[name].double()
        row |= _interval(name, v.mean().item(), v[draws].mean(1))
    parts = kernels(values["features"], reference)
    return row | _interval("kid", kid(parts, torch.arange(n)), torch.tensor([kid(parts, i) for i in draws[:200]]))


def _interval(name, mean, samples):
    low, high = torch.quantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
