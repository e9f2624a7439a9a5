"""What all samplers share: the state they yield, the noise of a seed, Jacobian products, and where a run begins.

A denoiser `D` is a callable (x_t, t) -> x0 that knows its schedule, its arithmetic and its device (`DenoiserLike`). A constraint
is a callable x0 -> (e, residual), see ldm/constraints.py. All tensors are [B, ...] float32 or float64, and samples never mix.
"""

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ldm.linalg import max_norm, unit
from ldm.schedules import Level, Schedule


class Arithmetic(NamedTuple):
    """How a network computes, as far as Jacobian products are concerned."""

    h: float  # length of a finite difference: shorter is closer to the derivative, until rounding, about |x0| eps / h, takes over
    mode: str  # of `jvp`: in 16 bits a difference drowns in rounding (15 to 40 % of J e), forward-mode differentiation does not


ARITHMETIC = {
    "float64": Arithmetic(0.005, "difference"),
    "float32": Arithmetic(0.005, "difference"),
    "tf32": Arithmetic(0.05, "forward-ad"),  # float32 numbers, convolutions and products of 10 bits: the default of recent GPUs
    "float16": Arithmetic(0.1, "forward-ad"),
    "bfloat16": Arithmetic(0.3, "forward-ad"),
}

H = {dtype: ARITHMETIC[str(dtype).removeprefix("torch.")].h
     for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}  # its old form  # fmt: skip


@runtime_checkable
class DenoiserLike(Protocol):
    """What samplers ask of a denoiser. `ldm.denoisers.Denoiser` makes one of a network, or of any function."""

    schedule: Schedule  # owner of (t, alpha, sigma)

    @property
    def arithmetic(self) -> str:
        """A key of ARITHMETIC."""
        return "float32"

    @property
    def device(self) -> torch.device:
        """Where x_t belongs."""
        return torch.device("cpu")

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """x_t [B, ...] at the time t of the schedule -> x0, same shape and dtype. One call is one network evaluation (NFE)."""
        ...


class State(NamedTuple):
    """Where the sampler is after a diffusion step. The last state's x_t is the result."""

    step: int  # 1 .. steps
    t: float  # the time that x0 was estimated at
    x_t: Tensor  # [B, ...], already at the next, lower noise level; equal to x0 after the last step
    x0: Tensor  # [B, ...] the denoised estimate that this step ended with
    residual: Tensor | None  # [B] the constraint's residual of x0; None without a constraint
    nfe: int  # evaluations of D so far, per image
    to: float | None = None  # the time that x_t is at; None at the clean end
    drawn: int = 0  # tensors of noise that the seeds have given so far, to go on from here: start=state


States = Generator[State, Tensor | None, None]


class CountedDenoiser(DenoiserLike):
    """D, counting its evaluations in `calls`."""

    def __init__(self, D: DenoiserLike):
        if not isinstance(D, DenoiserLike):
            raise TypeError(
                f"D is a {type(D).__name__} without schedule, arithmetic and device: make a denoiser of a function x_t, t -> x0 by "
                'ldm.Denoiser(function, schedule, "x0")'
            )
        self.D, self.schedule, self.calls = D, D.schedule, 0

    @property
    def arithmetic(self) -> str:
        return self.D.arithmetic

    @property
    def device(self) -> torch.device:
        return self.D.device

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        self.calls += 1
        return self.D(x_t, t)


# ---- Jacobian products


def jvp(
    D: DenoiserLike,
    x_t: Tensor,
    t: float,
    v: Tensor,
    x0: Tensor | None = None,
    h: float | None = None,
    mode: str | None = None,
) -> Tensor:
    """J v, J = dD/dx_t at (x_t, t), for v [B, ...] of x_t's shape. Returns J v, same shape.

    "difference": (D(x_t + h v / |v|_inf) - D(x_t)) |v|_inf / h, one evaluation of D in addition to x0 = D(x_t, t), which is
                  evaluated too unless given. The rounding error grows as 1/h, the truncation error as h.
    "forward-ad": exact, by forward-mode differentiation (torch.func.jvp); one evaluation of D at two to three times its cost.
                  See `forward_differentiable`.
    h and mode follow the arithmetic of D where they are None. No backward graph is recorded in either mode.
    """
    if h is None or mode is None:
        default = ARITHMETIC[D.arithmetic]
        h, mode = default.h if h is None else h, default.mode if mode is None else mode
    if mode == "difference":
        x0 = D(x_t, t) if x0 is None else x0
        return (D(x_t + h * unit(v), t) - x0) * (max_norm(v) / h)
    if mode == "forward-ad":
        # Inference tensors cannot carry tangents, so copies are differentiated.
        with torch.inference_mode(False), torch.no_grad(), forward_differentiable():
            return torch.func.jvp(lambda x: D(x, t), (x_t.clone(),), (v.clone(),))[1]
    raise ValueError(f'mode = {mode!r}: known are "difference" and "forward-ad"')


@contextmanager
def forward_differentiable() -> Iterator[None]:
    """What forward-mode differentiation of a network needs of PyTorch: attention by its plain formula, since the fused kernels
    have no forward derivative, and `DifferentiableNorms`."""
    with sdpa_kernel(SDPBackend.MATH), DifferentiableNorms():
        yield


class DifferentiableNorms(TorchFunctionMode):
    """Inside, norms of half precision are computed in float32, as their kernels do it: on a GPU these keep their statistics in
    float32, and the tangent would be float32 too, which no half-precision layer takes. And for some versions of PyTorch (2.11 is
    one) group norms get contiguous tensors, of any memory format that the network has."""

    GROUP, OTHER = (F.group_norm, torch.group_norm), (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)

    def __init__(self) -> None:
        super().__init__()
        self.contiguous = not _differentiates_any_group_norm()  # tried here, not within the differentiation

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.GROUP and self.contiguous:
            args = (args[0].contiguous(), *args[1:])
        if function in self.GROUP + self.OTHER and args and args[0].dtype in (torch.float16, torch.bfloat16):
            full = lambda x: x.float() if isinstance(x, Tensor) else x  # noqa: E731
            return function(*map(full, args), **{k: full(x) for k, x in kwargs.items()}).to(args[0].dtype)
        return function(*args, **kwargs)


@cache
def _differentiates_any_group_norm() -> bool:
    """Whether this PyTorch has the forward derivative of a group norm for other memory formats."""
    with torch.inference_mode(False):
        x = torch.arange(16.0).view(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
        try:
            torch.func.jvp(lambda x: F.group_norm(x, 2), (x,), (x.clone(),))
        except RuntimeError:
            return False
        return True


# ---- where a run begins


def seeded_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable[[], Tensor]:
    """A function that draws standard normal noise [B, ...] of `shape`, sample i from its own generator with seeds[i].

    Drawn on the CPU, so that a seed means the same image alone, in any batch and on any device. Its attribute `drawn` counts.
    """
    if len(seeds) != shape[0]:
        raise ValueError(f"seeds has {len(seeds)} entries, but the batch has {shape[0]} samples: give one seed per sample")
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw() -> Tensor:
        draw.drawn += 1  # type: ignore[attr-defined]
        noise = torch.stack([torch.randn(*shape[1:], generator=g, dtype=dtype) for g in generators])
        return noise.to(device, non_blocking=torch.device(device).type == "cuda")  # sent without waiting for the GPU

    draw.drawn = 0  # type: ignore[attr-defined]
    return draw


def drawn(noise: Callable[[], Tensor]) -> int:
    """How often noise was drawn, of a function of `seeded_noise`; 0 for any other."""
    return getattr(noise, "drawn", 0)


def noised(
    D: DenoiserLike,
    x0: Tensor,
    strength: float,
    seeds: Sequence[int] | None = None,
    noise: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Level]:
    """Where editing begins, a sampler's `start`: x0 [B, ...] with noise, alpha x0 + sigma n, and the level of it.

    strength  from 0 (nothing changes) to 1 (nothing is left): the part of the schedule's times that the sampler then runs through
    seeds     one per sample, or `noise`, a function that draws it. Give the sampler the same; other seeds make other variations
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength = {strength}: give a number above 0 and up to 1")
    if (seeds is None) == (noise is None):
        raise ValueError("seeds and noise: give one of them, seeds (one integer per sample) or noise (a function that draws it)")
    draw = seeded_noise(x0.shape, seeds or (), x0.device, x0.dtype) if noise is None else noise
    levels = D.schedule.levels(D.schedule.resolution)[:-1]
    level = levels[-max(round(strength * len(levels)), 1)]
    return level.alpha * x0 + level.sigma * draw(), level


class Common(TypedDict, total=False):
    """Keyword arguments that every sampler takes."""

    levels: Sequence[Level]  # noise levels to visit, noisy to clean, instead of those that follow from `steps`
    noise: Callable[[], Tensor]  # draws [B, ...] of `shape`, instead of `seeds`: for noise from elsewhere
    start: (
        tuple[Tensor, Level] | State
    )  # begin in the middle: at this x_t and its level, with the levels below it (`noised`); or go
    # on from a state that was saved, with the same seeds, levels and settings, as if the run had not been interrupted
    device: str | torch.device  # of x_t; default: D's
    dtype: torch.dtype  # of x_t; default: float32


class Run(NamedTuple):
    """What a sampler begins with."""

    D: CountedDenoiser
    levels: list[Level]
    noise: Callable[[], Tensor]
    x_t: Tensor


def begin(
    D: DenoiserLike,
    shape: Sequence[int],
    seeds: Sequence[int] | None,
    default: Callable[[], Sequence[Level]],
    *,
    levels: Sequence[Level] | None = None,
    noise: Callable[[], Tensor] | None = None,
    start: tuple[Tensor, Level] | State | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """The counting D, the levels to visit (those of `default` if None), the noise and the first x_t of a run: see `Common`.
    ValueError or TypeError for what does not fit."""
    counted, levels = CountedDenoiser(D), list(default() if levels is None else levels)
    if callable(seeds):
        warnings.warn("seeds is a function: give it as noise=", DeprecationWarning, stacklevel=3)
        seeds, noise = None, seeds
    if (seeds is None) == (noise is None):
        raise ValueError("seeds and noise: give one of them, seeds (one integer per sample) or noise (a function that draws it)")
    own = noise is None
    if noise is None:
        noise = seeded_noise(shape, seeds or (), D.device if device is None else device, dtype)
    if len(levels) < 2 or any(b.sigma * a.alpha >= a.sigma * b.alpha for a, b in pairwise(levels)):
        raise ValueError(f"levels has {len(levels)} entries: give two or more, with falling sigma / alpha")
    if levels[-1].sigma > 0:
        raise ValueError(f"levels ends at sigma = {levels[-1].sigma:g}: its last entry has to be ldm.schedules.CLEAN")
    if start is None:
        return Run(counted, levels, noise, noise())
    x_t, level, before = _start(D.schedule, start)
    if tuple(x_t.shape) != tuple(shape):
        raise ValueError(f"start has an x_t of shape {list(x_t.shape)}, but shape is {list(shape)}: give two of the same shape")
    for _ in range(before if own else 0):
        noise()
    below = [to for to in levels if to.sigma * level.alpha < level.sigma * to.alpha]
    return Run(counted, [level, *below], noise, x_t.clone())


def _start(schedule: Schedule, start: Any) -> tuple[Tensor, Level, int]:
    """x_t, its level, and the draws of the seeds' noise that came before: one, that in x_t, where `start` is no state."""
    if isinstance(start, State):
        if start.to is None:
            raise ValueError("start is the last state of a run: there is nothing left to sample, x_t is the result")
        return start.x_t, schedule.level(start.to), start.drawn
    try:
        x_t, level = start
        known = level.t is not None and schedule.level(level.t) == level
    except (TypeError, ValueError, AttributeError):  # no pair, no time of the schedule, no Level
        known = False
    if not known or not torch.is_tensor(x_t):
        pair = isinstance(start, tuple) and len(start) == 2 and torch.is_tensor(start[0])
        shown = f"at {start[1]}" if pair and not torch.is_tensor(start[1]) else f"a {type(start).__name__} of something else"
        raise ValueError(f"start is {shown}: give (x_t, level), a level of D's schedule such as D.schedule.level(t), or a State")
    return x_t, level, 1


def check_eta(eta: float | str) -> None:
    """ValueError unless eta is "paper" or a number from 0 to 1."""
    if eta != "paper" and not (isinstance(eta, (int, float)) and 0 <= eta <= 1):
        raise ValueError(f'eta = {eta!r}: give a number from 0 (DDIM) to 1 (ancestral), or "paper"')


def check_product(h: float | None, mode: str | None) -> None:
    """ValueError unless h and mode are those of `jvp`."""
    if h is not None and not h > 0:
        raise ValueError(f"h = {h}: give a positive number, or None to follow the arithmetic of D")
    if mode not in (None, "difference", "forward-ad"):
        raise ValueError(f'mode = {mode!r}: known are "difference" and "forward-ad"; None follows the arithmetic of D')


def check_finite(x0: Tensor, t: float | None) -> None:
    """FloatingPointError where x0 has NaN or infinity."""
    if not torch.isfinite(x0).all():
        raise FloatingPointError(f"x0 is not finite at t = {t}: take smaller steps, or run the network in float32")
