"""Measurements from deepinv: its physics as operators of ours, and our samplers as a reconstructor of deepinv's.

    physics = deepinv.physics.Tomography(...)
    A = from_deepinv(physics)                                          an operator, with deepinv's adjoint and pseudo-inverse
    y = measure_physics(physics, x, seeds)                             y = N(A x), with the physics' own noise
    sampler = fast_sampler(D, measurement(A, y), x.shape, seeds)       the constraint that fits A

deepinv: https://deepinv.github.io. Masks become `ldm.operators.Mask`, which is exact and fast.
"""

import re
from collections.abc import Callable

import torch
from deepinv.models import Reconstructor
from deepinv.physics import MRI, GaussianNoise, Inpainting, LinearPhysics, PhaseRetrieval, Physics
from deepinv.utils import TensorList
from torch import Tensor

from ldm.fast_sampler import fast_sampler
from ldm.nonlinear import NonlinearOperator, measurement
from ldm.operators import Mask, Operator


def from_deepinv(physics: Physics, unit: bool = False) -> Operator:
    """An operator of any deepinv physics, acting on images in [-1, 1] as they are.

    unit: map them to [0, 1] first, as deepinv's own images are. For a non-linear physics only, since a linear one would not
    stay linear: for y measured in [0, 1], A x = 2 y - A 1 says the same.
    Raises ValueError for what is no physics, and for a linear one with unit.
    """
    if not isinstance(physics, Physics):
        raise ValueError(f"physics is a {type(physics).__name__}: give an object of deepinv.physics")
    if not isinstance(physics, LinearPhysics):
        return NonlinearPhysics(physics, unit)
    if unit:
        raise ValueError(f"unit = True with {type(physics).__name__}, which is linear: measure images in [-1, 1] instead")
    binary = isinstance(physics, Inpainting) and physics.mask is not None and ((physics.mask == 0) | (physics.mask == 1)).all()
    return Mask(physics.mask) if binary else PhysicsOperator(physics)


def measure_physics(physics: Physics, x: Tensor, seeds) -> Tensor:
    """y = N(A(x)) with the physics' own noise and sensor, x [B, ...] as the physics takes it; one integer seed for each image, so
    that an image's noise does not depend on the others. The state of torch's random numbers is left as it was."""
    if len(seeds) != len(x):
        raise ValueError(f"seeds has {len(seeds)} entries, but x has {len(x)} images: give one for each")
    clean = _Runner(physics)(physics.A, x)
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        noisy = []
        for y, seed in zip(clean.split(1), seeds, strict=True):
            torch.manual_seed(seed)
            own = {} if physics.noise_model.rng is None else {"seed": seed}
            noisy.append(physics.sensor(physics.noise(y, **own)))
    return torch.cat(noisy).to(x.dtype)


class _Runner:
    """Calls the functions of a physics: on the device of what they are given, in the dtype that the physics has, and outside of
    inference mode, since some differentiate inside. What they cannot take is one ValueError."""

    def __init__(self, physics):
        self.physics, self.device = physics, None
        tensors = [*physics.parameters(), *physics.buffers()]
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        if isinstance(physics, PhaseRetrieval) and any(t.is_complex() for t in tensors):
            self.dtype = next(t.dtype for t in tensors if t.is_complex())

    def __call__(self, function, *tensors):
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self(function, *(x.clone() for x in tensors))
        x = tensors[0]
        if x.device != self.device:
            self.physics.to(x.device)
            self.device = x.device
        try:
            out = function(*(v.to(self.dtype) if v.dtype == x.dtype else v for v in tensors))
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
            if re.search("memory", str(error)):
                raise
            reason = str(error).strip().splitlines()[0][:200]
            raise ValueError(f"{type(self.physics).__name__} cannot take a tensor of shape {list(x.shape)}: {reason}") from error
        if isinstance(out, TensorList):
            raise ValueError(f"{type(self.physics).__name__} gives a list of measurements: take its parts one by one")
        return out


class PhysicsOperator(Operator):
    """A linear deepinv physics, with deepinv's adjoint and pseudo-inverse (which some physics compute by iterations)."""

    def __init__(self, physics: LinearPhysics):
        self.physics, self.run = physics, _Runner(physics)

    def __call__(self, x):
        y = self.run(self.physics.A, x)
        if y.is_complex():
            raise ValueError(f"{type(self.physics).__name__} gives complex measurements: compose it with torch.view_as_real")
        return y.to(x.dtype)

    def adjoint(self, y):
        return self.run(self.physics.A_adjoint, y).to(y.dtype)

    def pseudo_inverse(self, y):
        return self.run(self.physics.A_dagger, y).to(y.dtype)

    def measured(self, y):
        return y * self.physics.mask.to(y) if isinstance(self.physics, MRI) else y


class NonlinearPhysics(NonlinearOperator):
    """A non-linear deepinv physics, with its own vector-Jacobian product. unit: map images from [-1, 1] to [0, 1] first."""

    def __init__(self, physics: Physics, unit: bool = False):
        self.physics, self.unit, self.run = physics, unit, _Runner(physics)

    def __call__(self, x):
        return self.run(self.physics.A, self._image(x)).to(x.dtype)

    def vjp(self, x, v):
        try:
            g = self.run(self.physics.A_vjp, self._image(x), v)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{self} has no vjp, so that it cannot guide a sampler: {error}") from None
        if v.any() and not g.any():
            raise ValueError(f"{self} has a derivative of zero: its A is not made of differentiable functions")
        g = g.real if g.is_complex() else g
        return g.to(v.dtype) / 2 if self.unit else g.to(v.dtype)

    def _image(self, x):
        return (x + 1) / 2 if self.unit else x

    def __str__(self):
        return type(self.physics).__name__


class SamplerReconstructor(Reconstructor):
    """One of our samplers in the place of a deepinv reconstructor: model(y, physics) -> images in [0, 1].

    D         a denoiser on images in [-1, 1] (`ldm.denoisers`)
    shape     [C, H, W] of the images; None: that of physics.A_adjoint(y)
    sampler   fast_sampler, newton_sampler or a baseline
    seed      of the first image, the next has the next one
    settings  the sampler's. With fast_sampler, sigma_y is that of the physics' Gaussian noise unless given

    y is measured from images in [0, 1], as everywhere in deepinv.
    """

    def __init__(self, D, shape=None, sampler: Callable = fast_sampler, seed: int = 0, **settings):
        super().__init__(device=D.device)
        self.D, self.shape, self.sampler, self.seed, self.settings = D, shape, sampler, seed, settings

    @torch.no_grad()
    def forward(self, y, physics, **kwargs):
        """y [B, ...], a deepinv physics -> images [B, C, H, W] in [0, 1]."""
        linear = isinstance(physics, LinearPhysics)
        shape = (len(y), *(physics.A_adjoint(y).shape[1:] if self.shape is None else self.shape))
        A = from_deepinv(physics, unit=not linear)
        # With x = 2 u - 1 of an image u in [0, 1]: y = A u means 2 y - A 1 = A x, and noise twice as strong.
        constraint = measurement(A, 2 * y - A(torch.ones(shape, device=y.device, dtype=y.dtype)) if linear else y)
        settings = dict(self.settings)
        if self.sampler is fast_sampler and isinstance(physics.noise_model, GaussianNoise):
            settings.setdefault("sigma_y", (2 if linear else 1) * float(physics.noise_model.sigma))
        seeds = range(self.seed, self.seed + len(y))
        for state in self.sampler(self.D, constraint, shape, seeds, **settings):  # noqa: B007
            pass
        return ((state.x_t + 1) / 2).clamp(0, 1)
