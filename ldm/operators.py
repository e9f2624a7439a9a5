"""Linear measurement operators A with their exact adjoints, and measurement noise: y = A x + sigma_y n.

An operator is called as A(x), x [B, C, H, W] -> y, and has `A.adjoint(y)` = A^T y with <A x, y> = <x, A^T y> to rounding, and
(compositions excepted) `A.pseudo_inverse(y)` = A^+ y, the smallest image that fits y best.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.sampling import seeded_noise
from ldm.schedules import Level


class Operator(ABC):
    """The base of all operators. They follow the dtype and device of the tensors they are given.

    variance    of the noise that each measurement has by itself, broadcast to y; 0: none, which is all but soft masks
    linear      all but those of `ldm.nonlinear`
    """

    variance: Tensor | float = 0.0
    linear = True

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x, for x [B, C, H, W]."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, for y of A's output space."""

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """A'(x)^T v, the derivative's adjoint at x: A^T v whatever x, but for `ldm.nonlinear`."""
        return self.adjoint(v)

    def measured(self, y: Tensor) -> Tensor:
        """y with zeros where nothing is measured: y itself but for masks."""
        return y

    def at(self, level: Level) -> "Operator":
        """What of it counts in a diffusion step that ends at this noise level: all but for soft masks."""
        return self

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^+ y. Raises ValueError where it is not known."""
        raise ValueError(f"{type(self).__name__} has no pseudo-inverse here: give a function that makes an image from y")

    def __matmul__(self, first: "Operator") -> "Compose":
        """A @ B is the operator x -> A(B(x))."""
        return Compose(self, first)


class Identity(Operator):
    """A x = x."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    pseudo_inverse = adjoint


class Mask(Operator):
    """A x = M * x, zero where unknown; A^T = A.

    mask: [B or 1, 1 or C, H, W] of zeros (unknown) and ones (known), any dtype. Other values are a ValueError.
    soft: values between are weights w, how strongly a pixel is kept: it is known up to noise of the standard deviation
          s = sqrt((1 - w) / w), in units of x. (Next to a prior of unit variance its mean is w times its value.) M = sqrt(w), and
          the noise of y has the variance 1 - w, which `fast_sampler` solves with. `newton_sampler` holds a pixel in the steps
          that end at sigma / alpha >= s, and lets it go below (differential diffusion, Levin & Fried 2023).
    """

    def __init__(self, mask: Tensor, soft: bool = False):
        if mask.ndim != 4:
            raise ValueError(f"mask has shape {list(mask.shape)}: give [B, 1, H, W] or [1, 1, H, W]")
        if soft and not ((mask >= 0) & (mask <= 1)).all():
            raise ValueError("mask has values outside of 0 (unknown) to 1 (known)")
        if not soft and not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask has values other than 0 (unknown) and 1 (known): threshold it first, for example mask > 0.5")
        self.mask = mask
        if soft and not ((mask == 0) | (mask == 1)).all():
            self.mask, self.variance = mask.sqrt(), 1 - mask

    def __call__(self, x: Tensor) -> Tensor:
        return self._fitted(x) * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def at(self, level: Level) -> Operator:
        if not torch.is_tensor(self.variance):
            return self
        weights = self.mask.square()
        held = weights * (level.alpha**2 + level.sigma**2) >= level.alpha**2 * (1 - 1e-6)  # s <= sigma / alpha
        return Mask((weights > 0) & held)

    def measured(self, y: Tensor) -> Tensor:
        return (self._fitted(y) > 0) * y

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        mask = self._fitted(y)
        return (mask > 0) * y / torch.where(mask > 0, mask, 1.0)

    def _fitted(self, x: Tensor) -> Tensor:
        """The mask in x's dtype on x's device. ValueError where it does not fit."""
        with torch.inference_mode(False):  # an ordinary tensor even where the first call is the sampler's
            self.mask = mask = self.mask.to(x)
            if torch.is_tensor(self.variance):
                self.variance = self.variance.to(x)
        try:
            fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"mask has shape {list(mask.shape)}, but the image has {list(x.shape)}: give the same height and "
                "width, and one mask per image or one for all"
            )
        return mask


class Separable(Operator):
    """A x = R x C^T on each channel, for a matrix R [h, H] along the columns and C [w, W] along the rows of an image."""

    def __init__(self, rows: Tensor, columns: Tensor):
        self.rows, self.columns = rows, columns
        self._cached: tuple[Tensor, ...] = ()

    def _matrices(self, x: Tensor) -> tuple[Tensor, ...]:
        """R, C, R^+ and C^+ in x's dtype on x's device, converted once and not at every call."""
        if not self._cached or self._cached[0].dtype != x.dtype or self._cached[0].device != x.device:
            with torch.inference_mode(False):  # ordinary tensors even where the first call is the sampler's
                inverses = (torch.linalg.pinv(m.cpu().double(), rtol=1e-2) for m in (self.rows, self.columns))
                self._cached = tuple(m.to(x) for m in (self.rows, self.columns, *inverses))
        return self._cached

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.rows.shape[1], self.columns.shape[1]):
            raise ValueError(
                f"the image has size {list(x.shape[2:])}, but this operator was made for "
                f"{[self.rows.shape[1], self.columns.shape[1]]}"
            )
        rows, columns, *_ = self._matrices(x)
        return rows @ x @ columns.T

    def adjoint(self, y: Tensor) -> Tensor:
        rows, columns, *_ = self._matrices(y)
        return rows.T @ y @ columns

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^+ y, without the directions whose singular values are below a hundredth of the largest."""
        *_, rows, columns = self._matrices(y)
        return rows @ y @ columns.T


def downsample(size: Sequence[int], factor: float) -> Separable:
    """Bicubic down-sampling with anti-aliasing: Keys' kernel (a = -0.5) stretched by `factor`, as PIL and torchvision do it.

    size: (H, W) of the images; factor: any number >= 1 for which H / factor and W / factor are whole.
    """
    return Separable(*(_resampling_matrix(n, _divide(n, factor, "factor"), _keys, 2.0) for n in size))


def resample(size: Sequence[int], to: Sequence[int], canvas: Sequence[int] | None = None) -> Separable:
    """As `downsample`, from any size (H, W) to any smaller one (h, w): the factors H / h and W / w need not be whole.

    canvas: (H', W') of images of which the upper left H x W pixels are measured, the others not; None: all are.
    """
    canvas = size if canvas is None else canvas
    if any(not 1 <= m <= n <= c for m, n, c in zip(to, size, canvas, strict=True)):
        raise ValueError(f"to = {tuple(to)}: give a size of at most {tuple(size)}, and a canvas of at least that")
    matrices = [_resampling_matrix(n, m, _keys, 2.0) for n, m in zip(size, to, strict=True)]
    return Separable(*(nn.functional.pad(matrix, (0, c - n)) for matrix, n, c in zip(matrices, size, canvas, strict=True)))


def box_average(size: Sequence[int], factor: int) -> Separable:
    """Means over factor x factor blocks. size: (H, W); factor: an integer that divides both."""
    if int(factor) != factor:
        raise ValueError(f"factor = {factor}: a box average needs an integer")
    return Separable(*(torch.eye(_divide(n, factor, "factor")).repeat_interleave(int(factor), 1) / factor for n in size))


def gaussian_blur(size: Sequence[int], std: float, truncate: float = 4.0) -> Separable:
    """Convolution with a Gaussian of standard deviation `std` pixels, cut at `truncate` std; edges are mirrored."""
    if not std > 0:
        raise ValueError(f"std = {std}: give a positive number of pixels")
    return Separable(*(_blur_matrix(n, std, truncate) for n in size))


class Compose(Operator):
    """x -> A(B(x)), adjoint y -> B^T(A^T(y))."""

    def __init__(self, last: Operator, first: Operator):
        self.last, self.first = last, first

    def __call__(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.first.adjoint(self.last.adjoint(y))

    def measured(self, y: Tensor) -> Tensor:
        return self.last.measured(y)


class Stack(Operator):
    """x -> (sqrt(w_1) A_1 x, sqrt(w_2) A_2 x, ...), flattened: [B, N] with N the number of all measured values of a sample.

    terms: a weight >= 0, an operator and a shape [B, ...] of its output each. A^T A = sum of w_i A_i^T A_i.
    """

    def __init__(self, terms: Sequence[tuple[float, Operator, Sequence[int]]]):
        self.operators = [operator for _, operator, _ in terms]
        self.roots = [weight**0.5 for weight, *_ in terms]
        self.shapes = [tuple(shape[1:]) for *_, shape in terms]
        if any(torch.is_tensor(operator.variance) for operator in self.operators):
            each = [torch.as_tensor(operator.variance).expand(shape).flatten(1) for _, operator, shape in terms]
            self.variance = torch.cat([x.expand(max(map(len, each)), -1) for x in each], 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.join([operator(x) for operator in self.operators])

    def adjoint(self, y: Tensor) -> Tensor:
        parts = [root * A.adjoint(part) for root, A, part in zip(self.roots, self.operators, self._split(y), strict=True)]
        return torch.stack(parts).sum(0)

    def measured(self, y: Tensor) -> Tensor:
        parts = [(root > 0) * A.measured(part) for root, A, part in zip(self.roots, self.operators, self._split(y), strict=True)]
        return torch.cat([part.flatten(1) for part in parts], 1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Measurements [B or 1, ...] of the operators as one [B, N], each by its root of the weight."""
        most = max(len(part) for part in parts)
        parts = [root * part.flatten(1).expand(most, -1) for root, part in zip(self.roots, parts, strict=True)]
        return torch.cat(parts, 1)

    def _split(self, y: Tensor) -> list[Tensor]:
        parts = y.split([math.prod(shape) for shape in self.shapes], 1)
        return [part.view(len(y), *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def measure(A: Operator, x: Tensor, sigma_y: float = 0.0, seeds: Sequence[int] | None = None) -> Tensor:
    """y = A x + sigma_y n with standard normal n; seeds: one integer per image, needed where sigma_y > 0."""
    y = A(x)
    if not sigma_y >= 0:
        raise ValueError(f"sigma_y = {sigma_y}: give a standard deviation >= 0")
    if sigma_y == 0:
        return y
    if seeds is None:
        raise ValueError("seeds is missing: noisy measurements need one seed per image")
    return y + sigma_y * A.measured(seeded_noise(y.shape, seeds, y.device, y.dtype)())


def _divide(n: int, factor: float, name: str) -> int:
    if not factor >= 1 or abs(n / factor - round(n / factor)) > 1e-9 or round(n / factor) < 1:
        raise ValueError(
            f"{name} = {factor} does not divide the image's side of {n} pixels into a whole number: "
            f"give a number >= 1 that does, or crop the image"
        )
    return round(n / factor)


def _keys(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, a = -0.5."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _resampling_matrix(n: int, m: int, kernel: Callable[[Tensor], Tensor], support: float) -> Tensor:
    """[m, n]: output pixel i is centred at (i + 1/2) n/m and weighs input pixels by the kernel stretched by n/m, sums 1."""
    scale = n / m
    centres = (torch.arange(m, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(n, dtype=torch.float64) + 0.5 - centres[:, None]) / scale
    weights = torch.where(distance.abs() < support, kernel(distance), 0.0)
    return weights / weights.sum(1, keepdim=True)


def _blur_matrix(n: int, std: float, truncate: float) -> Tensor:
    """[n, n]: a Gaussian around each pixel, what falls outside folded back at the edges (... b a | a b c ...)."""
    radius = math.floor(truncate * std + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / std) ** 2)
    index = (torch.arange(n)[:, None] + offsets) % (2 * n)  # [n, 2*radius + 1], mirrored with period 2n
    index = torch.where(index < n, index, 2 * n - 1 - index)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, index, (weights / weights.sum()).expand(n, -1))
