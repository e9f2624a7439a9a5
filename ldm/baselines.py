"""Other methods of constrained sampling, on the same D, constraints, schedules and seeds as the Newton steps: what to compare with.

Each is a generator of `State` with the arguments of `newton_sampler`, written from its paper, with the paper's defaults. At equal
`steps` all methods visit the same noise levels. `State.nfe` counts forward evaluations of D; the gradient methods (dps, psld,
gradient_steps) also run as many backward passes through D as their docstrings say. ValueError for wrong arguments.

Arguments of all: D, a denoiser (ldm/denoisers.py); constraint, a LinearConstraint unless the docstring allows others; shape
[B, C, H, W] of x_t; seeds, one integer per sample; steps, diffusion steps; levels, noise, start, device, dtype: see
ldm.sampling.Common. Samples of a batch never mix.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import Unpack

from ldm.constraints import Constraint, DecodedConstraint, LinearConstraint, LossConstraint
from ldm.correction import INNER
from ldm.linalg import gcr, power_iteration, unit
from ldm.newton_sampler import step_lengths
from ldm.operators import Mask
from ldm.sampling import Common, DenoiserLike, Run, State, States, begin, check_eta, drawn, seeded_noise


def dps(
    D: DenoiserLike,
    constraint: LinearConstraint | DecodedConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 1000,
    zeta: float = 1.0,
    eta: float | str = 1.0,
    **common: Unpack[Common],
) -> States:
    """Diffusion posterior sampling (Chung et al., ICLR 2023, Algorithm 1), for LinearConstraint and DecodedConstraint:

        x_s = ancestral step from (x_t, D(x_t, t)),   x_s <- x_s - zeta grad_{x_t} |y - A D(x_t, t)|_2

    (the paper's zeta_i = zeta / |r| times the gradient of |r|^2, up to the factor 2 that the authors' code leaves out too).
    One forward and one backward evaluation per step. Defaults: 1,000 steps, zeta = 1.
    """
    check_positive(zeta=zeta)
    run = _start(D, shape, seeds, steps, eta, common)
    pixels = constraint.pixels if isinstance(constraint, DecodedConstraint) else constraint
    return _dps(run, constraint, zeta, eta, lambda residual: residual * pixels.count.sqrt())


@torch.no_grad()
def _dps(run, constraint, zeta, eta, norm):
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels)):
        x0, gradient, residual = vjp(D, constraint, x_t, now.t)
        length = norm(residual).clamp_min(1e-12).view(-1, *[1] * (x_t.ndim - 1)).to(x_t)
        x_t = D.schedule.step(x_t, x0, now, to, eta, noise) + zeta * gradient / length
        yield State(i + 1, now.t, x_t, x0, residual, D.calls, to.t, drawn(noise))


def gradient_steps(
    D: DenoiserLike,
    constraint: Constraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 20,
    gradient_steps: int = 5,
    lr: float | Sequence[float] = (0.5, 0.1),
    eta: float | str = 0.0,
    **common: Unpack[Common],
) -> States:
    """The Newton sampler's loop with the gradient J^T e in the place of J e (FreeDoM, Yu et al., ICCV 2023, with this paper's
    normalisation), for any constraint:

        x0 = D(x_t, t);  K times: { e = constraint(x0);  x_t += lr J^T e / |J^T e|_inf;  x0 = D(x_t, t) };  DDIM step

    1 + K forward (x0 is had with the graph of its gradient) and K backward evaluations per step. lr: as
    that of `newton_sampler`.
    """
    check_positive(gradient_steps=gradient_steps)
    lengths = step_lengths(lr, gradient_steps)
    run = _start(D, shape, seeds, steps, eta, common)
    return _gradient_steps(run, constraint, lengths, eta)


@torch.no_grad()
def _gradient_steps(run, constraint, lengths, eta):
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels)):
        for lr in lengths:
            _, gradient, _ = vjp(D, constraint, x_t, now.t)
            x_t = x_t + lr * unit(gradient)
        x0 = D(x_t, now.t)
        residual = constraint.residual(x0)
        x_t = D.schedule.step(x_t, x0, now, to, eta, noise)
        yield State(i + 1, now.t, x_t, x0, residual, D.calls, to.t, drawn(noise))


def mpgd(
    D: DenoiserLike,
    constraint: LinearConstraint | LossConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 100,
    scale: float = 1.0,
    eta: float | str = 0.0,
    **common: Unpack[Common],
) -> States:
    """Manifold preserving guided diffusion (He et al., ICLR 2024, Algorithm 1, without autoencoder): the gradient with respect to
    x0, eps as before.

        x0 <- x0 + c e,   DDIM step,   c = scale / |A|^2

    The paper tunes c for each task; here it is in units of the operator's norm |A| (power iteration; needs no evaluation of D), so
    that scale = 1 is a full step for every A. Of a LossConstraint, e has no natural length: c = scale / |e|_inf, as in the paper's
    loop. One forward evaluation per step.
    """
    check_positive(scale=scale)
    run = _start(D, shape, seeds, steps, eta, common)
    if isinstance(constraint, LossConstraint):
        return _corrected(run, constraint, eta, lambda x0, now, to: scale * unit(constraint(x0)[0]))
    c = scale / squared_norm(constraint.A, run.x_t)
    return _corrected(run, constraint, eta, lambda x0, now, to: c * constraint(x0)[0])


def ddnm(
    D: DenoiserLike,
    constraint: LinearConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 100,
    sigma_y: float = 0.0,
    eta: float | str = 0.85,
    **common: Unpack[Common],
) -> States:
    """Denoising diffusion null-space model (Wang et al., ICLR 2023, eq. 13; with noise the weight of eq. 17): projection.

        x0 <- x0 + lambda A^+ (y - A x0),   DDIM step with eta = 0.85,   lambda = min(1, sigma_s / (alpha_s sigma_y))

    A needs a pseudo-inverse. One forward evaluation per step.
    """
    run = _start(D, shape, seeds, steps, eta, common)
    constraint.A.pseudo_inverse(torch.zeros_like(constraint.y))  # its error before any work, if there is none

    def correction(x0, now, to):
        weight = 1.0 if sigma_y == 0 else min(1.0, to.sigma / (to.alpha * sigma_y))
        return weight * constraint.A.pseudo_inverse(constraint.difference(x0))

    return _corrected(run, constraint, eta, correction)


@torch.inference_mode()
def _corrected(run, constraint, eta, correction):
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels)):
        x0 = D(x_t, now.t)
        correct = x0 + correction(x0, now, to)
        eps_hat = (x_t - now.alpha * x0) / now.sigma
        x_t = D.schedule.step(now.alpha * correct + now.sigma * eps_hat, correct, now, to, eta, noise)
        yield State(i + 1, now.t, x_t, correct, constraint.residual(correct), D.calls, to.t, drawn(noise))


def psld(
    D: DenoiserLike,
    constraint: DecodedConstraint,
    encode: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 1000,
    omega: float = 1.0,
    gamma: float = 0.1,
    eta: float | str = 1.0,
    **common: Unpack[Common],
) -> States:
    """Posterior sampling with latent diffusion (Rout et al., NeurIPS 2023, Algorithm 2), for a DecodedConstraint:

        x_s = ancestral step,  x_s <- x_s - grad_{x_t} ( omega |y - A Dec(x0)|_2 + gamma |x0 - Enc(A^+ y + (1 - A^+ A) Dec(x0))|_2 )

    encode: images -> latents, differentiable. One forward and one backward evaluation of D per step, and one of the decoder and
    the encoder each. Defaults as in the authors' code: 1,000 steps, omega = 1, gamma = 0.1.
    """
    check_positive(omega=omega)
    run = _start(D, shape, seeds, steps, eta, common)
    return _psld(run, constraint, encode, omega, gamma, eta)


@torch.no_grad()
def _psld(run, constraint, encode, omega, gamma, eta):
    D, levels, noise, x_t = run
    decode, pixels = constraint.decode, constraint.pixels
    for i, (now, to) in enumerate(pairwise(levels)):
        with torch.enable_grad():
            x = x_t.clone().requires_grad_()
            x0 = D(x, now.t)
            image = decode(x0)
            r = pixels.difference(image)
            glued = encode(image + pixels.A.pseudo_inverse(r))
            norms = omega * (r.flatten(1).norm(dim=1)) + gamma * (x0 - glued).flatten(1).norm(dim=1)
            (gradient,) = torch.autograd.grad(norms.sum(), x)
        x0 = x0.detach()
        x_t = D.schedule.step(x_t, x0, now, to, eta, noise) - gradient
        yield State(i + 1, now.t, x_t, x0, pixels.rms(r.detach()), D.calls, to.t, drawn(noise))


def repaint(
    D: DenoiserLike,
    constraint: LinearConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 250,
    resamples: int = 10,
    **common: Unpack[Common],
) -> States:
    """RePaint (Lugmayr et al., CVPR 2022, Algorithm 1), for masks only: what is known is pasted in at every noise level, and each
    step is repeated after noising back, so that the rest gets to know of it.

        U times: { x_s = ancestral step from x_t;  x_s <- M (alpha_s y + sigma_s n) + (1 - M) x_s;  x_t ~ q(x_t | x_s) }

    steps x resamples forward evaluations, but the last step is not repeated. Defaults: 250 steps, U = 10.
    """
    if not isinstance(constraint.A, Mask):
        raise ValueError(f"constraint.A is a {type(constraint.A).__name__}: RePaint fills in masks only")
    check_positive(resamples=resamples)
    run = _start(D, shape, seeds, steps, 1.0, common)
    return _repaint(run, constraint, resamples)


@torch.inference_mode()
def _repaint(run, constraint, resamples):
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels)):
        held = constraint.at(to)
        for u in reversed(range(resamples if to.sigma > 0 else 1)):
            x0 = D(x_t, now.t)
            x_s = D.schedule.step(x_t, x0, now, to, 1.0, noise)
            x_s = x_s + held.A(to.alpha * held.y + (to.sigma * noise() if to.sigma > 0 else 0.0) - x_s)
            if u:
                a = now.alpha / to.alpha
                x_t = a * x_s + (now.sigma**2 - (a * to.sigma) ** 2) ** 0.5 * noise()
        x_t = x_s
        yield State(i + 1, now.t, x_t, x0, constraint.residual(x0 if to.sigma > 0 else x_s), D.calls, to.t, drawn(noise))


def diffpir(
    D: DenoiserLike,
    constraint: LinearConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 100,
    sigma_y: float = 0.0,
    weight: float = 7.0,
    zeta: float = 0.3,
    **common: Unpack[Common],
) -> States:
    """Denoising diffusion models for plug-and-play restoration (Zhu et al., CVPR workshops 2023, Algorithm 1):

        x0 <- argmin_x |y - A x|^2 + rho |x - D(x_t, t)|^2,   rho = weight sigma_y^2 alpha_t^2 / sigma_t^2
        eps = (x_t - alpha_t x0) / sigma_t,   x_s = alpha_s x0 + sigma_s (sqrt(1 - zeta) eps + sqrt(zeta) n)

    The minimiser is x0 + A^T (A A^T + rho)^-1 r, by conjugate gradients without evaluations of D. sigma_y is taken as at least
    0.001, as in the authors' code; weight (the paper's lambda, 6 to 8 for most tasks) and zeta (0.3 for noisy tasks) are the
    paper's. One forward evaluation per step.
    """
    check_positive(weight=weight)
    run = _start(D, shape, seeds, steps, zeta, common)
    return _diffpir(run, constraint, weight * max(sigma_y, 1e-3) ** 2, zeta)


@torch.inference_mode()
def _diffpir(run, constraint, weight, zeta):
    D, levels, noise, x_t = run
    for i, (now, to) in enumerate(pairwise(levels)):
        x0 = D(x_t, now.t)
        x0 = x0 + solve_without_J(constraint.A, constraint.difference(x0), 1.0, weight * (now.alpha / now.sigma) ** 2)
        residual = constraint.residual(x0)
        if to.sigma > 0:
            eps = (x_t - now.alpha * x0) / now.sigma
            x_t = to.alpha * x0 + to.sigma * ((1 - zeta) ** 0.5 * eps + (zeta**0.5 * noise() if zeta else 0.0))
        else:
            x_t = x0
        yield State(i + 1, now.t, x_t, x0, residual, D.calls, to.t, drawn(noise))


def latino(
    D: DenoiserLike,
    constraint: LinearConstraint | DecodedConstraint,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    steps: int = 8,
    sigma_y: float = 0.0,
    delta: float = 1.0,
    encode: Callable[[Tensor], Tensor] | None = None,
    **common: Unpack[Common],
) -> States:
    """LATINO (Spagnoletti et al., ICCV 2025), made for few-step models: denoise, a proximal step on the image, noise anew.

        u = Dec(D(z_t, t)),  x = argmin |y - A x|^2 / sigma_y^2 + |x - u|^2 / (delta sigma_t^2),  z_s = alpha_s Enc(x) + sigma_s n

    For a LinearConstraint without Dec and Enc; for a DecodedConstraint encode is needed: images -> latents. The minimiser is
    found by conjugate gradients. Nothing is differentiated. sigma_y is taken as at least 0.001. The authors set delta for each
    task, here it is 1; the first z is pure noise, without their alpha Enc(A^+ y). One forward evaluation per step, 8 in the paper.
    """
    check_positive(delta=delta)
    run = _start(D, shape, seeds, steps, 0.0, common)
    check_encode(constraint, encode)
    return _latino(run, constraint, encode, max(sigma_y, 1e-3) ** 2, delta)


@torch.inference_mode()
def _latino(run, constraint, encode, variance, delta):
    D, levels, noise, x_t = run
    pixels = constraint if encode is None else constraint.pixels
    for i, (now, to) in enumerate(pairwise(levels)):
        x0 = D(x_t, now.t)
        u = x0 if encode is None else constraint.decode(x0)
        x = u + solve_without_J(pixels.A, pixels.difference(u), delta * now.sigma**2, variance)
        x0 = x if encode is None else encode(x)
        x_t = to.alpha * x0 + to.sigma * noise() if to.sigma > 0 else x0
        yield State(i + 1, now.t, x_t, x0, constraint.residual(x0), D.calls)


def _start(D, shape, seeds, steps, eta, common) -> Run:
    """What every method begins with."""
    check_eta(eta)
    return begin(D, shape, seeds, lambda: D.schedule.levels(steps), **common)


def check_encode(constraint, encode):
    """ValueError unless there is an encoder where, and only where, there is a decoder."""
    if isinstance(constraint, DecodedConstraint) == (encode is None):
        raise ValueError(
            f"encode = {encode}: give a function with a DecodedConstraint, and none with a {type(constraint).__name__}"
        )


def check_positive(**values):
    """ValueError unless all are positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} = {value}: give a positive number")


def vjp(D, constraint, x_t, t):
    """x0 = D(x_t, t), J^T e and the residual, (e, residual) = constraint(x0): one forward, one backward evaluation."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.clone().requires_grad_()
        x0 = D(x, t)
        e, residual = constraint(x0.detach())
        (gradient,) = torch.autograd.grad(x0, x, e)
    return x0.detach(), gradient, residual


def squared_norm(A, like):
    """|A|^2, the largest eigenvalue of A^T A, by power iteration from a fixed start; a float, at least a tiny positive number."""
    v = seeded_noise((1, *like.shape[1:]), [0], like.device, like.dtype)().expand(like.shape)
    return max(power_iteration(lambda v: A.adjoint(A(v)), v).max().item(), 1e-12)


def solve_without_J(A, r, variance, noise_variance, vectors=INNER):
    """d = V A^T (noise_variance I + A V A^T)^-1 r for V = variance I: no evaluation of D."""

    def product(u):
        w = variance * A.adjoint(u)
        return w, A(w)

    return gcr(r, product, vectors, noise_variance)[0]
