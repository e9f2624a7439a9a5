"""Twisted particles: groups of samples of one problem that share their weights; forward passes of D only.

After Wu et al., "Practical and asymptotically exact conditional sampling in diffusion models" (NeurIPS 2023), whose twisting
function takes a gradient through D. Here it is the Gaussian of `fast_sampler`, made of products with J: with V = gamma J,

    p(y | x_t) ~ N(y; A D(x_t, t), C),   C = sigma_y^2 I + A V A^T                                                       (1)

Proposals are ancestral steps from x0 + d, d = V A^T C^-1 r, and log weights grow by

    log N(x_s; step from x0) - log N(x_s; step from x0 + d) + log p(y | x_s) - log p(y | x_t)

Where C is exact, and for many particles and small steps, the samples are the posterior's, whatever its shape. With K vectors of
m > K measured values it is not: log weights would be off by a sum of m squares, whose deviation grows as sqrt(m), and all particles
of an image would soon descend from one. They count by sqrt(K / m) then, which keeps that deviation as that of K values. With more
than 4 K values they count less, with 16 K or more not at all: they would be error only. Samples of an image are independent then.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.correction import INNER, TRUST, correction
from ldm.linalg import dot, norm, ratio, shortened
from ldm.sampling import Run, State, check_finite, drawn, jvp
from ldm.schedules import Level, Schedule


def particle_levels(schedule: Schedule, steps: int) -> list[Level]:
    """The noise levels of a run: those of `fast_sampler`, down to less noise, since J is used to the end."""
    return schedule.log_levels(steps, last=0.02)


@torch.inference_mode()
def particle_sampler(run: Run, constraint, particles: int, vectors: int, sigma_y: float, h=None, mode=None):
    """The generator behind `fast_sampler(..., particles=P)`, P > 1. A run that goes on from a state begins with equal weights."""
    D, levels, noise, x_t = run
    log_w = growth = before = x_t.new_zeros(len(x_t))
    for i, (now, to) in enumerate(pairwise(levels), start=1):
        x0 = D(x_t, now.t)
        V = lambda v: now.sigma**2 / max(now.alpha, 1e-3) * jvp(D, x_t, now.t, v, x0, h, mode)  # noqa: B023, E731
        A, r = constraint.linearised(x0)
        d, log_p = twist(A, r, V, vectors, sigma_y)
        d = d if constraint.linear else shortened(d, TRUST)
        log_w, before = log_w + trusted(vectors, r) * (growth + log_p - before), log_p
        chosen, log_w = resampled(log_w.view(-1, particles), noise(), last=to.sigma == 0)
        x_t, x0, d, before = x_t[chosen], x0[chosen], d[chosen], before[chosen]
        if to.sigma == 0:
            check_finite(x0 + d, now.t)
            x_t = x0 + d
            if constraint.linear and sigma_y == 0 and not constraint.noisy:  # the rest of y, the shortest way
                x_t = x_t + correction(constraint, x_t, lambda v: v, INNER)
            d = x_t - x0
        else:
            n, z = D.schedule.added_noise(now, to, 1.0), noise()
            shift = (to.alpha - (to.sigma**2 - n**2) ** 0.5 * now.alpha / now.sigma) * d / n  # of the mean, in units of n
            growth = -(dot(shift, z) + 0.5 * dot(shift, shift)).flatten()
            x_t = D.schedule.step(x_t, x0, now, to, 1.0, lambda: z + shift)  # noqa: B023
        sent = yield State(i, now.t, x_t, x0 + d, constraint.residual(x0 + d), D.calls, to.t, drawn(noise))
        x_t = x_t if sent is None else sent


def twist(A, r: Tensor, V: Callable[[Tensor], Tensor], vectors: int, sigma_y: float) -> tuple[Tensor, Tensor]:
    """d [B, ...] = V A^T C^-1 r, and log p(y | x_t) of (1) up to a constant, [B].

    C is taken on a basis of y's space: the whole of it if it has no more than `vectors` dimensions, else the Krylov space of r. J
    of a trained D is not symmetric: the symmetric part of A V A^T counts, and no variance below that of the noise. Where J gives a
    direction q no variance to speak of (q C q below a tenth of |C q|), it is |C q|: d would be any number otherwise.
    """
    m, u = r[0].numel(), r
    if m == 0:  # nothing is measured
        return torch.zeros_like(A.adjoint(r)), r.new_zeros(len(r))
    basis: list[Tensor] = []  # u_1, u_2 ...
    moves: list[Tensor] = []  # V A^T u of them
    products: list[Tensor] = []  # C u of them
    for k in range(min(m, vectors)):
        if m <= vectors:
            u = torch.eye(m, dtype=r.dtype, device=r.device)[k].view(1, *r.shape[1:]).expand_as(r)
        else:
            for old in basis * 2:  # the second time removes what rounding left of the first
                u = u - dot(old, u) * old
            u = ratio(u, norm(u))
        basis.append(u)
        moves.append(V(A.adjoint(u)))
        products.append(A(moves[-1]) + (sigma_y**2 + A.variance) * u)
        u = products[-1]
    Q, CQ = (torch.stack([v.flatten(1) for v in vs], 1) for vs in (basis, products))  # [B, K, m]
    C = Q @ CQ.mT
    values, rotation = torch.linalg.eigh((C + C.mT) / 2)
    lengths = (rotation.mT @ CQ).norm(dim=2)  # |C q|, the value itself where q is an eigenvector
    values = torch.where(values > 0.1 * lengths, values, lengths)
    values = values.maximum((1e-6 * values.amax(1, keepdim=True)).clamp_min(max(1e-18, sigma_y**2)))
    c = (rotation.mT @ (Q @ r.flatten(1)[..., None]))[..., 0]  # r in C's own basis
    weights = (rotation @ (c / values)[..., None])[..., 0]  # [B, K]
    d = torch.stack([w.view(-1, *[1] * (v.ndim - 1)) * v for w, v in zip(weights.unbind(1), moves, strict=True)]).sum(0)
    return d, -0.5 * (c.square() / values + values.log()).sum(1)


def trusted(vectors: int, r: Tensor) -> Tensor:
    """The part by which log weights count, [B], for K vectors and the m values of r [B, ...] that are not 0: 1 up to m = K,
    sqrt(K / m) up to 4 K, and from there down to 0 at 16 K."""
    q = (vectors / (r != 0).flatten(1).sum(1).clamp_min(1)).clamp_max(1)
    return q.sqrt() * ((16 * q - 1) / 3).clamp(0, 1)


def resampled(log_w: Tensor, noise: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """Log weights [N, P] of N problems, and normal noise [N P, ...] -> (chosen [N P], log weights [N P]) after resampling.

    Systematic, in the problems whose effective number of particles has fallen below P / 2; last: in all whose weights are not
    even, each particle by itself.
    """
    N, P = log_w.shape
    w = (log_w - log_w.amax(1, keepdim=True)).exp()
    w = w / w.sum(1, keepdim=True)
    u = torch.special.ndtr(noise.flatten(1)[:, 0]).view(N, P)  # uniform, one number of each particle's own noise
    at = u if last else (u[:, :1] + torch.arange(P, device=u.device)) / P
    found = torch.searchsorted(w.cumsum(1), at).clamp_max(P - 1)
    own = torch.arange(P, device=w.device).expand(N, P)
    uneven = log_w.amax(1, keepdim=True) > log_w.amin(1, keepdim=True)
    low = uneven if last else w.square().sum(1, keepdim=True) > 2 / P
    chosen = torch.where(low, found, own) + P * torch.arange(N, device=w.device)[:, None]
    return chosen.flatten(), torch.where(low, 0.0, log_w).flatten()
