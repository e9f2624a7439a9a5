"""The denoiser's Jacobian J = dD/dx_t, measured: products J v and J^T u, and the whole matrix. Eigenvalues: ldm.linalg.arnoldi."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.sampling import ARITHMETIC, DenoiserLike, jvp
from ldm.util import moved

PRODUCTS = ("forward-ad", "difference", "central")


class Jacobian:
    """J of one function D at one point (x_t, t). Every product belongs to that very point: there is no second t to mix it up with.

    D      callable (x_t [B, ...], t) -> [B, ...]; a denoiser, or what follows it too, such as the decoded image
    x_t    [B, ...] float tensor, one point per sample, samples independent; kept as a copy
    t      a time of D's schedule (ValueError otherwise, if D has one)
    h      length of finite differences; None: by D's arithmetic, of a plain function by that of float32
    """

    def __init__(self, D: Callable[[Tensor, float], Tensor], x_t: Tensor, t: float, h: float | None = None):
        if isinstance(D, DenoiserLike):
            D.schedule.level(t)
        if h is not None and not h > 0:
            raise ValueError(f"h = {h}: give a positive number, or None")
        self.D, self.t = D, t
        self.h = ARITHMETIC[D.arithmetic if isinstance(D, DenoiserLike) else "float32"].h if h is None else h
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, also where the caller is in inference mode
            self.x_t = x_t.clone()
            self.x0 = D(self.x_t, t)

    def jvp(self, v: Tensor, method: str = "forward-ad") -> Tensor:
        """J v for v [B, ...] of x_t's shape -> x0's shape.

        "forward-ad": exact, one evaluation of D at two to three times its cost. "difference": one-sided, error of order h, one
        evaluation. "central": (D(x_t + h v) - D(x_t - h v)) / 2h for v of unit |.|_inf, error of order h^2, two evaluations.
        """
        self._check("v", v, self.x_t)
        if method not in PRODUCTS:
            raise ValueError(f"method = {method!r}: known are {', '.join(map(repr, PRODUCTS))}")
        with torch.inference_mode(False), torch.no_grad():
            if method == "central":
                return (self._difference(v) - self._difference(-v)) / 2
            if method == "difference":
                return self._difference(v)
            return jvp(self.D, self.x_t, self.t, v, h=self.h, mode="forward-ad")  # type: ignore[arg-type]  # any function will do

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u for u [B, ...] of x0's shape -> x_t's shape. Exact: one evaluation of D with its graph, one backward pass."""
        self._check("u", u, self.x0)
        with torch.inference_mode(False), torch.enable_grad():
            x_t = self.x_t.clone().requires_grad_()
            return torch.autograd.grad(self.D(x_t, self.t), x_t, u.clone())[0]

    def symmetric(self, v: Tensor, method: str = "forward-ad") -> Tensor:
        """(J + J^T) v / 2."""
        return (self.jvp(v, method) + self.vjp(v)) / 2

    def skew(self, v: Tensor, method: str = "forward-ad") -> Tensor:
        """(J - J^T) v / 2. Zero for the ideal denoiser, whose J is a covariance matrix up to a factor (Tweedie)."""
        return (self.jvp(v, method) - self.vjp(v)) / 2

    def dense(self, chunk: int = 64) -> Tensor:
        """J as a matrix, see `dense`; for a batch of one."""
        return dense(self.D, self.x_t, self.t, chunk)

    def _difference(self, v: Tensor) -> Tensor:
        return jvp(self.D, self.x_t, self.t, v, self.x0, self.h, "difference")  # type: ignore[arg-type]  # any function will do

    def _check(self, name: str, given: Tensor, like: Tensor) -> None:
        if given.shape != like.shape:
            raise ValueError(f"{name} has shape {list(given.shape)}, but this Jacobian takes {list(like.shape)}")


def dense(D: Callable[[Tensor, float], Tensor], x_t: Tensor, t: float, chunk: int = 64) -> Tensor:
    """J at one x_t [1, ...] with n values, as a matrix [m, n]: column j is the response of all m values of x0 to value j of x_t.

    Exact, row by row: backward passes in batches of `chunk`, which cost about 3 m evaluations of D. Samples must not mix in D.
    """
    if x_t.shape[0] != 1:
        raise ValueError(f"x_t has batch size {x_t.shape[0]}: the dense Jacobian is of one sample, give [1, ...]")
    with torch.inference_mode(False), torch.enable_grad():
        x_t, rows = x_t.clone(), []
        with torch.no_grad():
            x0 = D(x_t, t)
        units = torch.eye(x0.numel(), dtype=x0.dtype, device=x0.device).view(-1, *x0.shape[1:])
        for u in tqdm(units.split(chunk), "dense Jacobian", leave=False, delay=1):
            x = x_t.expand(len(u), *x_t.shape[1:]).clone().requires_grad_()
            rows.append(torch.autograd.grad(D(x, t), x, u)[0].flatten(1))
    return torch.cat(rows)


def columns_and_rows(J: Jacobian, places: Sequence[tuple[int, int]], method: str = "forward-ad") -> Tensor:
    """What a pixel moves and what moves it, [2, B, C, h, w]: squares of the columns of J and of its rows, summed over the pixel's
    channels.

    J       Jacobian at x_t [B, C, h, w]
    places  (row, column) of the pixel of each sample
    method  of the columns, see `Jacobian.jvp`; the rows are backward passes
    """
    total = torch.zeros(2, *J.x_t.shape, dtype=J.x_t.dtype, device=J.x_t.device)
    for c in range(J.x_t.shape[1]):
        v = torch.zeros_like(J.x_t)
        for i, (row, column) in enumerate(places):
            v[i, c, row, column] = 1
        total += torch.stack([J.jvp(v, method), J.vjp(v)]).square()
    return total


__getattr__ = moved("ldm.jacobian", "ldm.linalg", "Ritz arnoldi")
