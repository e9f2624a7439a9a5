"""Samples of every sampler, on a denoiser in closed form, are those that were frozen, to 1e-5: a refactoring changes no number.

After a change that is meant to change them, `PYTHONPATH=tests python tests/test_frozen.py` freezes them anew.
"""

import pytest
import torch
from common import ROOT, smooth_gaussian
from safetensors.torch import load_file, save_file

from ldm.baselines import ddnm, diffpir, dps, gradient_steps, mpgd, repaint
from ldm.constraints import DecodedConstraint, EncoderConstraint, LinearConstraint, LossConstraint
from ldm.fast_sampler import fast_sampler
from ldm.newton_sampler import newton_sampler, sample
from ldm.operators import Mask, downsample, gaussian_blur, measure
from ldm.schedules import FlowSchedule

FILE = ROOT / "tests/data/frozen.safetensors"
SHAPE, SEEDS = (2, 1, 8, 8), [3, 4]


def gaussian(flow=False):
    return smooth_gaussian(FlowSchedule()) if flow else smooth_gaussian()


def linear(A, sigma_y=0.0):
    truth = torch.linspace(-1, 1, 64, dtype=torch.float64).view(1, 1, 8, 8).expand(SHAPE) * torch.tensor([1, -0.5]).view(2, 1, 1, 1)
    return LinearConstraint(A, measure(A, truth, sigma_y, SEEDS))


def mask():
    known = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    known[..., 4:] = 0
    return Mask(known)


def decoded(kind):
    A = downsample((8, 8), 2)
    y = linear(A).y
    if kind == "decoder":
        return DecodedConstraint(torch.tanh, A, y)
    if kind == "both":
        return DecodedConstraint(torch.tanh, A, y, encode=lambda x: torch.atanh(x.clamp(-0.99, 0.99)))
    if kind == "encoder":
        return EncoderConstraint(torch.tanh, lambda x: torch.atanh(x.clamp(-0.99, 0.99)), A, y)
    return LossConstraint(lambda x0: (A(x0.tanh()) - y).square().flatten(1).mean(1))


def run(sampler, constraint, flow=False, **settings):
    return sample(gaussian(flow), constraint, SHAPE, SEEDS, sampler=sampler, dtype=torch.float64, **settings).x_t


NEWTON = dict(sampler=newton_sampler, steps=6, newton_steps=2, lr=0.1)
CASES = {
    "newton mask": lambda: run(constraint=linear(mask()), **NEWTON),
    "newton x2": lambda: run(constraint=linear(downsample((8, 8), 2)), **NEWTON),
    "newton mask, eta 1": lambda: run(constraint=linear(mask()), eta=1.0, **NEWTON),
    "newton mask, flow": lambda: run(constraint=linear(mask()), flow=True, **NEWTON),
    "newton decoder": lambda: run(constraint=decoded("decoder"), **NEWTON),
    "newton encoder": lambda: run(constraint=decoded("encoder"), **NEWTON),
    "newton loss": lambda: run(constraint=decoded("loss"), **NEWTON),
    "newton forward-ad": lambda: run(constraint=linear(mask()), mode="forward-ad", **NEWTON),
    "no constraint": lambda: run(newton_sampler, None, steps=6),
    "fast mask": lambda: run(fast_sampler, linear(mask())),
    "fast x2": lambda: run(fast_sampler, linear(downsample((8, 8), 2)), steps=10),
    "fast x2, two vectors": lambda: run(fast_sampler, linear(downsample((8, 8), 2)), steps=10, vectors=2),
    "fast noisy blur": lambda: run(fast_sampler, linear(gaussian_blur((8, 8), 1.0), 0.1), sigma_y=0.1),
    "fast mask, flow": lambda: run(fast_sampler, linear(mask()), flow=True),
    "fast decoder": lambda: run(fast_sampler, decoded("decoder"), steps=10),
    "fast decoder and encoder": lambda: run(fast_sampler, decoded("both"), steps=10),
    "fast decoder and encoder, noise": lambda: run(fast_sampler, decoded("both"), steps=10, sigma_y=0.1),
    "fast loss": lambda: run(fast_sampler, decoded("loss"), steps=10),
    "fast encoder": lambda: run(fast_sampler, decoded("encoder"), steps=10),
    "fast, no constraint": lambda: run(fast_sampler, None, steps=10),
    "dps": lambda: run(dps, linear(mask()), steps=10),
    "mpgd": lambda: run(mpgd, linear(mask()), steps=10),
    "ddnm": lambda: run(ddnm, linear(gaussian_blur((8, 8), 1.0), 0.1), steps=10, sigma_y=0.1),
    "diffpir": lambda: run(diffpir, linear(mask()), steps=10),
    "repaint": lambda: run(repaint, linear(mask()), steps=4),
    "gradient steps": lambda: run(gradient_steps, linear(mask()), steps=4, lr=0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_are_the_frozen_ones(name):
    assert torch.allclose(CASES[name](), load_file(FILE)[name], atol=1e-5, rtol=0)


if __name__ == "__main__":
    save_file({name: case().contiguous() for name, case in CASES.items()}, FILE)
