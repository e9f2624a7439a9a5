"""Methods of 2024 and 2025 to compare with, written from their papers; settings from what the authors released.

As in ldm/baselines.py, each is a generator of `State` with the arguments of `newton_sampler`; `State.nfe` counts forward
evaluations of D. Only SITCOM differentiates D. The docstrings say which sub-problems, in y alone and without evaluations of D, are
solved exactly here and by gradient steps there. PnP-Flow, FlowDPS and FLAIR are for rectified flows (FlowSchedule).

Arguments of all: D, a denoiser; constraint, a LinearConstraint unless the docstring allows others; shape [B, C, H, W] of x_t;
seeds, one integer per sample; steps, diffusion steps; encode, images -> latents, with a DecodedConstraint only; levels, noise,
start, device, dtype: see ldm.sampling.Common. Samples of a batch never mix. ValueError for wrong arguments.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log

import torch
from torch import Tensor
from typing_extensions import Unpack

from ldm.baselines import check_encode, check_positive, solve_without_J, squared_norm, vjp
from ldm.constraints import Constraint, DecodedConstraint, LinearConstraint
from ldm.correction import INNER, correction
from ldm.linalg import norm
from ldm.sampling import Common, DenoiserLike, Run, State, States, begin, drawn, seeded_noise
from ldm.schedules import CLEAN, FlowSchedule, Level, Schedule

THROUGH_DECODER = 3  # vectors of conjugate gradients there: each is a forward and a backward pass of the decoder


def daps(
    D: DenoiserLike,
    constraint: LinearConstraint | DecodedConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 200,
    ode_steps: int = 5,
    langevin_steps: int = 100,
    lr: float = 1e-4,
    beta: float = 0.01,
    **common: Unpack[Common],
) -> States:
    """Decoupled annealing posterior sampling (Zhang et al., CVPR 2025, Algorithm 1): of x_t only its x0 goes to the next level.

        x0 = probability-flow ODE from (x_t, t) in `ode_steps` Euler steps
        x ~ N(x0, r_t^2) N(y; A x, beta^2) by Langevin steps from x0,   r_t = sigma_t / alpha_t,   x_s = alpha_s x + sigma_s n

    ode_steps forward evaluations per step (fewer where the schedule has no more levels). The Langevin steps are the authors': few
    and short, they stay near x0 where y says nothing. An exact draw would not: r_t is far wider than p(x_0 | x_t). Defaults as
    in the authors' code for pixels ("1K"): sigma / alpha from 100 to 0.1, in the ODE down to 0.01, equally spaced in the seventh
    root; lr falls linearly to a hundredth; beta = 0.01 whatever the noise of y.
    """
    check_positive(steps=steps, ode_steps=ode_steps, langevin_steps=langevin_steps, lr=lr, beta=beta)
    run, total = _begin(D, shape, seeds, lambda: [*_levels_at(D.schedule, _roots(100.0, 0.1, steps)), CLEAN], common)
    return _daps(run, constraint, total, ode_steps, langevin_steps, lr, beta)


@torch.inference_mode()
def _daps(run, constraint, total, ode_steps, langevin_steps, lr, beta):
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels)):
        ratio, x0 = now.sigma / max(now.alpha, 1e-3), x_t
        below = [level for level in _levels_at(D.schedule, _roots(ratio, 0.01, ode_steps)[1:]) if level.sigma < now.sigma]
        for a, b in pairwise([now, *below, CLEAN]):
            x0 = D.schedule.step(x0, D(x0, a.t), a, b)
        left, x = len(levels) - 1 - i, x0
        eta = lr * (1 - 0.99 * max(total - left, 0) / total)
        for _ in range(langevin_steps):
            x = x + eta * (constraint(x)[0] / beta**2 + (x0 - x) / ratio**2) + (2 * eta) ** 0.5 * noise()
        x_t = to.alpha * x + to.sigma * noise() if to.sigma > 0 else x
        yield State(i + 1, now.t, x_t, x, constraint.residual(x), D.calls, to.t, drawn(noise))


def resample(
    D: DenoiserLike,
    constraint: LinearConstraint | DecodedConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 500,
    every: int = 10,
    gamma: float = 40.0,
    sigma_y: float = 0.0,
    encode: Callable[[Tensor], Tensor] | None = None,
    **common: Unpack[Common],
) -> States:
    """ReSample (Song et al., ICLR 2024, Algorithm 1): DDIM, and at every tenth level after the first third hard data consistency.

        x' = DDIM step from (x_t, x0),   x0 <- argmin_x |y - A x|^2 from x0
        x_s ~ N(alpha_s x0, sigma_s^2) N(x', tau^2), normalised,   tau^2 = gamma (the ancestral step's variance)

    One forward evaluation per step. The argmin that gradient descent from x0 tends to, x0 + A^+ r, is found by conjugate gradients;
    with noise, where the authors stop early, by (A A^T + sigma_y^2)^-1 in the place of (A A^T)^-1. Through a decoder, as there, in
    the middle third on the decoded image, then encoded, and in the last third on latents (linearised). gamma = 40 and tau are
    those of the authors' code. Its gradient steps (DPS) and repeated steps in between are not in Algorithm 1 and left out.
    """
    check_positive(every=every, gamma=gamma)
    check_encode(constraint, encode)
    run, total = _begin(D, shape, seeds, lambda: D.schedule.levels(steps), common)
    return _resample(run, constraint, total, every, gamma, sigma_y, encode)


@torch.inference_mode()
def _resample(run, constraint, total, every, gamma, sigma_y, encode):
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels)):
        left, x0 = len(levels) - 2 - i, D(x_t, now.t)
        x_s = D.schedule.step(x_t, x0, now, to)
        if left % every == 0 and left <= total - total // 3:
            x0 = consistent(constraint, x0, sigma_y, encode if left >= total // 3 else None)
            tau2, s2 = gamma * D.schedule.added_noise(now, to, 1.0) ** 2, to.sigma**2
            x_s = (tau2 * to.alpha * x0 + s2 * x_s) / (tau2 + s2) + (tau2 * s2 / (tau2 + s2)) ** 0.5 * noise() if left else x0
        x_t = x_s
        yield State(i + 1, now.t, x_t, x0, constraint.residual(x0), D.calls, to.t, drawn(noise))


def sitcom(
    D: DenoiserLike,
    constraint: Constraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 20,
    gradient_steps: int = 30,
    lr: float = 0.02,
    weight: float = 0.0,
    tolerance: float = 0.001,
    **common: Unpack[Common],
) -> States:
    """Step-wise triple-consistent sampling (Alkhouri et al., ICML 2025, Algorithm 1), for any constraint: D's input is optimised.

        v = argmin |y - A D(v, t)|^2 + weight |v - x_t|^2 by Adam from x_t;   x0 = D(v, t);   x_s = alpha_s x0 + sigma_s n

    1 + gradient_steps forward and gradient_steps backward evaluations per step. A sample whose residual is below `tolerance` (the
    authors': sigma_y + 0.001) moves no further; its evaluations are counted all the same. Defaults as in the authors' code, which
    also clips x0 to [-1, 1]; latents have no such range.
    """
    check_positive(gradient_steps=gradient_steps, lr=lr, tolerance=tolerance)
    run, _ = _begin(D, shape, seeds, lambda: D.schedule.levels(steps), common)
    return _sitcom(run, constraint, gradient_steps, lr, weight, tolerance)


@torch.no_grad()
def _sitcom(run, constraint, gradient_steps, lr, weight, tolerance):
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels)):
        v, mean, square = x_t, 0.0, 0.0
        for k in range(1, gradient_steps + 1):
            _, e, residual = vjp(D, constraint, v, now.t)
            gradient = 2 * weight * (v - x_t) - 2 * e
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            step = lr * mean / (1 - 0.9**k) / ((square / (1 - 0.999**k)).sqrt() + 1e-8)
            v = v - step * (residual > tolerance).view(-1, *[1] * (v.ndim - 1))
        x0 = D(v, now.t)
        x_t = to.alpha * x0 + to.sigma * noise() if to.sigma > 0 else x0
        yield State(i + 1, now.t, x_t, x0, constraint.residual(x0), D.calls, to.t, drawn(noise))


# ---- rectified flows only


def pnp_flow(
    D: DenoiserLike,
    constraint: LinearConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 100,
    samples: int = 5,
    power: float = 0.5,
    **common: Unpack[Common],
) -> States:
    """Plug-and-play flow matching (Martin et al., ICLR 2025, Algorithm 3):

        x = mean over `samples` of D(alpha_t z + sigma_t n, t);   z = x + sigma_s^power A^T (y - A x) / |A|^2

    1 + (steps - 1) samples forward evaluations: the first level is pure noise. Defaults as in the authors' code: 100 steps, 5
    samples, power 0.5 for boxes and strokes, 0.3 for super-resolution, 0.01 for random masks and blur. Their operators have
    |A| = 1. A run goes on from a saved state with samples = 1 only.
    """
    check_positive(samples=samples, power=power)
    run, _ = _begin(D, shape, seeds, lambda: _flow(D).levels(steps), common)
    return _pnp_flow(run, constraint, samples, power, 1 / squared_norm(constraint.A, run.x_t))


@torch.inference_mode()
def _pnp_flow(run, constraint, samples, power, length):
    D, levels, noise, x_t = run
    more = []
    for i, (now, to) in enumerate(pairwise(levels)):
        x0 = torch.stack([D(x, now.t) for x in (x_t, *more)]).mean(0)
        z = x0 + length * to.sigma**power * constraint(x0)[0]
        x_t, *more = [to.alpha * z + to.sigma * noise() for _ in range(samples)] if to.sigma > 0 else [x0]
        yield State(i + 1, now.t, x_t, x0, constraint.residual(x0), D.calls, None if more else to.t, drawn(noise))


def flowdps(
    D: DenoiserLike,
    constraint: LinearConstraint | DecodedConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 28,
    gradient_steps: int = 3,
    length: float = 0.04,
    **common: Unpack[Common],
) -> States:
    """Flow-driven posterior sampling (Kim et al., ICCV 2025, Algorithm 1): the likelihood moves x0, noise is added to x1.

        x1 = (x_t - alpha_t x0) / sigma_t;   x0' = x0 after 3 gradient steps on |A^T (y - A x)| / |A|^2
        x_s = (1 - sigma_s) ((1 - sigma_t) x0 + sigma_t x0') + sigma_s (sqrt(sigma_s) x1 + sqrt(1 - sigma_s) n)

    One forward evaluation per step; through a decoder 3 of its backward passes. The authors' code steps by 15 along the gradient
    of the norm in latents of 147,456 numbers, that is 0.04 sqrt(147,456): `length` is in units of sqrt(N). For super-resolution
    they have A^+ in the place of A^T / |A|^2. 28 steps; their guidance by a text is the denoiser's matter. The paper has no masks.
    """
    check_positive(gradient_steps=gradient_steps, length=length)
    run, _ = _begin(D, shape, seeds, lambda: _flow(D).levels(steps), common)
    return _flowdps(run, constraint, gradient_steps, length * run.x_t[0].numel() ** 0.5)


@torch.no_grad()
def _flowdps(run, constraint, gradient_steps, length):
    D, levels, noise, x_t = run
    pixels, decode = _pixels(constraint), constraint.decode if constraint.through_decoder else lambda x: x
    scale = squared_norm(pixels.A, decode(x_t))
    for i, (now, to) in enumerate(pairwise(levels)):
        x0 = D(x_t, now.t)
        x1, moved = (x_t - now.alpha * x0) / now.sigma, x0
        for _ in range(gradient_steps):
            with torch.enable_grad():
                z = moved.detach().requires_grad_()
                loss = norm(pixels.A.adjoint(pixels.difference(decode(z)))) / scale
                (gradient,) = torch.autograd.grad(loss.sum(), z)
            moved = moved - length * gradient.nan_to_num()  # a norm of 0 has no gradient
        x0 = (1 - now.sigma) * x0 + now.sigma * moved
        if to.sigma > 0:
            x_t = to.alpha * x0 + to.sigma * (to.sigma**0.5 * x1 + (1 - to.sigma) ** 0.5 * noise())
        else:
            x_t = x0
        yield State(i + 1, now.t, x_t, x0, constraint.residual(x0), D.calls, to.t, drawn(noise))


def flair(
    D: DenoiserLike,
    constraint: LinearConstraint | DecodedConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 50,
    weights: Sequence[float] = (0.5,),
    last: float = 0.18,
    sigma_y: float = 0.0,
    encode: Callable[[Tensor], Tensor] | None = None,
    **common: Unpack[Common],
) -> States:
    """FLAIR (Erbach et al., NeurIPS 2025): the mean mu of a variational posterior N(alpha_t mu, sigma_t^2), from mu = A^+ y.

        x_t = alpha_t mu + sigma_t eps,  eps = a x1 + sqrt(1 - a^2) n,  a = 1 - sigma_t,  x1 <- (x_t - alpha_t D(x_t, t)) / sigma_t
        mu <- mu + (lambda_t / sigma_t) (D(x_t, t) - mu),   mu <- argmin_x |y - A x|^2 from mu

    The first step of mu is theirs along the gradient of lambda_t |v(x_t, t) - (eps - mu)|^2, in terms of D. One forward evaluation
    per step. weights: lambda at equally spaced t from 1 to 0 (`flair_weights`), of which the nearest counts, and mu at most becomes
    D(x_t, t): more than twice that step would diverge, as a constant lambda does at their last t. The argmin, up to 15
    gradient steps there, is found by conjugate gradients, through a decoder on latents (linearised). Defaults as in the authors'
    code: 50 equally spaced t between 1 and `last`. x_t of a State is mu, and no run goes on from one, or begins in the middle.
    """
    check_positive(steps=steps, last=last)
    if common.get("start") is not None:
        raise ValueError("start is given: FLAIR begins at pure noise only, leave it out")
    check_encode(constraint, encode)
    schedule = _flow(D)
    times = [1 + (last - 1) * (i + 1) / (steps + 1) for i in range(steps)]
    run, _ = _begin(D, shape, seeds, lambda: [*(schedule.level(schedule.scale * t) for t in times), CLEAN], common)
    pixels = _pixels(constraint)
    with torch.inference_mode():
        lift = pixels.A.pseudo_inverse(pixels.A.measured(pixels.y)).to(run.x_t)
        mu = lift if encode is None else encode(lift)
    return _flair(run, constraint, mu, weights, sigma_y)


@torch.inference_mode()
def _flair(run, constraint, mu, weights, sigma_y):
    D, levels, noise, x1 = run
    for i, now in enumerate(levels[:-1]):
        a = 1 - now.sigma
        x_t = now.alpha * mu + now.sigma * (a * x1 + (1 - a**2) ** 0.5 * noise())
        x0 = D(x_t, now.t)
        x1 = (x_t - now.alpha * x0) / now.sigma
        mu = mu + min(weights[round(a * (len(weights) - 1))] / now.sigma, 1.0) * (x0 - mu)
        mu = consistent(constraint, mu, sigma_y)
        yield State(i + 1, now.t, mu, mu, constraint.residual(mu), D.calls)


@torch.inference_mode()
def flair_weights(D: DenoiserLike, x0: Tensor, seeds: Sequence[int], times: int = 20, strength: float = 0.5) -> list[float]:
    """lambda for `flair` at times + 1 equally spaced t from 1 to 0, by the error of D's velocity v on images x0 [B, ...]:

        lambda_t = strength max(w_t - w_0, 0),   w_t = 1 / E |v(x_t, t) - (n - x_0)|^2, scaled to a mean of 1

    times + 1 evaluations of D. seeds: of the noise, one integer per sample. For t = 0 stands t = 0.01.
    """
    schedule, noise, errors = _flow(D), seeded_noise(x0.shape, seeds, x0.device, x0.dtype), []
    for t in [*(1 - i / times for i in range(times)), 0.01]:
        level = schedule.level(schedule.scale * t)
        errors.append(((D(level.alpha * x0 + t * noise(), level.t) - x0) / t).square().mean())
    w = 1 / torch.stack(errors)
    return (strength * (w - w[-1]).clamp_min(0) / w.mean()).tolist()


# ---- what they share


def consistent(
    constraint: LinearConstraint | DecodedConstraint,
    x0: Tensor,
    sigma_y: float = 0.0,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x0 moved to y: x0 + A^T (A A^T + sigma_y^2)^-1 (y - A x0), by conjugate gradients. Through a decoder with its derivative at
    x0 and few vectors; with encode on the decoded image, which is encoded again."""
    if encode is None or not isinstance(constraint, DecodedConstraint):
        return x0 + correction(constraint, x0, lambda v: v, INNER if constraint.linear else THROUGH_DECODER, sigma_y)
    pixels, u = constraint.pixels, constraint.decode(x0)
    return encode(u + solve_without_J(pixels.A, pixels.difference(u), 1.0, sigma_y**2))


def _begin(D, shape, seeds, default, common) -> tuple[Run, int]:
    """The run, and how many steps it has from its first level on, wherever it starts."""
    levels = list(common.pop("levels", None) or default())
    return begin(D, shape, seeds, lambda: levels, levels=levels, **common), len(levels) - 1


def _flow(D) -> FlowSchedule:
    if not isinstance(D.schedule, FlowSchedule):
        raise ValueError(f"D has a {type(D.schedule).__name__}: this method is for rectified flows, with a FlowSchedule")
    return D.schedule


def _pixels(constraint) -> LinearConstraint:
    return constraint.pixels if constraint.through_decoder else constraint


def _roots(first: float, last: float, n: int, p: int = 7) -> list[float]:
    """n numbers from first to last whose p-th roots are equally spaced (Karras et al. 2022)."""
    a, b = first ** (1 / p), last ** (1 / p)
    return [(a + (b - a) * i / max(n - 1, 1)) ** p for i in range(n)]


def _levels_at(schedule: Schedule, ratios: Sequence[float]) -> list[Level]:
    """The levels whose sigma / alpha are nearest to the given falling ratios, each once."""
    noisy = [level for level in schedule.levels(schedule.resolution)[:-1] if level.alpha > 0]
    found = []
    for ratio in ratios:
        k = bisect(noisy, -ratio, key=lambda level: -level.sigma / level.alpha)
        found.append(min(noisy[max(k - 1, 0) : k + 1], key=lambda level: abs(log(level.sigma / level.alpha / ratio))))
    return list(dict.fromkeys(found))
