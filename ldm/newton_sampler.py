"""The paper's algorithm: constrained sampling by inexact Newton steps, forward passes of the denoiser only.

Graikos, Jojic, Samaras, "Fast constrained sampling in pre-trained diffusion models", NeurIPS 2025, https://arxiv.org/abs/2410.18804
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from typing_extensions import Unpack

from ldm.constraints import Constraint, as_constraint, renewed
from ldm.linalg import unit
from ldm.sampling import Common, DenoiserLike, Run, State, States, begin, check_eta, check_finite, check_product, drawn, jvp
from ldm.util import moved

# The authors' settings by task, read from the notebooks of their code; lr falls over the inner steps of each diffusion step.
PAPER: dict[str, dict[str, Any]] = {
    "inpainting": dict(steps=20, newton_steps=5, lr=(0.5, 0.1), h=0.005, eta="paper"),  # 220 evaluations of D
    "super-resolution": dict(steps=20, newton_steps=10, lr=0.1, h=0.005, eta="paper"),  # 420
    "style": dict(steps=20, newton_steps=5, lr=(0.5, 0.1), h=0.005, eta="paper"),  # 220, at guidance 3 (their w = 2)
    "convergence": dict(steps=20, newton_steps=3, lr=0.5, h=0.005, eta="paper"),  # 140, their study of step sizes
}


def newton_sampler(
    D: DenoiserLike,
    constraint: Constraint | None,
    shape: Sequence[int],               # [B, C, H, W] of x_t
    seeds: Sequence[int] | None = None, # one integer per sample
    steps: int = 20,                    # diffusion steps
    newton_steps: int = 5,              # inner steps K at each of them; 1 + 2K evaluations of D
    lr: float | Sequence[float] = (0.5, 0.1),  # step length in |.|_inf, see `step_lengths`
    h: float | None = None,             # finite-difference length, in units of x_t; None: by D's arithmetic
    eta: float | str = 0.0,             # noise of the DDIM step: 0 none, 1 ancestral, "paper" the authors'
    mode: str | None = None,            # of the Jacobian product, see `jvp`; None: by D's arithmetic
    **common: Unpack[Common],           # levels, noise, start, device, dtype
) -> States:  # fmt: skip
    """Algorithm 1 as a generator of `State`, one per diffusion step:

        x0 = D(x_t, t);  K times: { e = constraint(x0);  x_t += lr J e / |J e|_inf;  x0 = D(x_t, t) };  DDIM step to the next t

    The defaults are the paper's for inpainting (220 evaluations), see PAPER. `constraint=None` samples without one (`steps`
    evaluations). Where a soft mask holds a pixel, x_t is the noised image (`ldm.constraints.renewed`). An x_t that is sent into the
    generator takes the place of its own. No autograd graph is ever built. ValueError for wrong arguments at once,
    FloatingPointError if x0 stops being finite.
    """
    if int(newton_steps) != newton_steps or newton_steps < 0:
        raise ValueError(f"newton_steps = {newton_steps}: give an integer >= 0")
    lengths = step_lengths(lr, newton_steps)
    check_eta(eta)
    check_product(h, mode)
    run = begin(D, shape, seeds, lambda: D.schedule.levels(steps), **common)
    return _newton_sampler(run, as_constraint(constraint), lengths, h, eta, mode)


@torch.inference_mode()
def _newton_sampler(
    run: Run, constraint: Constraint | None, lengths: list[float], h: float | None, eta: float | str, mode: str | None
) -> States:
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels), start=1):
        x0, residual = D(x_t, now.t), None
        if constraint is not None:
            held = constraint.at(to)
            for lr in lengths:
                e, _ = held(x0)
                x_t = x_t + lr * unit(jvp(D, x_t, now.t, e, x0, h, mode))
                x0 = D(x_t, now.t)
            residual = constraint.residual(x0)
        check_finite(x0, now.t)
        x_t = D.schedule.step(x_t, x0, now, to, eta, noise)
        if constraint is not None and constraint.noisy and to.sigma > 0:
            x_t = renewed(constraint, x_t, to, noise)
        sent = yield State(i, now.t, x_t, x0, residual, D.calls, to.t, drawn(noise))
        x_t = x_t if sent is None else sent


def step_lengths(lr: float | Sequence[float], newton_steps: int) -> list[float]:
    """The lengths of the inner steps: a number for all, (first, last) linearly over them, or the list itself."""
    values = [float(x) for x in lr] if isinstance(lr, Sequence) else [float(lr)] * newton_steps
    if len(values) == 2 and newton_steps != 2:
        first, last = values
        values = [first + (last - first) * i / max(newton_steps - 1, 1) for i in range(newton_steps)]
    if len(values) != newton_steps:
        raise ValueError(f"lr has {len(values)} entries: give a number, (first, last), or {newton_steps} for the inner steps")
    if not all(value > 0 for value in values):
        raise ValueError(f"lr = {lr}: give positive numbers")
    return values


def sample(*args: Any, sampler: Callable[..., States] = newton_sampler, **kwargs: Any) -> State:
    """A sampler (`newton_sampler`, or another with its arguments) run to its end: the last State."""
    for state in sampler(*args, **kwargs):  # noqa: B007
        pass
    return state


__getattr__ = moved("ldm.newton_sampler", "ldm.sampling", "seeded_noise max_norm H")
