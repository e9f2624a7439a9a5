"""A faster solver for the same problem: about 44 evaluations of D instead of the paper's 220, forward passes only.

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


def gcr(r, product, vectors, noise_variance=0.0, recycled=()):
    """Generalised conjugate residuals (Eisenstat et al. 1983), each sample by itself: minimises |r - M lambda|_2 with
    M u = noise_variance u + m over the Krylov space of `vectors` vectors; M need not be symmetric. One vector: a line search.

    product: u -> (w, m), in (*) w = V A^T u and m = A w. recycled: triples (u, w, m) that are tried first and cost no product.
    Returns the sums of all u and w, by their coefficients: lambda and d; and what is left of r.
    """
    directions, total_u, total_w = [], torch.zeros_like(r), 0.0
    for k in range(len(recycled) + vectors):
        if k < len(recycled):
            u, w, m = recycled[k]
        else:
            u = r
            w, m = product(u)
        m = noise_variance * u + m
        for old_u, old_w, old_m in directions:
            b = _ratio(dot(m, old_m), dot(old_m, old_m))
            u, w, m = u - b * old_u, w - b * old_w, m - b * old_m
        c = _ratio(dot(r, m), dot(m, m))
        directions.append((u, w, m))
        total_u, total_w, r = total_u + c * u, total_w + c * w, r - c * m
    return total_u, total_w, r


def _ratio(a, b):
    """a / b, and 0 where b is 0: nothing to correct, or a direction without effect."""
    return torch.where(b > 1e-30, a / b.clamp_min(1e-30), 0.0)


def solve_without_J(A, r, variance, noise_variance, vectors=INNER):
    """d of (*) for V = variance I: no evaluation of D."""

    def product(u):
        w = variance * A.adjoint(u)
        return w, A(w)

    return gcr(r, product, vectors, noise_variance)[1]


def fast_sampler(
    D,
    constraint,
    shape,                  # [B, C, H, W] of x_t
    seeds,                  # one integer per sample
    steps=24,               # diffusion steps
    vectors=1,              # products with J at each of them, where J is used
    recycle=1,              # corrections of earlier steps that are tried again, at no evaluation
    relax=1.5,              # over-relaxation: x_t and x0 move by relax * d while J is used
    late=0.3,               # J is left out where sigma_t / alpha_t is below this, and in the last step
    sigma_y=0.0,            # standard deviation of the measurement's noise
    eta=1.0,                # 0: DDIM, 1: ancestral noise
    refit=False,            # leave x_t where it is, and fit eps to the moved x0
    grid="log",             # levels: see `log_levels`, or "uniform" as the schedule has them
    trust=1.0,              # largest |d|_inf of a step, before relax, where only (e, residual) is known
    h=0.005,                # finite-difference length, in units of x_t
    mode="difference",      # of the Jacobian product, see `jvp`
    device="cpu",
    dtype=torch.float32,
):  # fmt: skip
    """One correction per diffusion step, as a generator of `State` with the contract of `newton_sampler`:

        x0 = D(x_t, t);  d by (*) from `vectors` products with J;  x0 += relax d, x_t += relax alpha d;  step to the next t

    1 + vectors evaluations of D at each step; where J is left out, V = (sigma_t / alpha_t)^2 I and the evaluation of x0 is the only
    one. The last step leaves it out, so that a mask's or down-sampling's y is met to rounding if sigma_y = 0. With noise, no
    correction goes below the noise level (discrepancy principle): a sample whose residual's RMS is sigma_y already stays as it is.
    relax: D answers the move alpha d of x_t with alpha J d only, which at high noise is less than the d that was asked for.
    The bias of moving x_t and of relax > 1 on a Gaussian is in tests/test_solver.py; refit=True, relax=1, grid="uniform" is exact
    there, and was worse on digits with few steps (benchmarks/compare_ablation.py).

    constraint: where it has A and y (LinearConstraint), (*) is solved with A itself. Any other callable x0 -> (e, residual) is
    linearised along w = V e by one more call of it, A w ~ (e(x0) - e(x0 + s w)) / s, and e takes the place of r; sigma_y must be 0
    then. `constraint=None` samples without one (`steps` evaluations). Raises ValueError for wrong arguments at once, and
    FloatingPointError at the end if an x0 was not finite: before, nothing waits for the values of a tensor.
    """
    for name, value, least in (("vectors", vectors, 1), ("recycle", recycle, 0)):
        if int(value) != value or value < least:
            raise ValueError(f"{name} = {value}: give an integer >= {least}")
    for name, value in {"late": late, "sigma_y": sigma_y}.items():
        if not value >= 0:
            raise ValueError(f"{name} = {value}: give a number >= 0")
    for name, value in {"h": h, "trust": trust, "relax": relax}.items():
        if not value > 0:
            raise ValueError(f"{name} = {value}: give a positive number")
    check_eta_and_mode(eta, mode)
    if grid not in ("log", "uniform"):
        raise ValueError(f'grid = {grid!r}: known are "log" and "uniform"')
    if sigma_y > 0 and not hasattr(constraint, "A"):
        raise ValueError(f"sigma_y = {sigma_y}: this constraint has no A to weigh the noise with, give 0")
    levels = log_levels(D.schedule, steps) if grid == "log" else D.schedule.levels(steps)
    noise, D = seeded_noise(shape, seeds, device, dtype), _Counted(D)

    def correction(x_t, x0, now, with_J, recycled):
        alpha = max(now.alpha, 1e-3)  # a flow starts at 0
        gamma = now.sigma**2 / alpha
        V = lambda v: gamma * jvp(D, x_t, now.t, v, x0, h, mode) if with_J else gamma / alpha * v  # noqa: E731
        count = vectors if with_J else INNER
        if hasattr(constraint, "A"):
            return linear_correction(constraint, x0, V, count, sigma_y, recycled)
        return general_correction(constraint, x0, V, vectors if with_J else 1, trust, recycled)

    return _fast_sampler(D, constraint, noise, levels, relax, late, recycle, eta, refit, correction)


@torch.inference_mode()
def _fast_sampler(D, constraint, noise, levels, relax, late, recycle, eta, refit, correction):
    x_t, kept, finite = noise(), [], True
    for i, (now, to) in enumerate(pairwise(levels)):
        x0 = D(x_t, now.t)
        residual = None
        if constraint is not None:
            with_J = to.sigma > 0 and now.sigma >= late * now.alpha
            pair = correction(x_t, x0, now, with_J, kept if with_J else [])
            kept = (kept + [pair])[len(kept) + 1 - recycle :]
            d = relax * pair[1] if with_J else pair[1]
            x0 = x0 + d
            x_t = x_t if refit else x_t + now.alpha * d
            residual = constraint(x0)[1]
        finite = finite & torch.isfinite(x0).all()
        if to.sigma == 0 and not finite:
            raise FloatingPointError("x0 is not finite: raise h, or run the network in float32")
        x_t = D.schedule.step(x_t, x0, now, to, eta, noise)
        yield State(i + 1, now.t, x_t, x0, residual, D.calls)


def linear_correction(constraint, x0, V, vectors, sigma_y, recycled=()):
    """(lambda, d) of (*) at x0, for a constraint with A and y; V a function v -> V v, recycled such pairs of earlier steps."""
    A, r = constraint.A, constraint.residual(x0)
    if sigma_y > 0:
        excess = 1 - sigma_y / constraint.rms(r).clamp_min(1e-30)
        r = r * excess.clamp_min(0).view(-1, *[1] * (r.ndim - 1)).to(r)

    def product(u):
        w = V(A.adjoint(u))
        return w, A(w)

    u, d, _ = gcr(r, product, vectors, sigma_y**2, [(u, w, A(w)) for u, w in recycled])
    return u, d


def general_correction(constraint, x0, V, vectors, trust, recycled=()):
    """The same with e for r, as far as |d|_inf <= trust."""
    e, _ = constraint(x0)

    def push(w):
        s = 0.1 * trust / max_norm(w).clamp_min(1e-30)
        return (e - constraint(x0 + s * w)[0]) / s

    def product(u):
        w = V(u)
        return w, push(w)

    u, d, _ = gcr(e, product, vectors, 0.0, [(u, w, push(w)) for u, w in recycled])
    shorter = (trust / max_norm(d).clamp_min(1e-30)).clamp_max(1.0)
    return shorter * u, shorter * d


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
