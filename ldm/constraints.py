"""Constraints: callables x0 [B, ...] -> (e, residual), the error direction in x0 space and one number per sample [B].

`e` has x0's shape and points to where the constraint wants x0 to go; its length does not matter to the paper's loop. `residual`
is a root mean square over what is measured, or the loss itself. The denoiser is never differentiated; where a constraint looks
at decoded images, the gradient of the *decoder* is taken (`DecodedConstraint`, `LossConstraint`) or not even that
(`EncoderConstraint`).

    both = a + 0.5 * b;   both.residuals(x0)      constraints combined, and the residual of each
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.images import check_image
from ldm.inpainting import check_mask, harmonic_fill, latent_mask
from ldm.linalg import max_norm, unit
from ldm.operators import Mask, Operator, Stack
from ldm.schedules import Level
from ldm.util import moved


class Constraint(ABC):
    """What samplers ask of a constraint. Samples of a batch never mix.

    linear            whether it is a measurement y = A x0 + sigma_y n whose A does not depend on x0
    through_decoder   whether it looks at the decoded image
    through_encoder   whether `fast_sampler` may correct the decoded image, and encode it again
    backward_passes   of the decoder (or of a loss), so far; the denoiser has none
    batch             the samples that it has measurements for; 1: any number
    noisy             whether its operator has noise of its own (soft masks)
    linearised        x0 -> (A, r), the operator at x0 and the residual r = y - A x0; None where there is no operator
    """

    linear = False
    through_decoder = False
    through_encoder = False
    backward_passes = 0
    batch = 1
    noisy = False
    linearised: "Callable[[Tensor], tuple] | None" = None

    @abstractmethod
    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x0 [B, ...] -> (e, residual): the error direction, of x0's shape, and one number per sample [B]."""

    def residual(self, x0: Tensor) -> Tensor:
        """One number per sample [B], without the error direction where that is cheaper."""
        return self(x0)[1]

    @property
    def terms(self) -> "list[tuple[float, Constraint]]":
        """What it is a sum of: weights and constraints. One that is no sum is its only term."""
        return [(1.0, self)]

    def residuals(self, x0: Tensor) -> list[Tensor]:
        """The residual [B] of each term."""
        return [constraint.residual(x0) for _, constraint in self.terms]

    def at(self, level: Level) -> "Constraint":
        """What counts in a diffusion step that ends at this noise level: all of it, but for soft masks."""
        terms = [(weight, constraint.at(level)) for weight, constraint in self.terms if constraint is not self]
        return combine(terms) if terms else self

    def __add__(self, other: Any) -> "Constraint":
        other = as_constraint(other) if callable(other) else None
        return NotImplemented if other is None else combine([*self.terms, *other.terms])

    def __radd__(self, other: Any) -> "Constraint":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # the start of sum()

    def __mul__(self, weight: float) -> "Constraint":
        if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"weight = {weight!r} of a constraint: give a number >= 0")
        return combine([(weight * own, constraint) for own, constraint in self.terms])

    __rmul__ = __mul__


class FunctionConstraint(Constraint):
    """Any function x0 [B, ...] -> (e, residual [B])."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]]):
        self.function = function

    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(x0)


def as_constraint(constraint: Any) -> Constraint | None:
    """The constraint itself, None, or a function x0 -> (e, residual) as a Constraint. TypeError for anything else."""
    if constraint is None or isinstance(constraint, Constraint):
        return constraint
    if not callable(constraint):
        raise TypeError(f"constraint is a {type(constraint).__name__}: give a Constraint, a function x0 -> (e, residual), or None")
    return FunctionConstraint(constraint)


class LinearConstraint(Constraint):
    """y = A x0 + sigma_y n with a linear operator A (ldm/operators.py):  e = A^T (y - A x0),  residual = RMS(y - A x0).

    y: [B, ...] in A's output space, finite. A sample that measures nothing (mask of zeros) has e = 0 and residual 0.
    """

    linear = True

    def __init__(self, A: Operator, y: Tensor):
        if not torch.isfinite(y).all():
            raise ValueError(f"y has {int((~torch.isfinite(y)).sum())} values that are NaN or infinite: all must be finite")
        self.A, self.y, self.batch, self.noisy = A, y, len(y), torch.is_tensor(A.variance)
        self.count = A.measured(torch.ones_like(y)).flatten(1).sum(1).clamp_min(1)  # [B] measured values per sample

    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        r = self.difference(x0)
        return self.A.adjoint(r), self.rms(r)

    def residual(self, x0: Tensor) -> Tensor:
        return self.rms(self.difference(x0))

    def at(self, level: Level) -> Constraint:
        A = self.A.at(level)
        return self if A is self.A else LinearConstraint(A, A(self.A.pseudo_inverse(self.y)))

    def linearised(self, x0: Tensor) -> tuple[Any, Tensor]:
        """(A, r) at x0."""
        return self.A, self.difference(x0)

    def difference(self, x: Tensor) -> Tensor:
        """r = y - A x, of y's shape."""
        return self.A.measured(self.y) - self.A(x)

    def rms(self, r: Tensor) -> Tensor:
        """Root mean square of r [B, ...] over what is measured. [B]"""
        return (r.flatten(1).square().sum(1) / self.count).sqrt()


# ---- sums


def combine(terms: Sequence[tuple[float, Constraint]]) -> Constraint:
    """The sum of constraints by their weights >= 0, e = sum of w_i e_i: where all are linear one LinearConstraint, of the stacked
    operator (`LinearSum`), otherwise a `Sum`. ValueError where they are for batches of different sizes."""
    batches = [constraint.batch for _, constraint in terms]
    if len(set(batches) - {1}) > 1:
        raise ValueError(f"constraints for {' and '.join(map(str, batches))} samples are added: give all of them one batch, or 1")
    linear = [(weight, constraint) for weight, constraint in terms if isinstance(constraint, LinearConstraint)]
    return LinearSum(linear) if len(linear) == len(terms) else Sum(terms)


class LinearSum(LinearConstraint):
    """sum of w_i |y_i - A_i x0|^2 as one least-squares problem: rows sqrt(w_i) (A_i, y_i), so that sigma_y counts as
    sigma_y / sqrt(w_i) for the measurements of term i. residual: the RMS of all rows."""

    def __init__(self, terms: Sequence[tuple[float, LinearConstraint]]):
        self._terms: list[tuple[float, Constraint]] = [*terms]
        A = Stack([(weight, constraint.A, constraint.y.shape) for weight, constraint in terms])
        super().__init__(A, A.join([constraint.A.measured(constraint.y) for _, constraint in terms]))

    at = Constraint.at

    @property
    def terms(self) -> list[tuple[float, Constraint]]:
        return self._terms


class Sum(Constraint):
    """Any constraints added up:  e = sum of w_i e_i,  residual = sum of w_i residual_i. Where all have an operator, so has
    the sum: the stacked one."""

    def __init__(self, terms: Sequence[tuple[float, Constraint]]):
        self._terms = list(terms)
        self.batch = max(constraint.batch for _, constraint in terms)
        self.through_decoder = any(constraint.through_decoder for _, constraint in terms)
        self.noisy = any(constraint.noisy for _, constraint in terms)
        self.linearised = self._linearised if all(constraint.linearised for _, constraint in terms) else None

    @property
    def terms(self) -> list[tuple[float, Constraint]]:
        return self._terms

    @property
    def backward_passes(self) -> int:  # type: ignore[override]  # counted by the terms
        return sum(constraint.backward_passes for _, constraint in self.terms)

    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        e, residual = zip(*(constraint(x0) for _, constraint in self.terms), strict=True)
        return self._weighted(e), self._weighted(residual)

    def residual(self, x0: Tensor) -> Tensor:
        return self._weighted(self.residuals(x0))

    def _weighted(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([weight * value for (weight, _), value in zip(self.terms, values, strict=True)]).sum(0)

    def _linearised(self, x0: Tensor) -> tuple[Any, Tensor]:
        found = [(weight, *constraint.linearised(x0)) for weight, constraint in self.terms if constraint.linearised]
        A = Stack([(weight, operator, r.shape) for weight, operator, r in found])
        return A, A.join([r for *_, r in found])


# ---- inpainting


def renewed(constraint: Constraint, x_t: Tensor, level: Level, noise: Callable[[], Tensor]) -> Tensor:
    """x_t at this level with alpha image + sigma n, n new, where the soft masks of a constraint hold it."""
    for _, term in constraint.terms:
        held = term.at(level) if term.noisy else None
        if isinstance(held, LinearConstraint):
            x_t = x_t + held.A(level.alpha * held.y + level.sigma * noise() - x_t)
    return x_t


def inpainting(image: Tensor, mask: Tensor, soft: bool = False) -> LinearConstraint:
    """The pixels where mask is 1 are known:  e = M * (image - x0).

    image: [B, C, H, W] in [-1, 1]; mask: [B or 1, 1, H, W] of 0 (fill in) and 1 (keep), with soft=True also of weights
    between, how strongly each pixel is kept (`Mask`). ValueError where they do not fit.
    """
    A = Mask(mask, soft)
    return LinearConstraint(A, A(check_image(image)))


def latent_inpainting(model: Any, image: Tensor, mask: Tensor, whole: bool = False, soft: bool = False) -> LinearConstraint:
    """Inpainting in the latent space of a LatentDiffusion:  e = M * (Enc(image) - x0).

    image [B, 3, H, W] in [-1, 1], mask [B or 1, 1, H, W], H and W as the model takes them (ldm/inpainting.py: fit). A latent pixel
    is known where all of its pixels are. The encoder sees the hole filled with the smooth continuation of what is around
    it, since anything else bleeds into the known latents; whole=True: the image as it is, where that is known.
    soft=True: the mask has weights between (`Mask`). A latent pixel has the least of its pixels'; the hole is where it is 0.
    """
    mask = mask.to(check_image(image))
    Mask(mask, soft)(image)  # its errors of size and values come before those of what the mask shows
    check_mask(mask)
    with torch.inference_mode(False), torch.no_grad():
        z = model.encode(image if whole else harmonic_fill(image, mask > 0))
    A = Mask(latent_mask(mask, image.shape[3] // z.shape[3]), soft)
    return LinearConstraint(A, A(z))


class DecodedConstraint(Constraint):
    """A measurement of the decoded image, y = A Dec(x0) + sigma_y n:  e = (dDec/dx0)^T A^T (y - A Dec(x0)), residual as above.

    decode: x0 [B, C, h, w] -> images, differentiable; A, y: operator (also of ldm.nonlinear) and measurement of images. One
    backward pass through the decoder (not the denoiser) for each call; `backward_passes` counts them.
    chunk: samples that are decoded, and whose graph of the decoder is held, at a time, at the price of one more forward pass of the
    decoder where that is not the whole batch. None: one where x0 has 4,096 values or more (256 x 256 pixels of Stable Diffusion),
    otherwise all.
    encode: images -> x0. With it, where A is linear and no soft mask, `fast_sampler` corrects the image where it leaves J out. That
    is better, and needs no backward pass.
    """

    through_decoder = True

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        A: Operator,
        y: Tensor,
        chunk: int | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ):
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk = {chunk}: give a number of samples, or None")
        self.decode, self.pixels, self.chunk, self.encode, self.backward_passes = decode, LinearConstraint(A, y), chunk, encode, 0
        self.batch, self.noisy = len(y), self.pixels.noisy
        self.through_encoder = encode is not None and A.linear and not self.noisy

    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        A, r = self.linearised(x0)
        return A.adjoint(r), self.pixels.rms(r)

    def residual(self, x0: Tensor) -> Tensor:
        return self.pixels.residual(self.image(x0))

    def at_a_time(self, x0: Tensor) -> int:
        """How many samples: `chunk`."""
        return self.chunk or (1 if x0[0].numel() >= 4096 else len(x0))

    def image(self, x0: Tensor) -> Tensor:
        """Dec(x0)."""
        return torch.cat([self.decode(part) for part in x0.split(self.at_a_time(x0))])

    def encoded(self, image: Tensor, x0: Tensor) -> Tensor:
        """Enc(image), in place of x0."""
        return torch.cat([self.encode(part) for part in image.split(self.at_a_time(x0))])  # type: ignore[misc]  # there is one

    def linearised(self, x0: Tensor) -> tuple[Any, Tensor]:
        """(A Dec' at x0, an operator on latents, and r): each product with it is a forward, with its adjoint a backward pass of the
        decoder, whose graph lives as long as the operator (or, in chunks, is made for each product)."""
        derivative = _Derivative(self, x0)
        return derivative, derivative.r


class _Derivative:
    """A Dec' of a DecodedConstraint at z, with the residual r there: A Dec' w ~ (r - r(z + s w)) / s with |s w|_inf = 0.05."""

    def __init__(self, constraint: DecodedConstraint, z: Tensor):
        self.constraint, self.z = constraint, z
        self.graph: tuple[Tensor, Tensor] | None = None
        chunk = constraint.at_a_time(z)
        self.parts = range(0, len(z), chunk), chunk
        if chunk >= len(z):
            self.graph = graph = self._decode(z)
            self.image = graph[1].detach()
        else:
            self.image = constraint.image(z)
        self.r, self.variance = constraint.pixels.difference(self.image), constraint.pixels.A.variance

    def __call__(self, w: Tensor) -> Tensor:
        s = 0.05 / max_norm(w).clamp_min(1e-30)
        with torch.no_grad():
            moved = self.constraint.pixels.difference(self.constraint.image(self.z + s * w))
            return (self.r - moved) / s.view(-1, *[1] * (moved.ndim - 1))

    def adjoint(self, u: Tensor) -> Tensor:
        self.constraint.backward_passes += 1
        g = self.constraint.pixels.A.vjp(self.image, u)  # on images; the rest is the decoder's vector-Jacobian product
        with torch.inference_mode(False), torch.enable_grad():  # blocks that are computed again have to record their graph
            if self.graph is not None:
                z, image = self.graph
                return torch.autograd.grad(image, z, g.clone(), retain_graph=True)[0]
            starts, chunk = self.parts
            return torch.cat([self._vjp(self.z[i : i + chunk], g[i : i + chunk]) for i in starts])

    def _vjp(self, z: Tensor, g: Tensor) -> Tensor:
        z, image = self._decode(z)
        return torch.autograd.grad(image, z, g.clone())[0]

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z as a leaf, and its decoded image with the graph between them."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z.clone().requires_grad_()
            return leaf, self.constraint.decode(leaf)


class EncoderConstraint(Constraint):
    """The same measurement without any backward pass, by the encoder's difference (VAE-space Newton):

        p = A^+ (y - A x),   e = (Enc(x + h p / |p|_inf) - Enc(x)) |p|_inf / h + retraction (Enc(x) - x0),   x = Dec(x0)

    The second term costs nothing: it draws x0 back to where the encoder would put its image. Without it (retraction=0), what A
    does not see of x0 drifts away over the steps, as nothing opposes it.

    decode, encode: between x0 [B, C, h, w] and images; lift: y-shaped -> image, instead of the operator's A^+. For each call
    one evaluation of the decoder and two of the encoder.
    """

    through_decoder = True

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor],
        A: Operator,
        y: Tensor,
        lift: Callable[[Tensor], Tensor] | None = None,
        h: float = 0.05,
        retraction: float = 1.0,
    ):
        self.decode, self.encode, self.pixels, self.h, self.retraction = decode, encode, LinearConstraint(A, y), h, retraction
        self.lift, self.batch = A.pseudo_inverse if lift is None else lift, len(y)

    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        x = self.decode(x0)
        r = self.pixels.difference(x)
        p = self.lift(r)
        moved, here = self.encode(torch.cat([x + self.h * unit(p), x])).chunk(2)
        return (moved - here) * (max_norm(p) / self.h) + self.retraction * (here - x0), self.pixels.rms(r)

    def residual(self, x0: Tensor) -> Tensor:
        return self.pixels.residual(self.decode(x0))


class LossConstraint(Constraint):
    """Any differentiable loss of x0, one number per sample:  e = - d loss / d x0,  residual = loss(x0).

    loss: callable x0 [B, ...] -> [B], in which samples do not mix. ValueError where it gives another shape.
    chunk: samples that the loss is given at a time, which bounds the memory of its graph; None: all. Not for a loss that holds
    something of its own for each sample.
    until: a number, or one for each sample [B]: where the loss is not above it, e = 0, so that samples are not moved further. None:
    there is always something to gain.
    """

    def __init__(self, loss: Callable[[Tensor], Tensor], chunk: int | None = None, until: float | Tensor | None = None):
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk = {chunk}: give a number of samples, or None")
        self.loss, self.chunk, self.until, self.backward_passes = loss, chunk, until, 0

    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        found = [self._gradient(part) for part in x0.split(self.chunk or len(x0))]
        self.backward_passes += 1
        gradients, losses = zip(*found, strict=True)
        e, values = -torch.cat(gradients), torch.cat(losses)
        if self.until is not None:
            if torch.is_tensor(self.until) and self.until.shape not in ((), values.shape):
                raise ValueError(
                    f"until has shape {list(self.until.shape)}: give a number, or one for each of {len(values)} samples"
                )
            e = e * (values > self.until).view(-1, *[1] * (e.ndim - 1))
        return e, values

    def _gradient(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            x = x0.clone().requires_grad_()
            values = self._values(x)
            return torch.autograd.grad(values.sum(), x)[0], values.detach()

    def residual(self, x0: Tensor) -> Tensor:
        return torch.cat([self._values(part) for part in x0.split(self.chunk or len(x0))])

    def _values(self, x: Tensor) -> Tensor:
        values = self.loss(x)
        if values.shape != x.shape[:1]:
            raise ValueError(
                f"loss gives a tensor of shape {list(values.shape)} for {len(x)} samples: one number for each is needed"
            )
        return values


__getattr__ = moved("ldm.constraints", "ldm.guidance", "gram gram_distance")
