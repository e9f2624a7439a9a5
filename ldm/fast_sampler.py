"""A faster solver for the same problem: 43 evaluations of D instead of the paper's 220, forward passes only.

For the ideal denoiser, V = gamma J with gamma = sigma_t^2 / alpha_t is the covariance of x_0 given x_t (Tweedie's second order;
Rozet et al. 2024 use it with J^T). Given y = A x_0 + sigma_y n, the mean of x_0 then moves from D(x_t, t) by

    d = V A^T lambda,   (sigma_y^2 I + A V A^T) lambda = r = y - A D(x_t, t)                                             (*)

One vector goes far: d is along J A^T P r, with the preconditioner P = (PUSH^2 sigma_y^2 / v I + A A^T)^-1. For masks P is the
identity, and that is the paper's direction, J A^T r. Its length here is exact, and known from products already computed.
"""

from bisect import bisect
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ldm.constraints import Constraint, as_constraint
from ldm.correction import INNER, correction
from ldm.particles import particle_levels, particle_sampler
from ldm.sampling import Common, DenoiserLike, Run, State, States, begin, check_eta, check_finite, check_product, drawn, jvp
from ldm.schedules import Level, Schedule

MOST_STEPS = 200  # that `evaluations` chooses
PUSH = 2.3  # strength of the push where J is used, up to 24 steps; above, the steps share it
LAST = 10  # corrections of the last x0 through a decoder: they cost no evaluation of D


class Products(Common, total=False):
    """Keyword arguments of `jvp` next to those that every sampler takes."""

    h: float | None  # finite-difference length, in units of x_t; None: by D's arithmetic
    mode: str | None  # "difference" or "forward-ad"; None: by D's arithmetic


class Settings(NamedTuple):
    """The numbers that the steps below share; see `fast_sampler`."""

    vectors: int
    strength: float
    late: float
    sigma_y: float
    eta: float | str
    fresh: float
    h: float | None
    mode: str | None


def fast_sampler(
    D: DenoiserLike,
    constraint: Constraint | None,
    shape: Sequence[int],                # [B, C, H, W] of x_t
    seeds: Sequence[int] | None = None,  # one integer per sample
    steps: int | None = None,            # diffusion steps; None: 24, or as many as `evaluations` allows
    vectors: int | None = None,          # products with J at each of them, where J is used; None: 1, or see below
    strength: float | None = None,       # of the push on x_t, where J is used; None: 2.3, or 55 / steps if that is less
    late: float | None = None,           # J is left out where sigma_t / alpha_t is below this, and in the last step; None: late_for
    sigma_y: float = 0.0,                # standard deviation of the measurement's noise
    eta: float | str = 0.5,              # noise of the DDIM step where J is used: 0 none, 1 ancestral
    fresh: float = 0.85,                 # part of x_s's noise that is drawn anew where J is left out
    particles: int = 1,                  # samples in a row that are of one problem and share their weights, see ldm/particles.py
    evaluations: int | None = None,      # of D per sample, at most: chooses `steps` for either form
    **common: Unpack[Products],          # levels (default: log-spaced), noise, start, device, dtype, h, mode
) -> States:  # fmt: skip
    """One correction per diffusion step, LAST in the last one through a decoder; a generator of `State` as `newton_sampler`:

        x0 = D(x_t, t);  d by (*) from `vectors` products with J
        x_s = DDIM step from (x_t, x0) + strength alpha_s d;  x0 <- x0 + d

    1 + vectors evaluations of D at each step, and one where J is left out (sigma_t / alpha_t < late). notebooks/fast_sampler.md
    explains the steps and the defaults.

    particles = P > 1 is the form that comes closer to the posterior the more steps and particles there are, where y has few values
    (benchmarks/posterior.py). Each P samples in a row, of one y, share weights. Images are not weighted: with 16 values of y per
    vector or more, weights are mostly error (ldm/particles.py). 1 + vectors evaluations at every step; `evaluations` that 200
    steps do not spend make more vectors. strength, late, eta and fresh belong to the form without particles.

    A measurement of the decoded image, with an encoder and a linear A, is solved for on the image where J is left out, and encoded
    again (`step_with_encoder`). Any other constraint with `linearised` is solved by (*) with its A. Without, e takes the place of
    r, and the difference of e along w = V e that of A w; sigma_y must be 0 then. The noise of a soft mask (ldm/operators.py) adds
    to sigma_y. `constraint=None` samples without one (`steps` evaluations). Raises ValueError for wrong arguments at once, and
    FloatingPointError at the end if an x0 was not finite: nothing waits for a tensor's values before.
    """
    constraint = as_constraint(constraint)
    late = late_for(constraint, sigma_y) if late is None else late
    if steps is not None and evaluations is not None:
        raise ValueError(f"steps = {steps} and evaluations = {evaluations}: give one of them")
    if vectors is None:
        vectors = max(1, evaluations // MOST_STEPS - 1) if particles > 1 and evaluations is not None else 1
    if steps is None:
        steps = 24 if evaluations is None else steps_for(evaluations, D.schedule, vectors, late, particles)
    strength = min(PUSH, 55 / steps) if strength is None else strength
    settings = Settings(vectors, strength, late, sigma_y, eta, fresh, common.pop("h", None), common.pop("mode", None))
    _check(settings, constraint)
    if int(particles) != particles or particles < 1 or shape[0] % particles:
        raise ValueError(f"particles = {particles}: give an integer >= 1 that divides the batch of {shape[0]} samples")
    if constraint is None or particles == 1:
        run = begin(D, shape, seeds, lambda: D.schedule.log_levels(steps), **common)  # type: ignore[misc]
        return _fast_sampler(run, constraint, settings)
    if constraint.linearised is None:
        raise ValueError(f"particles = {particles}: this constraint has no A to weigh them with, give 1")
    run = begin(D, shape, seeds, lambda: particle_levels(D.schedule, steps), **common)  # type: ignore[misc]
    return particle_sampler(run, constraint, particles, vectors, sigma_y, settings.h, settings.mode)


@torch.inference_mode()
def _fast_sampler(run: Run, constraint: Constraint | None, s: Settings):
    D, levels, noise, x_t = run
    total = x_t.new_zeros(())
    for i, (now, to) in enumerate(pairwise(levels), start=1):
        x0 = D(x_t, now.t)
        if constraint is None:
            x_t = D.schedule.step(x_t, x0, now, to, s.eta, noise)
        elif uses_J(now, to, s.late):
            x_t, x0 = step_with_J(D, constraint, x_t, x0, now, to, noise, s)
        elif constraint.through_encoder:
            x_t, x0 = step_with_encoder(constraint, x_t, x0, now, to, noise, s)
        elif s.sigma_y == 0 and not constraint.noisy:
            x_t, x0 = step_without_J(constraint, x_t, x0, now, to, noise, s)
        else:
            x_t, x0 = step_with_noise(constraint, x_t, x0, now, to, noise, s)
        total = total + x0.sum()  # NaN and infinity stay in a sum
        if to.sigma == 0:
            check_finite(total, now.t)
        sent = yield State(i, now.t, x_t, x0, None if constraint is None else constraint.residual(x0), D.calls, to.t, drawn(noise))
        x_t = x_t if sent is None else sent


# ---- the four kinds of steps: from x_t at `now` to x_s at `to`, and the x0 that goes with it


def step_with_J(D, constraint, x_t, x0, now: Level, to: Level, noise, s: Settings) -> tuple[Tensor, Tensor]:
    """V = gamma J. The push on x_t is `strength` times d, since D answers a move alpha d by alpha J d: little at high noise.

    It counts y in every step anew. What a soft mask keeps may count once only: then x_s is the DDIM step from (x_t, x0 + d), which
    is exact for Gaussians.
    """
    d = correction_with_J(D, constraint, x_t, x0, now, s)
    if constraint.noisy:
        return D.schedule.step(x_t, x0 + d, now, to, s.eta, noise), x0 + d
    return D.schedule.step(x_t, x0, now, to, s.eta, noise) + to.alpha * s.strength * d, x0 + d


def correction_with_J(D, constraint, x_t, x0, now: Level, s: Settings) -> Tensor:
    """d by (*) for V = gamma J, preconditioned by V = v I, v = sigma_t^2 / (sigma_t^2 + alpha_t^2): the variance of x_0 given x_t
    where each of its values is normal by itself, of variance 1. The pushes carry PUSH^2 times the variance of y's noise."""
    gamma = now.sigma**2 / max(now.alpha, 1e-3)  # a flow starts at alpha = 0
    v = now.sigma**2 / (now.sigma**2 + now.alpha**2)
    V = lambda w: gamma * jvp(D, x_t, now.t, w, x0, s.h, s.mode)  # noqa: E731
    return correction(constraint, x0, V, s.vectors, s.sigma_y, about=v / PUSH**2)


def step_without_J(constraint, x_t, x0, now: Level, to: Level, noise, s: Settings) -> tuple[Tensor, Tensor]:
    """V = I, exact y. Most of the noise is drawn anew (DDRM, Kawar et al., NeurIPS 2022), so that D mends what corrections left:

    x_s = alpha_s (x0 + d) + sigma_s (sqrt(1 - fresh^2) eps + fresh n),   eps = (x_t - alpha_t D(x_t, t)) / sigma_t

    Through a decoder one correction meets y in part only. In the last step, which D does not mend, there are LAST of them, each
    with the derivative at the x0 before.
    """
    eps = (x_t - now.alpha * x0) / now.sigma
    decoder = constraint.through_decoder and constraint.linearised is not None  # not linear, and no step comes after the last
    for _ in range(LAST if decoder and to.sigma == 0 else 1):
        x0 = x0 + correction(constraint, x0, lambda v: v, INNER if constraint.linear else 1)
    if to.sigma == 0:
        return x0, x0
    return to.alpha * x0 + to.sigma * ((1 - s.fresh**2) ** 0.5 * eps + s.fresh * noise()), x0


def step_with_encoder(constraint, x_t, x0, now: Level, to: Level, noise, s: Settings) -> tuple[Tensor, Tensor]:
    """V = v I, v = (sigma_t / alpha_t)^2, on the image, which is encoded again (LATINO, Spagnoletti et al., ICCV 2025):

        x0 <- Enc(x + d),   x = Dec(x0),   d by (*) from x

    Nothing is differentiated. x_s as in `step_without_J`. What the encoder loses of an exact y is made up for in the last step, by
    its LAST corrections of x0.
    """
    eps, std = (x_t - now.alpha * x0) / now.sigma, now.sigma / max(now.alpha, 1e-3)
    x = constraint.image(x0)
    x0 = constraint.encoded(x + correction(constraint.pixels, x, lambda v: std**2 * v, INNER, s.sigma_y), x0)
    if to.sigma == 0:
        for _ in range(LAST if s.sigma_y == 0 else 0):
            x0 = x0 + correction(constraint, x0, lambda v: v, 1)
        return x0, x0
    return to.alpha * x0 + to.sigma * ((1 - s.fresh**2) ** 0.5 * eps + s.fresh * noise()), x0


def step_with_noise(constraint, x_t, x0, now: Level, to: Level, noise, s: Settings) -> tuple[Tensor, Tensor]:
    """V = v I, v = (sigma_s / alpha_s)^2, y with noise: that of d counts as a part of x_s's own, so that D removes both.

        d = K (y - A (x0 + sqrt(v) n')),   K = V A^T (sigma_y^2 I + A V A^T)^-1,   n' normal, correlation with n 1 / (2 fresh)

    Where A has the singular value q, with w = v q^2 / (v q^2 + sigma_y^2), the variances add up to v: v (1 - w + w^2) from eps, n
    and n', v (w - w^2) from y. x0 stays D's estimate, in the last step too, but where a soft mask has the weight 1.
    """
    if to.sigma == 0:
        x0 = x0 if s.sigma_y > 0 else x0 + correction(constraint.at(to), x0, lambda v: v, INNER if constraint.linear else 1)
        return x0, x0
    eps, std, c = (x_t - now.alpha * x0) / now.sigma, to.sigma / to.alpha, 0.5 / s.fresh
    n = noise()
    shift = std * (c * n + (1 - c**2) ** 0.5 * noise())
    d = correction(constraint, x0, lambda v: std**2 * v, INNER if constraint.linear else 1, s.sigma_y, shift)
    return to.alpha * (x0 + d) + to.sigma * ((1 - s.fresh**2) ** 0.5 * eps + s.fresh * n), x0


def uses_J(now: Level, to: Level, late: float) -> bool:
    """Whether the step from `now` to `to` uses J."""
    return to.sigma > 0 and now.sigma >= late * now.alpha


def late_for(constraint: Constraint | None, sigma_y: float) -> float:
    """Where J is left out by default: below sigma_t / alpha_t = 0.3, with an encoder and noise below 0.6."""
    return 0.6 if sigma_y > 0 and constraint is not None and constraint.through_encoder else 0.3


def steps_for(evaluations: int, schedule: Schedule, vectors: int = 1, late: float = 0.3, particles: int = 1) -> int:
    """The most diffusion steps, at most 200, that `fast_sampler` takes with so many evaluations of D. ValueError if none."""

    def cost(steps):
        if particles > 1:
            return (1 + vectors) * (len(particle_levels(schedule, steps)) - 1)
        return steps + vectors * sum(uses_J(now, to, late) for now, to in pairwise(schedule.log_levels(steps)))

    if cost(3) > evaluations:
        raise ValueError(f"evaluations = {evaluations}: three diffusion steps take {cost(3)} already")
    return 2 + bisect(range(3, MOST_STEPS + 1), evaluations, key=cost)


def _check(s: Settings, constraint: Constraint | None) -> None:
    if int(s.vectors) != s.vectors or s.vectors < 1:
        raise ValueError(f"vectors = {s.vectors}: give an integer >= 1")
    for name, value in {"late": s.late, "sigma_y": s.sigma_y}.items():
        if not value >= 0:
            raise ValueError(f"{name} = {value}: give a number >= 0")
    if not s.strength > 0:
        raise ValueError(f"strength = {s.strength}: give a positive number")
    noisy = s.sigma_y > 0 or constraint is not None and constraint.noisy
    least = 0.5 if noisy else 0
    if not least <= s.fresh <= 1:
        raise ValueError(f"fresh = {s.fresh}: give a number from {least} to 1")
    check_eta(s.eta)
    check_product(s.h, s.mode)
    if noisy and (constraint is None or constraint.linearised is None):
        given = f"sigma_y = {s.sigma_y}" if s.sigma_y > 0 else "a soft mask"
        raise ValueError(f"{given}: this constraint has no A to weigh the noise with, give 0, and masks of 0 and 1")
