"""Linear algebra sample by sample: a tensor [B, ...] is B vectors, which never mix. Imports torch only."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample: [B, ...] -> [B, 1, 1, ...]."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def norm(v: Tensor) -> Tensor:
    """|v|_2 of each sample: [B, ...] -> [B, 1, 1, ...]."""
    return dot(v, v).sqrt()


def max_norm(v: Tensor) -> Tensor:
    """|v|_inf of each sample: [B, ...] -> [B, 1, 1, ...]."""
    return v.abs().amax(dim=tuple(range(1, v.ndim)), keepdim=True)


def unit(v: Tensor) -> Tensor:
    """v / |v|_inf, each sample by its own norm; a sample that is zero stays zero."""
    length = max_norm(v)
    return v / torch.where(length > 0, length, 1.0)


def shortened(v: Tensor, most: float) -> Tensor:
    """v, scaled down where |v|_inf > most, each sample by itself."""
    return (most / max_norm(v).clamp_min(1e-30)).clamp_max(1.0) * v


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: nothing to correct, or a direction without effect."""
    return torch.where(b > 1e-30, a / b.clamp_min(1e-30), 0.0)


Product = Callable[[Tensor], tuple[Tensor, Tensor]]


def gcr(r: Tensor, product: Product, vectors: int, noise_variance: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Generalised conjugate residuals (Eisenstat et al. 1983): least |r - M lambda|_2 over the Krylov space of `vectors` vectors.

    M u = noise_variance u + m, with (w, m) = product(u); M need not be symmetric. One vector is an exact line search.
    Returns the sum of all w by their coefficients, and what is left of r.
    """
    directions: list[tuple[Tensor, Tensor]] = []
    total: Tensor | float = 0.0
    for _ in range(vectors):
        w, m = product(r)
        m = noise_variance * r + m
        for old_w, old_m in directions:  # orthogonalise the images m
            b = ratio(dot(m, old_m), dot(old_m, old_m))
            w, m = w - _times(b, old_w), m - b * old_m
        c = ratio(dot(r, m), dot(m, m))
        directions.append((w, m))
        total, r = total + _times(c, w), r - c * m
    return torch.as_tensor(total), r


def _times(c: Tensor, v: Tensor) -> Tensor:
    """c v for one number per sample, c [B, 1, ...], and v [B, ...] of any number of dimensions."""
    return c.view(-1, *[1] * (v.ndim - 1)) * v


def power_iteration(matvec: Callable[[Tensor], Tensor], v: Tensor, iterations: int = 30) -> Tensor:
    """|M v| of the unit vector v after so many products with M: its largest eigenvalue, for a symmetric M >= 0. [B, 1, 1, ...]"""
    for _ in range(iterations):
        v = matvec(v)
        length = norm(v)
        v = v / length.clamp_min(1e-12)
    return length


class Ritz(NamedTuple):
    """What `arnoldi` finds out about a matrix M, sample by sample. After a breakdown at step m, what follows m is NaN."""

    values: torch.Tensor  # [B, n] complex128: approximate eigenvalues, the largest |.| first
    residuals: torch.Tensor  # [B, n] float64: |M x - value x| of their unit Ritz vectors x
    basis: torch.Tensor  # [B, n, N] float64: the orthonormal q_1 .. q_n as rows (zeros after a breakdown)
    hessenberg: torch.Tensor  # [B, n + 1, n] float64: H of  M Q_n = Q_{n+1} H
    steps: torch.Tensor  # [B] int64: n, or the step m of the breakdown: the first m vectors span an invariant subspace


def arnoldi(matvec: Callable[[Tensor], Tensor], b: Tensor, n: int, tolerance: float = 1e-6) -> Ritz:
    """Ritz values of M from n products with it: Arnoldi's method (Saad, Numerical Methods for Large Eigenvalue Problems, ch. 6).

    matvec     v [B, ...] -> M v, samples independent: `Jacobian(...).jvp`, `.vjp`, `.symmetric`, `.skew` or any other
    b          [B, ...] where the Krylov space begins, such as seeded noise; a sample that is zero or not finite is a ValueError
    n          products, at most the number of values of a sample
    tolerance  h_{j+1,j} below tolerance * |M q_j| counts as zero: the space is invariant, its Ritz values are eigenvalues and the
               sample stops there (a "breakdown"). 1e-6 suits products in float32

    Modified Gram-Schmidt, twice, in float64 on the CPU. The residual |h_{m+1,m} e_m^T y| is exact up to the products' own error. It
    bounds the distance to an eigenvalue of a symmetric or skew M; of another M it is a backward error: the value is an
    eigenvalue of a matrix that is that close to M.
    """
    shape, N = b.shape, b[0].numel()
    if int(n) != n or not 1 <= n <= N:
        raise ValueError(f"n = {n}: give an integer from 1 to {N}, the number of values of a sample")
    q = b.detach().flatten(1).to("cpu", torch.float64)
    if bad := [i for i, length in enumerate(q.norm(dim=1).tolist()) if not 0 < length < float("inf")]:
        raise ValueError(f"b is zero or not finite in the samples {bad}: give noise, or any other vector")
    Q = q.new_zeros(len(b), n + 1, N)
    hessenberg = q.new_zeros(len(b), n + 1, n)
    steps, going = torch.full((len(b),), n), torch.ones(len(b), dtype=torch.bool)
    Q[:, 0] = q / q.norm(dim=1, keepdim=True)
    for j in tqdm(range(n), "Arnoldi", leave=False, delay=1):
        w = matvec(Q[:, j].view(shape).to(b)).detach().flatten(1).to("cpu", torch.float64)
        if not torch.isfinite(w).all():
            raise FloatingPointError(f"the product number {j + 1} is not finite")
        size = w.norm(dim=1)
        for _ in range(2):  # the second time removes what rounding left of the first
            for i in range(j + 1):
                overlap = (Q[:, i] * w).sum(1)
                hessenberg[:, i, j] += overlap
                w = w - overlap[:, None] * Q[:, i]
        length = w.norm(dim=1)
        ended = going & (length <= tolerance * size)
        steps[ended] = j + 1
        going &= ~ended
        hessenberg[:, j + 1, j] = torch.where(going, length, 0.0)
        Q[:, j + 1] = torch.where(going[:, None], w / length[:, None], 0.0)
        if not going.any():
            break
    values, residuals = (torch.full((len(b), n), torch.nan, dtype=dtype) for dtype in (torch.complex128, torch.float64))
    for k, m in enumerate(steps.tolist()):
        values[k, :m], residuals[k, :m] = _ritz(hessenberg[k], m)
    return Ritz(values, residuals, Q[:, :n], hessenberg, steps)


def leading_by_step(ritz: Ritz) -> tuple[Tensor, Tensor]:
    """(values, residuals) of the leading Ritz pair after 1, 2 .. n steps, [B, n] each; NaN after a breakdown."""
    values, residuals = torch.full_like(ritz.values, torch.nan), torch.full_like(ritz.residuals, torch.nan)
    for k, steps in enumerate(ritz.steps.tolist()):
        for m in range(1, steps + 1):
            found = _ritz(ritz.hessenberg[k], m)
            values[k, m - 1], residuals[k, m - 1] = found[0][0], found[1][0]
    return values, residuals


def leading_residual(matvec: Callable[[Tensor], Tensor], ritz: Ritz, like: Tensor) -> Tensor:
    """|M x - mu x| of the leading Ritz pairs (mu, |x| = 1), measured by one more product with the real and the imaginary part of x.

    matvec  as in `arnoldi`, or a more exact product with the same M: then the error of arnoldi's own products is in the result
    like    [B, ...] of the shape and dtype that matvec takes

    Returns [B] float64. `Ritz.residuals` are estimates that do not know of that error.
    """
    values, vectors = [], []
    for basis, hessenberg, m in zip(ritz.basis, ritz.hessenberg, ritz.steps.tolist(), strict=True):
        theta, y = torch.linalg.eig(hessenberg[:m, :m])
        k = theta.abs().argmax()  # of a conjugate pair, one value with its own vector
        x = basis[:m].T.to(y) @ y[:, k]
        values.append(theta[k])
        vectors.append(x / x.norm())
    mu, x = torch.stack(values)[:, None], torch.stack(vectors)
    real, imaginary = (matvec(v.view_as(like).to(like)).detach().flatten(1).cpu().double() for v in (x.real, x.imag))
    return (torch.complex(real, imaginary) - mu * x).norm(dim=1)


def _ritz(hessenberg: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Ritz values [m] of the first m steps, the largest |.| first, and their residuals [m]."""
    theta, y = torch.linalg.eig(hessenberg[:m, :m])
    order = theta.abs().argsort(descending=True)
    return theta[order], (hessenberg[m, m - 1] * y[-1].abs() / y.norm(dim=0))[order]
