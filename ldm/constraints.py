"""Constraints: callables x0 [B, ...] -> (e, residual), the error direction in x0 space and one number per sample [B].

`e` has x0's shape and points to where the constraint wants x0 to go; its length does not matter to the paper's loop. `residual`
is a root mean square over what is measured, or the loss itself. The denoiser is never differentiated; where a constraint looks
at decoded images, the gradient of the *decoder* is taken (`DecodedConstraint`, `LossConstraint`) or not even that
(`EncoderConstraint`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.images import check_image
from ldm.inpainting import check_mask, harmonic_fill, latent_mask
from ldm.linalg import max_norm, unit
from ldm.operators import Mask


class Constraint(ABC):
    """What samplers ask of a constraint. Samples of a batch never mix.

    linear            whether it is a measurement y = A x0 + sigma_y n whose A does not depend on x0
    through_decoder   whether it looks at the decoded image
    backward_passes   of the decoder (or of a loss), so far; the denoiser has none
    linearised        x0 -> (A, r), the operator at x0 and the residual r = y - A x0; None where there is no operator
    """

    linear = False
    through_decoder = False
    backward_passes = 0
    linearised: "Callable[[Tensor], tuple] | None" = None

    @abstractmethod
    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x0 [B, ...] -> (e, residual): the error direction, of x0's shape, and one number per sample [B]."""

    def residual(self, x0: Tensor) -> Tensor:
        """One number per sample [B], without the error direction where that is cheaper."""
        return self(x0)[1]


class FunctionConstraint(Constraint):
    """Any function x0 [B, ...] -> (e, residual [B])."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]]):
        self.function = function

    def __call__(self, x0):
        return self.function(x0)


def as_constraint(constraint) -> Constraint | None:
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

    def __init__(self, A, y: Tensor):
        if not torch.isfinite(y).all():
            raise ValueError(f"y has {int((~torch.isfinite(y)).sum())} values that are NaN or infinite: all must be finite")
        self.A, self.y = A, y
        self.count = A.measured(torch.ones_like(y)).flatten(1).sum(1).clamp_min(1)  # [B] measured values per sample

    def __call__(self, x0):
        r = self.difference(x0)
        return self.A.adjoint(r), self.rms(r)

    def residual(self, x0):
        return self.rms(self.difference(x0))

    def linearised(self, x0):
        """(A, r) at x0."""
        return self.A, self.difference(x0)

    def difference(self, x: Tensor) -> Tensor:
        """r = y - A x, of y's shape."""
        return self.A.measured(self.y) - self.A(x)

    def rms(self, r: Tensor) -> Tensor:
        """Root mean square of r [B, ...] over what is measured. [B]"""
        return (r.flatten(1).square().sum(1) / self.count).sqrt()


def inpainting(image, mask):
    """The pixels where mask is 1 are known:  e = M * (image - x0).

    image: [B, C, H, W] in [-1, 1]; mask: [B or 1, 1, H, W] of 0 (fill in) and 1 (keep). ValueError where they do not fit.
    """
    A = Mask(mask)
    return LinearConstraint(A, A(check_image(image)))


def latent_inpainting(model, image, mask, whole=False):
    """Inpainting in the latent space of a LatentDiffusion:  e = M * (Enc(image) - x0).

    image [B, 3, H, W] in [-1, 1], mask [B or 1, 1, H, W], H and W as the model takes them (ldm/inpainting.py: fit). A latent pixel
    is known where all of its pixels are. The encoder sees the hole filled with the smooth continuation of what is around
    it, since anything else bleeds into the known latents; whole=True: the image as it is, where that is known.
    """
    mask = mask.to(check_image(image))
    Mask(mask)(image)  # its errors of size and values come before those of what the mask shows
    check_mask(mask)
    with torch.inference_mode(False), torch.no_grad():
        z = model.encode(image if whole else harmonic_fill(image, mask))
    A = Mask(latent_mask(mask, image.shape[3] // z.shape[3]))
    return LinearConstraint(A, A(z))


class DecodedConstraint(Constraint):
    """A measurement of the decoded image, y = A Dec(x0) + sigma_y n:  e = (dDec/dx0)^T A^T (y - A Dec(x0)), residual as above.

    decode: x0 [B, C, h, w] -> images, differentiable; A, y: operator (also of ldm.nonlinear) and measurement of images. One
    backward pass through the decoder (not the denoiser) for each call; `backward_passes` counts them.
    chunk: samples whose graph of the decoder is held at a time, at the price of one more forward pass of the decoder where that is
    not the whole batch. None: one where x0 has 4,096 values or more (256 x 256 pixels of Stable Diffusion), otherwise all.
    """

    through_decoder = True

    def __init__(self, decode: Callable[[Tensor], Tensor], A, y: Tensor, chunk: int | None = None):
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk = {chunk}: give a number of samples, or None")
        self.decode, self.pixels, self.chunk, self.backward_passes = decode, LinearConstraint(A, y), chunk, 0

    def __call__(self, x0):
        A, r = self.linearised(x0)
        return A.adjoint(r), self.pixels.rms(r)

    def residual(self, x0):
        return self.pixels.residual(self.decode(x0))

    def linearised(self, x0):
        """(A Dec' at x0, an operator on latents, and r): each product with it is a forward, with its adjoint a backward pass of the
        decoder, whose graph lives as long as the operator (or, in chunks, is made for each product)."""
        derivative = _Derivative(self, x0)
        return derivative, derivative.r


class _Derivative:
    """A Dec' of a DecodedConstraint at z, with the residual r there: A Dec' w ~ (r - r(z + s w)) / s with |s w|_inf = 0.05."""

    def __init__(self, constraint, z):
        self.constraint, self.z, self.graph = constraint, z, None
        chunk = constraint.chunk or (1 if z[0].numel() >= 4096 else len(z))
        self.parts = range(0, len(z), chunk), chunk
        if chunk >= len(z):
            self.graph = self._decode(z)
            self.image = self.graph[1].detach()
        else:
            self.image = torch.cat([constraint.decode(part) for part in z.split(chunk)])
        self.r = constraint.pixels.difference(self.image)

    def __call__(self, w):
        s = 0.05 / max_norm(w).clamp_min(1e-30)
        with torch.no_grad():
            moved = self.constraint.pixels.difference(self.constraint.decode(self.z + s * w))
            return (self.r - moved) / s.view(-1, *[1] * (moved.ndim - 1))

    def adjoint(self, u):
        self.constraint.backward_passes += 1
        g = self.constraint.pixels.A.vjp(self.image, u)  # on images; the rest is the decoder's vector-Jacobian product
        if self.graph is not None:
            z, image = self.graph
            return torch.autograd.grad(image, z, g.clone(), retain_graph=True)[0]
        starts, chunk = self.parts
        return torch.cat([self._vjp(self.z[i : i + chunk], g[i : i + chunk]) for i in starts])

    def _vjp(self, z, g):
        z, image = self._decode(z)
        return torch.autograd.grad(image, z, g.clone())[0]

    def _decode(self, z):
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

    def __init__(self, decode, encode, A, y: Tensor, lift=None, h: float = 0.05, retraction: float = 1.0):
        self.decode, self.encode, self.pixels, self.h, self.retraction = decode, encode, LinearConstraint(A, y), h, retraction
        self.lift = A.pseudo_inverse if lift is None else lift

    def __call__(self, x0):
        x = self.decode(x0)
        r = self.pixels.difference(x)
        p = self.lift(r)
        moved, here = self.encode(torch.cat([x + self.h * unit(p), x])).chunk(2)
        return (moved - here) * (max_norm(p) / self.h) + self.retraction * (here - x0), self.pixels.rms(r)

    def residual(self, x0):
        return self.pixels.residual(self.decode(x0))


class LossConstraint(Constraint):
    """Any differentiable loss of x0, one number per sample:  e = - d loss / d x0,  residual = loss(x0).

    loss: callable x0 [B, ...] -> [B], in which samples do not mix. ValueError where it gives another shape.
    chunk: samples that the loss is given at a time, which bounds the memory of its graph; None: all. Not for a loss that holds
    something of its own for each sample.
    """

    def __init__(self, loss: Callable[[Tensor], Tensor], chunk: int | None = None):
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk = {chunk}: give a number of samples, or None")
        self.loss, self.chunk, self.backward_passes = loss, chunk, 0

    def __call__(self, x0):
        found = [self._gradient(part) for part in x0.split(self.chunk or len(x0))]
        self.backward_passes += 1
        gradients, values = zip(*found, strict=True)
        return -torch.cat(gradients), torch.cat(values)

    def _gradient(self, x0):
        with torch.inference_mode(False), torch.enable_grad():
            x = x0.clone().requires_grad_()
            values = self._values(x)
            return torch.autograd.grad(values.sum(), x)[0], values.detach()

    def residual(self, x0):
        return torch.cat([self._values(part) for part in x0.split(self.chunk or len(x0))])

    def _values(self, x):
        values = self.loss(x)
        if values.shape != x.shape[:1]:
            raise ValueError(
                f"loss gives a tensor of shape {list(values.shape)} for {len(x)} samples: one number for each is needed"
            )
        return values


def gram(tokens):
    """Gram matrix of features over the places of a image (Gatys et al. 2016): F^T F / N, tokens F [B, N, C] -> [B, C, C]."""
    return tokens.transpose(1, 2) @ tokens / tokens.shape[1]


def gram_distance(features, decode, reference):
    """The loss |G(features(decode(x0))) - G(features(reference))|_F, Frobenius norm of the difference of Gram matrices. A function
    x0 [B, ...] -> [B] for LossConstraint: style guidance.

    features: images in [-1, 1] -> tokens [B, N, C], such as `ldm.clip.ClipVision`; reference: [B or 1, 3, H, W].
    """
    with torch.no_grad():
        wanted = gram(features(check_image(reference, "reference")))

    def loss(x0):
        if len(wanted) not in (1, len(x0)):
            raise ValueError(f"reference has {len(wanted)} images, but x0 has {len(x0)} samples: give one for each, or one for all")
        return torch.linalg.matrix_norm(gram(features(decode(x0))) - wanted)

    return loss
