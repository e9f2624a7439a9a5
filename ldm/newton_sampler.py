"""Constrained sampling by inexact Newton steps: forward passes of the denoiser only (Graikos et al., NeurIPS 2025).

The denoiser `D` is a callable (x_t, t) -> x0 with the attribute `schedule` (ldm/denoisers.py, ldm/schedules.py). A constraint is a
callable x0 -> (e, residual): the error direction in x0 space, shaped like x0, and one number per sample (ldm/constraints.py).
All tensors are [B, ...] float32 or float64; samples of a batch never mix.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Finite-difference length by the dtype of the network's weights: the shorter, the closer to the derivative, until its rounding
# error, about |x0| eps / h, takes over.
H = {torch.float64: 0.005, torch.float32: 0.005, torch.float16: 0.05, torch.bfloat16: 0.2}


class State(NamedTuple):
    """Where the sampler is after a diffusion step. The last state's x_t is the result."""

    step: int  # 1 .. steps
    t: float  # the time that x0 was estimated at
    x_t: torch.Tensor  # [B, ...], already at the next, lower noise level; equal to x0 after the last step
    x0: torch.Tensor  # [B, ...] the denoised estimate that this step ended with
    residual: torch.Tensor | None  # [B] the constraint's residual of x0; None without a constraint
    nfe: int  # evaluations of D so far, per image


def max_norm(v):
    """|v|_inf of each sample: [B, ...] -> [B, 1, 1, ...]."""
    return v.abs().amax(dim=tuple(range(1, v.ndim)), keepdim=True)


def unit(v):
    """v / |v|_inf, each sample by its own norm; a sample that is zero stays zero."""
    norm = max_norm(v)
    return v / torch.where(norm > 0, norm, 1.0)


def jvp(D, x_t, t, v, x0=None, h=0.005, mode="difference"):
    """J v, J = dD/dx_t at (x_t, t), for v [B, ...] of x_t's shape. Returns J v, same shape.

    "difference": (D(x_t + h v / |v|_inf) - D(x_t)) |v|_inf / h, one evaluation of D besides x0 = D(x_t, t), which is evaluated
                  too unless given. The rounding error grows as 1/h, the truncation error as h.
    "forward-ad": exact, by forward-mode differentiation (torch.func.jvp); one evaluation of D at two to three times its cost.
                  Attention runs by its plain formula meanwhile, the fused kernels have no forward derivative.
    """
    if mode == "difference":
        x0 = D(x_t, t) if x0 is None else x0
        return (D(x_t + h * unit(v), t) - x0) * (max_norm(v) / h)
    if mode == "forward-ad":
        # Inference tensors cannot carry tangents, so copies are differentiated; no backward graph is recorded either way.
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda x: D(x, t), (x_t.clone(),), (v.clone(),))[1]
    raise ValueError(f'mode = {mode!r}: known are "difference" and "forward-ad"')


def seeded_noise(shape, seeds, device="cpu", dtype=torch.float32):
    """A function that draws standard normal noise [B, ...] of `shape`, sample i from its own generator with seeds[i].

    Drawn on the CPU, so that a seed means the same picture alone, in any batch and on any device. `seeds` may be such a function
    itself, for noise from elsewhere: it comes back as it is.
    """
    if callable(seeds):
        return seeds
    if len(seeds) != shape[0]:
        raise ValueError(f"seeds has {len(seeds)} entries, but the batch has {shape[0]} samples: give one seed per sample")
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw():
        noise = torch.stack([torch.randn(*shape[1:], generator=g, dtype=dtype) for g in generators])
        return noise.to(device, non_blocking=torch.device(device).type == "cuda")  # sent without waiting for the GPU

    return draw


def newton_sampler(
    D,
    constraint,
    shape,                  # [B, C, H, W] of x_t
    seeds,                  # one integer per sample, or a function that draws the noise, see `seeded_noise`
    steps=20,               # diffusion steps
    newton_steps=5,         # inner steps K at each of them; 1 + 2K evaluations of D
    lr=(0.5, 0.1),          # step size, linear from the first diffusion step to the last, or one number
    h=0.005,                # finite-difference length, in units of x_t
    eta=0.0,                # 0: DDIM, 1: ancestral noise
    mode="difference",      # of the Jacobian product, see `jvp`
    device="cpu",
    dtype=torch.float32,
):  # fmt: skip
    """The paper's Algorithm 1, as a generator of `State`, one per diffusion step:

        x0 = D(x_t, t);  K times: { e = constraint(x0);  x_t += lr J e / |J e|_inf;  x0 = D(x_t, t) };  DDIM step to the next t

    The defaults are the paper's for inpainting (220 evaluations). `constraint=None` samples without one (`steps` evaluations).
    No autograd graph is ever built. Raises ValueError for wrong arguments at once, FloatingPointError if x0 stops being finite.
    """
    levels = D.schedule.levels(steps)
    lr_first, lr_last = lr if isinstance(lr, (tuple, list)) else (lr, lr)
    if int(newton_steps) != newton_steps or newton_steps < 0:
        raise ValueError(f"newton_steps = {newton_steps}: give an integer >= 0")
    for name, value in {"lr": min(lr_first, lr_last), "h": h}.items():
        if not value > 0:
            raise ValueError(f"{name} = {value}: give a positive number")
    check_eta_and_mode(eta, mode)
    lrs = [lr_first + (lr_last - lr_first) * i / max(steps - 1, 1) for i in range(steps)]
    noise = seeded_noise(shape, seeds, device, dtype)
    return _newton_sampler(_Counted(D), constraint, noise, levels, newton_steps, lrs, h, eta, mode)


def check_eta_and_mode(eta, mode):
    """ValueError unless eta is in [0, 1] and mode a known one of `jvp`: what all samplers with J ask."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}: give a number from 0 (DDIM) to 1 (ancestral)")
    if mode not in ("difference", "forward-ad"):
        raise ValueError(f'mode = {mode!r}: known are "difference" and "forward-ad"')


@torch.inference_mode()
def _newton_sampler(D, constraint, noise, levels, newton_steps, lrs, h, eta, mode):
    x_t = noise()
    for i, (now, to) in enumerate(pairwise(levels)):
        x0 = D(x_t, now.t)
        residual = None
        if constraint is not None:
            for _ in range(newton_steps):
                e, _ = constraint(x0)
                x_t = x_t + lrs[i] * unit(jvp(D, x_t, now.t, e, x0, h, mode))
                x0 = D(x_t, now.t)
            _, residual = constraint(x0)
        if not torch.isfinite(x0).all():
            raise FloatingPointError(f"x0 is not finite at t = {now.t}: lower lr, raise h, or run the network in float32")
        x_t = D.schedule.step(x_t, x0, now, to, eta, noise)
        yield State(i + 1, now.t, x_t, x0, residual, D.calls)


def sample(*args, sampler=newton_sampler, **kwargs):
    """A sampler (`newton_sampler`, or another with its arguments) run to its end: the last State."""
    for state in sampler(*args, **kwargs):  # noqa: B007
        pass
    return state


class _Counted:
    """D, counting its evaluations."""

    def __init__(self, D):
        self.D, self.schedule, self.calls = D, D.schedule, 0

    def __call__(self, x_t, t):
        self.calls += 1
        return self.D(x_t, t)
