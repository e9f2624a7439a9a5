"""The denoiser's Jacobian J = dD/dx_t, measured: products J v and J^T u, the whole matrix, leading eigenvalues."""

from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ldm.newton_sampler import H, jvp

METHODS = ("forward-ad", "difference", "central")


class Jacobian:
    """J of one function D at one point (x_t, t). Every product belongs to that very point: there is no second t to mix it up with.

    D      callable (x_t [B, ...], t) -> [B, ...]; a denoiser, or what follows it too, such as the decoded picture
    x_t    [B, ...] float tensor, one point per sample, samples independent; kept as a copy
    t      a time of D's schedule (ValueError otherwise, if D has one)
    h      length of finite differences; None: that of x_t's dtype. For a network with half-precision weights give `H[their dtype]`
    """

    def __init__(self, D, x_t, t, h=None):
        if hasattr(D, "schedule"):
            D.schedule.level(t)
        if h is not None and not h > 0:
            raise ValueError(f"h = {h}: give a positive number, or None")
        self.D, self.t = D, t
        self.h = H[x_t.dtype] if h is None else h
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, also where the caller is in inference mode
            self.x_t = x_t.clone()
            self.x0 = D(self.x_t, t)

    def jvp(self, v, method="forward-ad"):
        """J v for v [B, ...] of x_t's shape -> x0's shape.

        "forward-ad": exact, one evaluation of D at two to three times its cost. "difference": one-sided, error of order h, one
        evaluation. "central": (D(x_t + h v) - D(x_t - h v)) / 2h for v of unit |.|_inf, error of order h^2, two evaluations.
        """
        self._check("v", v, self.x_t)
        if method not in METHODS:
            raise ValueError(f"method = {method!r}: known are {', '.join(map(repr, METHODS))}")
        with torch.inference_mode(False), torch.no_grad():
            if method == "central":
                return (self._difference(v) - self._difference(-v)) / 2
            return self._difference(v) if method == "difference" else jvp(self.D, self.x_t, self.t, v, mode="forward-ad")

    def vjp(self, u):
        """J^T u for u [B, ...] of x0's shape -> x_t's shape. Exact: one evaluation of D with its graph, one backward pass."""
        self._check("u", u, self.x0)
        with torch.inference_mode(False), torch.enable_grad():
            x_t = self.x_t.clone().requires_grad_()
            return torch.autograd.grad(self.D(x_t, self.t), x_t, u.clone())[0]

    def symmetric(self, v):
        """(J + J^T) v / 2."""
        return (self.jvp(v) + self.vjp(v)) / 2

    def skew(self, v):
        """(J - J^T) v / 2. Zero for the ideal denoiser, whose J is a covariance matrix up to a factor (Tweedie)."""
        return (self.jvp(v) - self.vjp(v)) / 2

    def dense(self, chunk=64):
        """J as a matrix, see `dense`; for a batch of one."""
        return dense(self.D, self.x_t, self.t, chunk)

    def _difference(self, v):
        return jvp(self.D, self.x_t, self.t, v, self.x0, self.h)

    def _check(self, name, given, like):
        if given.shape != like.shape:
            raise ValueError(f"{name} has shape {list(given.shape)}, but this Jacobian takes {list(like.shape)}")


def dense(D, x_t, t, chunk=64):
    """J at one x_t [1, ...] with n values, as a matrix [m, n]: column j is the response of all m values of x0 to value j of x_t.

    Exact, by forward-mode differentiation in batches of `chunk` columns; costs about 2n evaluations of D.
    """
    if x_t.shape[0] != 1:
        raise ValueError(f"x_t has batch size {x_t.shape[0]}: the dense Jacobian is of one sample, give [1, ...]")
    n = x_t.numel()
    units = torch.eye(n, dtype=x_t.dtype, device=x_t.device).view(n, *x_t.shape[1:])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        rows = [
            torch.func.jvp(lambda x: D(x, t), (x_t.expand_as(v).contiguous(),), (v.contiguous(),))[1].flatten(1)
            for v in tqdm(units.split(chunk), "dense Jacobian", leave=False, delay=1)
        ]
    return torch.cat(rows).T.contiguous()


class Ritz(NamedTuple):
    """What `arnoldi` finds out about a matrix M, sample by sample. After a breakdown at step m, what follows m is NaN."""

    values: torch.Tensor  # [B, n] complex128: approximate eigenvalues, the largest |.| first
    residuals: torch.Tensor  # [B, n] float64: |M x - value x| of their unit Ritz vectors x
    basis: torch.Tensor  # [B, n, N] float64: the orthonormal q_1 .. q_n as rows (zeros after a breakdown)
    hessenberg: torch.Tensor  # [B, n + 1, n] float64: H of  M Q_n = Q_{n+1} H
    steps: torch.Tensor  # [B] int64: n, or the step m of the breakdown: the first m vectors span an invariant subspace


def arnoldi(matvec, b, n, tolerance=1e-6):
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
    if bad := [i for i, norm in enumerate(q.norm(dim=1).tolist()) if not 0 < norm < float("inf")]:
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
        norm = w.norm(dim=1)
        ended = going & (norm <= tolerance * size)
        steps[ended] = j + 1
        going &= ~ended
        hessenberg[:, j + 1, j] = torch.where(going, norm, 0.0)
        Q[:, j + 1] = torch.where(going[:, None], w / norm[:, None], 0.0)
        if not going.any():
            break
    values, residuals = (torch.full((len(b), n), torch.nan, dtype=dtype) for dtype in (torch.complex128, torch.float64))
    for k, m in enumerate(steps.tolist()):
        theta, y = torch.linalg.eig(hessenberg[k, :m, :m])
        order = theta.abs().argsort(descending=True)
        values[k, :m] = theta[order]
        residuals[k, :m] = (hessenberg[k, m, m - 1] * y[-1].abs() / y.norm(dim=0))[order]
    return Ritz(values, residuals, Q[:, :n], hessenberg, steps)
