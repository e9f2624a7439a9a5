"""Noise schedules x_t = alpha_t x_0 + sigma_t eps, and the step from one noise level to the next.

A schedule is the single owner of the triple (t, alpha, sigma): whoever needs one of them asks for a `Level`. All numbers are
computed in float64 and handed out as Python floats, so that neither the weights' dtype nor a device synchronisation touches
them.
"""

from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """One noise level. `t` is the time as the network takes it; None at the clean end (alpha 1, sigma 0)."""

    t: float
    alpha: float
    sigma: float


CLEAN = Level(None, 1.0, 0.0)  # type: ignore[arg-type]


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> Tensor:
    """The variances beta_t by the names of published LDM configs, as a float64 tensor [n_timestep].

    "linear" is linear in sqrt(beta) (Stable Diffusion's "scaled linear"), "sqrt_linear" is linear in beta (Ho et al. 2020),
    "cosine" is Nichol & Dhariwal 2021.
    """
    if schedule == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=torch.float64) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, n_timestep, dtype=torch.float64)
    if schedule == "cosine":
        u = torch.arange(n_timestep + 1, dtype=torch.float64) / n_timestep
        abar = torch.cos((u + cosine_s) / (1 + cosine_s) * torch.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(0, 0.999)
    raise ValueError(f'beta_schedule = {schedule!r}: known are "linear", "sqrt_linear" and "cosine"')


def with_zero_terminal_snr(betas: Tensor, last: float = 4.8973451890853435e-08) -> Tensor:
    """The betas [T] of the schedule that ends at (nearly) pure noise (Lin et al. 2023, algorithm 1).

    sqrt(abar) is shifted and scaled to end at zero, with the same start. The last abar is then `last`, as in the programs that
    write such models: alpha stays above zero.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    abar = torch.cat([abar[:-1], abar.new_tensor([last])])
    return torch.cat([1 - abar[:1], 1 - abar[1:] / abar[:-1]])


class Schedule(ABC):
    """What diffusion and flow schedules share: the step between two levels, and levels in equal ratios."""

    resolution = 1000  # levels that `log_levels` chooses from

    @abstractmethod
    def level(self, t: float) -> Level:
        """The level at the time t. Raises ValueError where the schedule has no such time."""

    @abstractmethod
    def levels(self, steps: int) -> list[Level]:
        """The steps + 1 levels that a sampler visits, noisy to clean; the last one is `CLEAN`."""

    def added_noise(self, now: Level, to: Level, eta: float | str) -> float:
        """Standard deviation n of the fresh noise in the step from `now` to `to`:

            n = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)

        eta = 0 is DDIM (Song et al. 2021, eq. 12) and, for a rectified flow, the Euler step; eta = 1 is ancestral (DDPM) sampling.
        """
        if eta == "paper":
            raise ValueError('eta = "paper" is made of the betas of a diffusion schedule: give a number from 0 to 1 for this one')
        variance = now.sigma**2 - (now.alpha / to.alpha * to.sigma) ** 2
        return float(eta) * to.sigma / now.sigma * max(variance, 0.0) ** 0.5

    def step(
        self,
        x_t: Tensor,
        x0: Tensor,
        now: Level,
        to: Level,
        eta: float | str = 0.0,
        noise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """From level `now` to level `to`: x_s = alpha_s x0 + sqrt(sigma_s^2 - n^2) eps_hat + n noise.

        eps_hat = (x_t - alpha_t x0) / sigma_t, and n = added_noise(now, to, eta). At the clean end the result is x0 itself: no
        noise is left over. x_t, x0 [B, ...]; noise: a function that draws a tensor of that shape, called only if n > 0.
        """
        if to.sigma == 0:
            return x0
        eps_hat = (x_t - now.alpha * x0) / now.sigma
        n = self.added_noise(now, to, eta)
        x_s = to.alpha * x0 + (to.sigma**2 - n**2) ** 0.5 * eps_hat
        if n == 0:
            return x_s
        if noise is None:
            raise ValueError(f"noise is missing: eta = {eta} needs a function that draws it")
        return x_s + n * noise()

    def log_levels(self, steps: int, first: float = 20.0, last: float = 0.1) -> list[Level]:
        """steps + 1 levels: the noisiest, then sigma / alpha from `first` to `last` in equal ratios, then clean.

        Above 20, D is nearly the mean of all images, whatever x_t; below 0.1, nearly x_t itself. Chosen from `resolution` levels.
        """
        if int(steps) != steps or not 3 <= steps <= 200:
            raise ValueError(f"steps = {steps}: give an integer from 3 to 200")
        *noisy, clean = self.levels(self.resolution)
        ratios = [level.alpha / level.sigma for level in noisy]  # increasing
        first, chosen = min(first, 0.8 / max(ratios[0], 1e-3)), [noisy[0]]
        for i in range(steps - 1):
            wanted = (last / first) ** (-i / (steps - 2)) / first
            k = min(bisect(ratios, wanted), len(noisy) - 1)
            nearer = k and wanted / ratios[k - 1] < ratios[k] / wanted and ratios[k - 1] > 0
            chosen.append(noisy[k - 1] if nearer else noisy[k])
        return [*dict.fromkeys(chosen), clean]


class DiffusionSchedule(Schedule):
    """Variance-preserving diffusion (DDPM, Stable Diffusion): alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), t = 0 .. T-1.

    betas: [T], the variances the network was trained with.
    """

    def __init__(self, betas: Tensor | Sequence[float]):
        self.alphas_cumprod = torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), dim=0)  # [T]
        self._abar: list[float] = self.alphas_cumprod.tolist()
        self.resolution = min(len(self), 1000)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def level(self, t: float) -> Level:
        """The level at the integer time t in 0 .. T-1. Raises ValueError elsewhere."""
        if int(t) != t or not 0 <= t < len(self):
            raise ValueError(f"t = {t}: this schedule has the integer times 0 .. {len(self) - 1}")
        abar = self._abar[int(t)]
        return Level(int(t), abar**0.5, (1 - abar) ** 0.5)

    def added_noise(self, now: Level, to: Level, eta: float | str) -> float:
        """As above; eta = "paper": that of the authors' code, n^2 = beta_s sigma_s^2 / sigma_t^2 with the beta of a single training
        step, although the step from t to s spans many of them. It is small: DDIM with a little noise."""
        if eta != "paper":
            return super().added_noise(now, to, eta)
        if to.t is None:
            return 0.0
        abar, s = self._abar, int(to.t)
        beta = 1 - (abar[s] / abar[s - 1] if s else abar[s])
        return beta**0.5 * to.sigma / now.sigma

    def levels(self, steps: int, spacing: str = "trailing") -> list[Level]:
        """The steps + 1 levels that a sampler visits, noisy to clean; the last one is `CLEAN`.

        spacing: "trailing" T-1, T-1-T/steps, ... (starts at pure noise, Lin et al. 2023) or
                 "leading" ..., 1 + T/steps, 1 (Stable Diffusion's DDIM sampler).
        """
        if int(steps) != steps or not 1 <= steps <= len(self):
            raise ValueError(f"steps = {steps}: give an integer from 1 to {len(self)}, the number of training steps")
        if spacing == "trailing":
            times = [round(len(self) - i * len(self) / steps) - 1 for i in range(steps)]
        elif spacing == "leading":
            times = [min(i * (len(self) // steps) + 1, len(self) - 1) for i in reversed(range(steps))]
        else:
            raise ValueError(f'spacing = {spacing!r}: known are "trailing" and "leading"')
        return [self.level(t) for t in times] + [CLEAN]

    def random_times(
        self, n: int, generator: torch.Generator, mean: float | None = None, std: float = 1.4, uniform: float = 0.1
    ) -> Tensor:
        """n times for training, [n] int64: uniform, or (`mean` is given) log(sigma / alpha) normal with that mean and `std`.

        The log-normal times of Karras et al. 2022 spend the training where the image is decided, instead of on nearly pure noise,
        which is half of the uniform times of a linear schedule. The fraction `uniform` stays uniform, so that no time is left out.
        """
        times = torch.randint(len(self), (n,), generator=generator)
        if mean is None:
            return times
        ratio = torch.exp(mean + std * torch.randn(n, generator=generator, dtype=torch.float64))
        chosen = torch.searchsorted((1 / self.alphas_cumprod - 1).sqrt(), ratio).clamp_max(len(self) - 1)
        return torch.where(torch.rand(n, generator=generator) < uniform, times, chosen)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t = alpha_t x_0 + sigma_t noise for training: integer times t [B], each sample its own. Returns (x_t, alpha, sigma),
        alpha and sigma of shape [B, 1, 1, ...] in x0's dtype."""
        levels = torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()]).to(x0.dtype)
        alpha, sigma = levels.to(x0.device)[:, t].view(2, -1, *[1] * (x0.ndim - 1))  # no float64 on devices without it
        return alpha * x0 + sigma * noise, alpha, sigma


class FlowSchedule(Schedule):
    """Rectified flow (Liu et al. 2023): sigma = t / scale, alpha = 1 - sigma, for t in (0, scale].

    shift  s of Esser et al. 2024, sigma <- s sigma / (1 + (s - 1) sigma): more steps at high noise for large images
    scale  of the time as the network takes it: 1, or 1000 for networks with the time embedding of diffusion models
    """

    def __init__(self, shift: float = 1.0, scale: float = 1.0):
        self.shift = shift
        self.scale = scale

    def level(self, t: float) -> Level:
        """The level at the time t in (0, scale]. Raises ValueError elsewhere."""
        if not 0 < t <= self.scale:
            raise ValueError(f"t = {t}: this rectified flow has the times 0 < t <= {self.scale:g}")
        sigma = float(t) / self.scale
        return Level(float(t), 1 - sigma, sigma)

    def levels(self, steps: int) -> list[Level]:
        """The steps + 1 levels that a sampler visits, noisy to clean; the last one is `CLEAN`."""
        if int(steps) != steps or steps < 1:
            raise ValueError(f"steps = {steps}: give a positive integer")
        sigmas = (1 - i / steps for i in range(steps))
        return [self.level(self.scale * (self.shift * s / (1 + (self.shift - 1) * s))) for s in sigmas] + [CLEAN]

    def random_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n times for training, [n] float32: sigma is the sigmoid of a standard normal number (Esser et al. 2024)."""
        return self.scale * torch.sigmoid(torch.randn(n, generator=generator))

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t = alpha_t x_0 + sigma_t noise for training: times t [B], each sample its own. Returns (x_t, alpha, sigma), alpha
        and sigma of shape [B, 1, 1, ...] in x0's dtype."""
        sigma = (t / self.scale).to(x0).view(-1, *[1] * (x0.ndim - 1))
        return (1 - sigma) * x0 + sigma * noise, 1 - sigma, sigma
