"""A faster solver for the same problem: 43 evaluations of D instead of the paper's 220, forward passes only.

For the ideal denoiser, V = gamma J with gamma = sigma_t^2 / alpha_t is the covariance of x_0 given x_t (Tweedie's second order;
Rozet et al. 2024 use it with J^T). Given y = A x_0 + sigma_y n, the mean of x_0 then moves from D(x_t, t) by

    d = V A^T lambda,   (sigma_y^2 I + A V A^T) lambda = r = y - A D(x_t, t)                                             (*)

The direction for one vector, J A^T r, is the paper's; its length here is exact, and known from products already computed.
"""

from bisect import bisect
from itertools import pairwise

import torch

from ldm.newton_sampler import State, _Counted, check_eta_and_mode, jvp, max_norm, seeded_noise

INNER = 10  # vectors where J is left out: they cost no evaluation of D. One is exact for masks, ten are for down-sampling


def dot(a, b):
    """<a, b> of each sample: [B, ...] -> [B, 1, 1, ...]."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def gcr(r, product, vectors, noise_variance=0.0):
    """Generalised conjugate residuals (Eisenstat et al. 1983), each sample by itself: minimises |r - M lambda|_2 with
    M u = noise_variance u + m over the Krylov space of `vectors` vectors; M need not be symmetric. One vector: a line search.

    product: u -> (w, m), in (*) w = V A^T u and m = A w. Returns the sum of all w by their coefficients, in (*) d, and what is
    left of r.
    """
    directions, total = [], 0.0
    for _ in range(vectors):
        w, m = product(r)
        m = noise_variance * r + m
        for old_w, old_m in directions:
            b = _ratio(dot(m, old_m), dot(old_m, old_m))
            w, m = w - b * old_w, m - b * old_m
        c = _ratio(dot(r, m), dot(m, m))
        directions.append((w, m))
        total, r = total + c * w, r - c * m
    return total, r


def _ratio(a, b):
    """a / b, and 0 where b is 0: nothing to correct, or a direction without effect."""
    return torch.where(b > 1e-30, a / b.clamp_min(1e-30), 0.0)


def solve_without_J(A, r, variance, noise_variance, vectors=INNER):
    """d of (*) for V = variance I: no evaluation of D."""

    def product(u):
        w = variance * A.adjoint(u)
        return w, A(w)

    return gcr(r, product, vectors, noise_variance)[0]


def fast_sampler(
    D,
    constraint,
    shape,                  # [B, C, H, W] of x_t
    seeds,                  # one integer per sample, or a function that draws the noise, see `seeded_noise`
    steps=24,               # diffusion steps
    vectors=1,              # products with J at each of them, where J is used
    strength=None,          # of the correction's push on x_t, where J is used; None: 2.3, or 55 / steps if that is less
    late=0.3,               # J is left out where sigma_t / alpha_t is below this, and in the last step
    sigma_y=0.0,            # standard deviation of the measurement's noise
    eta=0.5,                # 0: DDIM, 1: ancestral noise, where J is used
    fresh=0.85,             # part of x_s's noise that is drawn anew where J is left out
    refit=False,            # the step from x0 + strength * d instead: eps is fitted to the moved x0
    grid="log",             # levels: see `log_levels`, or "uniform" as the schedule has them
    trust=1.0,              # largest |d|_inf of a step, where the constraint is not linear
    h=0.005,                # finite-difference length, in units of x_t
    mode="difference",      # of the Jacobian product, see `jvp`
    device="cpu",
    dtype=torch.float32,
):  # fmt: skip
    """One correction per diffusion step, as a generator of `State` with the contract of `newton_sampler`:

        x0 = D(x_t, t);  d by (*) from `vectors` products with J
        x_s = DDIM step from (x_t, x0) + strength alpha_s d;  x0 <- x0 + d

    1 + vectors evaluations of D at each step. Where J is left out, V = v I, and the evaluation of x0 is the only one. Most of the
    noise is drawn anew then (fresh = 0.85, as in DDRM, Kawar et al., NeurIPS 2022), so that D mends what the corrections left:

        x_s = alpha_s (x0 + d) + sigma_s (sqrt(1 - fresh^2) eps + fresh n),   eps = (x_t - alpha_t D(x_t, t)) / sigma_t

    So it is in the last step (sigma_s = 0), which meets a mask's or down-sampling's y to rounding if sigma_y = 0. With measurement
    noise, that of d counts as a part of x_s's own, so that D removes both (DDRM's idea, without singular values):
    v = (sigma_s / alpha_s)^2, and

        d = K (y - A (x0 + sqrt(v) n')),   K = V A^T (sigma_y^2 I + A V A^T)^-1,   n' normal, correlation with n 1 / (2 fresh)

    Where A has the singular value s, with w = v s^2 / (v s^2 + sigma_y^2), the variances add up to v: v (1 - w + w^2) from eps, n
    and n', v (w - w^2) from y. x0 stays D's estimate, in the last step too.

    strength: D answers a move alpha d of x_t by alpha J d only, which at high noise is far less than the d that was asked for, so
    that a stronger push pays. Above 3 to 4 it overshoots where J has large eigenvalues, and diverges on the shipped models. In the
    limit of many steps the default is posterior sampling with a guidance of about 9. refit=True, strength=1, late=0,
    grid="uniform" is exact for a Gaussian, and was worse on digits with few steps; the bias of the default on a Gaussian is in
    tests/test_solver.py (benchmarks/compare_ablation.py: each idea on and off).

    constraint: one with `linearised` (LinearConstraint, DecodedConstraint) is solved by (*) with its A, or the derivative of A Dec
    at x0. Any other callable x0 -> (e, residual) is linearised along w = V e by one more call of it,
    A w ~ (e(x0) - e(x0 + s w)) / s, and e takes the place of r; sigma_y must be 0 then. `constraint=None` samples without one
    (`steps` evaluations). Raises ValueError for wrong arguments at once, and FloatingPointError at the end if an x0 was not
    finite: before, nothing waits for the values of a tensor.
    """
    levels = _levels(D.schedule, steps, grid)
    if int(vectors) != vectors or vectors < 1:
        raise ValueError(f"vectors = {vectors}: give an integer >= 1")
    for name, value in {"late": late, "sigma_y": sigma_y}.items():
        if not value >= 0:
            raise ValueError(f"{name} = {value}: give a number >= 0")
    strength = min(2.3, 55 / steps) if strength is None else strength
    for name, value in {"h": h, "trust": trust, "strength": strength}.items():
        if not value > 0:
            raise ValueError(f"{name} = {value}: give a positive number")
    least = 0.5 if sigma_y > 0 else 0
    if not least <= fresh <= 1:
        raise ValueError(f"fresh = {fresh}: give a number from {least} to 1")
    check_eta_and_mode(eta, mode)
    if sigma_y > 0 and not hasattr(constraint, "linearised"):
        raise ValueError(f"sigma_y = {sigma_y}: this constraint has no A to weigh the noise with, give 0")
    noise, D = seeded_noise(shape, seeds, device, dtype), _Counted(D)

    inner = INNER if hasattr(constraint, "A") else 1  # through a decoder a second vector costs more than it gains

    def correction(x0, V, count, shift=None):
        if hasattr(constraint, "linearised"):
            d = linear_correction(constraint, x0, V, count, sigma_y, shift)
            return d if hasattr(constraint, "A") else shortened(d, trust)
        return shortened(general_correction(constraint, x0, V, count), trust)

    def with_J(x_t, x0, now, to):
        gamma = now.sigma**2 / max(now.alpha, 1e-3)  # a flow starts at alpha = 0
        d = correction(x0, lambda v: gamma * jvp(D, x_t, now.t, v, x0, h, mode), vectors)
        if refit:
            return D.schedule.step(x_t, x0 + strength * d, now, to, eta, noise), x0 + d
        return D.schedule.step(x_t, x0, now, to, eta, noise) + to.alpha * strength * d, x0 + d

    def without_J(x_t, x0, now, to):
        eps, std = (x_t - now.alpha * x0) / now.sigma, to.sigma / to.alpha
        if sigma_y == 0:
            x0 = correct = x0 + correction(x0, lambda v: v, inner)  # V's factor is of no account
        if to.sigma == 0:
            return x0, x0
        n = noise()
        if sigma_y > 0:
            c = 0.5 / fresh
            shift = std * (c * n + (1 - c**2) ** 0.5 * noise())
            correct = x0 + correction(x0, lambda v: std**2 * v, inner, shift)
        return to.alpha * correct + to.sigma * ((1 - fresh**2) ** 0.5 * eps + fresh * n), x0

    def step(x_t, x0, now, to):
        """x_s and the corrected x0."""
        if constraint is None:
            return D.schedule.step(x_t, x0, now, to, eta, noise), x0
        return (with_J if _with_J(now, to, late) else without_J)(x_t, x0, now, to)

    return _fast_sampler(D, constraint, noise, levels, step)


@torch.inference_mode()
def _fast_sampler(D, constraint, noise, levels, step):
    x_t, finite = noise(), True
    for i, (now, to) in enumerate(pairwise(levels)):
        x0 = D(x_t, now.t)
        x_t, x0 = step(x_t, x0, now, to)
        finite = finite & torch.isfinite(x0).all()
        if to.sigma == 0 and not finite:
            raise FloatingPointError("x0 is not finite: lower strength, raise h, or run the network in float32")
        yield State(i + 1, now.t, x_t, x0, None if constraint is None else residual_of(constraint, x0), D.calls)


def residual_of(constraint, x0):
    """The constraint's residual [B], without its error direction where the two can be had apart."""
    return constraint.rms(constraint.residual(x0)) if hasattr(constraint, "residual") else constraint(x0)[1]


def _with_J(now, to, late):
    """Whether the step from `now` to `to` uses J."""
    return to.sigma > 0 and now.sigma >= late * now.alpha


def _levels(schedule, steps, grid):
    if grid not in ("log", "uniform"):
        raise ValueError(f'grid = {grid!r}: known are "log" and "uniform"')
    return log_levels(schedule, steps) if grid == "log" else schedule.levels(steps)


def steps_for(evaluations, schedule, vectors=1, late=0.3, grid="log"):
    """The most diffusion steps, at most 200, that `fast_sampler` takes with so many evaluations of D. ValueError if none."""

    def cost(steps):
        return steps + vectors * sum(_with_J(now, to, late) for now, to in pairwise(_levels(schedule, steps, grid)))

    if cost(3) > evaluations:
        raise ValueError(f"evaluations = {evaluations}: three diffusion steps take {cost(3)} already")
    return 2 + bisect(range(3, 201), evaluations, key=cost)


def linear_correction(constraint, x0, V, vectors, sigma_y, shift=None):
    """d of (*), A linearised at x0; V a function v -> V v. With shift, r is that of x0 + shift."""
    A, r = constraint.linearised(x0)
    r = r if shift is None else r - A(shift)

    def product(u):
        w = V(A.adjoint(u))
        return w, A(w)

    return gcr(r, product, vectors, sigma_y**2)[0]


def general_correction(constraint, x0, V, vectors):
    """The same with e for r, and with the difference of e along w for A w."""
    e, _ = constraint(x0)

    def product(u):
        w = V(u)
        s = 0.1 / max_norm(w).clamp_min(1e-30)
        return w, (e - constraint(x0 + s * w)[0]) / s

    return gcr(e, product, vectors)[0]


def shortened(d, trust):
    """d, as far as |d|_inf <= trust, each sample by itself."""
    return (trust / max_norm(d).clamp_min(1e-30)).clamp_max(1.0) * d


def log_levels(schedule, steps, first=20.0, last=0.1):
    """steps + 1 levels: the noisiest, then sigma / alpha from `first` to `last` in equal ratios, then clean.

    Above 20, D is the mean of all pictures nearly, whatever x_t; below 0.1, x_t itself. Taken from 1,000 levels of the schedule.
    """
    if int(steps) != steps or not 3 <= steps <= 200:
        raise ValueError(f"steps = {steps}: give an integer from 3 to 200")
    *noisy, clean = schedule.levels(min(getattr(schedule, "__len__", lambda: 1000)(), 1000))
    ratios = [level.alpha / level.sigma for level in noisy]  # increasing
    first, chosen = min(first, 0.8 / max(ratios[0], 1e-3)), [noisy[0]]
    for i in range(steps - 1):
        wanted = (last / first) ** (-i / (steps - 2)) / first
        k = min(bisect(ratios, wanted), len(noisy) - 1)
        chosen.append(noisy[k - 1] if k and wanted / ratios[k - 1] < ratios[k] / wanted and ratios[k - 1] > 0 else noisy[k])
    return list(dict.fromkeys(chosen)) + [clean]
