"""Non-linear measurements y = A(x) + sigma_y n: operators with a derivative, and the constraint that follows it."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.constraints import Constraint, LinearConstraint
from ldm.linalg import max_norm
from ldm.operators import Operator


class NonlinearOperator(Operator):
    """A(x) = function(x) for a differentiable function of images x [B, ...], in which samples do not mix."""

    linear = False

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def adjoint(self, y: Tensor) -> Tensor:
        raise ValueError(f"{self} is not linear: it has a derivative (vjp) and no adjoint")

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """A'(x)^T v for v of A(x)'s shape; x's shape. ValueError where A has no derivative."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            y = self(x)
            if not y.requires_grad:
                raise ValueError(f"{self} has no derivative: write it with differentiable functions of torch")
            return torch.autograd.grad(y, x, v.clone())[0]

    def __str__(self) -> str:
        return "A"


class NonlinearConstraint(Constraint):
    """y = A(x0) + sigma_y n with a non-linear A:  e = A'(x0)^T (y - A(x0)),  residual = RMS(y - A(x0)).

    A: a NonlinearOperator; y: [B, ...] in its output space, finite. Only A is differentiated, the denoiser is not.
    """

    def __init__(self, A: NonlinearOperator, y: Tensor):
        self.A, self.pixels = A, LinearConstraint(A, y)  # whose y, count and rms are needed, not its adjoint
        self.y, self.count, self.batch = y, self.pixels.count, len(y)

    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        derivative, r = self.linearised(x0)
        return derivative.adjoint(r), self.pixels.rms(r)

    def residual(self, x0: Tensor) -> Tensor:
        return self.pixels.residual(x0)

    def linearised(self, x0: Tensor) -> "tuple[_Derivative, Tensor]":
        """(A' at x0, r = y - A(x0)). A product with A' is a difference of A, one with its adjoint a vjp."""
        r = self.pixels.difference(x0)
        return _Derivative(self.A, x0, self.y - r), r


class _Derivative:
    """A'(x), given A(x): A' w ~ (A(x + s w) - A(x)) / s, |s w|_inf a hundredth of the images' range."""

    def __init__(self, A: NonlinearOperator, x: Tensor, Ax: Tensor, h: float = 0.02):
        self.A, self.x, self.Ax, self.h, self.variance = A, x, Ax, h, A.variance

    def __call__(self, w: Tensor) -> Tensor:
        s = self.h / max_norm(w).clamp_min(1e-30)
        difference = self.A(self.x + s * w) - self.Ax
        return difference / s.view(-1, *[1] * (difference.ndim - 1))

    def adjoint(self, u: Tensor) -> Tensor:
        return self.A.vjp(self.x, u)


def measurement(A: Operator, y: Tensor) -> Constraint:
    """The constraint y = A(x0) + noise of an operator, linear or not."""
    return NonlinearConstraint(A, y) if isinstance(A, NonlinearOperator) else LinearConstraint(A, y)


def clipped(scale: float = 2.0) -> NonlinearOperator:
    """High dynamic range: A(x) = clip(scale * x, -1, 1), what an exposure `scale` times too long keeps of an image in [-1, 1]."""
    if not scale > 1:
        raise ValueError(f"scale = {scale}: give a number > 1")
    return NonlinearOperator(lambda x: (scale * x).clamp(-1, 1))


def fourier_amplitude(oversampling: float = 2.0) -> NonlinearOperator:
    """Phase retrieval: A(x) = |F u|, the amplitudes of the orthonormal Fourier transform of the image u = (x + 1) / 2, padded by
    zeros, on each side by oversampling / 8 of its length (DPS, Chung et al. 2023). Channels are transformed one by one."""
    if not oversampling >= 0:
        raise ValueError(f"oversampling = {oversampling}: give a number >= 0")

    def amplitude(x: Tensor) -> Tensor:
        height, width = (int(oversampling / 8 * n) for n in x.shape[2:])
        padded = torch.nn.functional.pad((x + 1) / 2, (width, width, height, height))
        return torch.fft.fftshift(torch.fft.fft2(padded, norm="ortho"), dim=(-2, -1)).abs()

    return NonlinearOperator(amplitude)
