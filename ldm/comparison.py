"""Methods of constrained sampling on equal terms: tasks, settings for a budget of network evaluations, costs, measures.

What benchmarks/compare.py (the shipped models) and ldm/evaluate.py (your images) share.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.baselines import ddnm, diffpir, dps, gradient_steps, latino, mpgd, psld, repaint
from ldm.constraints import Constraint, DecodedConstraint, latent_inpainting
from ldm.fast_sampler import fast_sampler, late_for, steps_for
from ldm.metrics import bootstrap, frechet_distance, interval, kernel_parts, kid, lpips_distance, lpips_weights, psnr, ssim
from ldm.newer_baselines import daps, flair, flair_weights, flowdps, pnp_flow, resample, sitcom
from ldm.newton_sampler import PAPER, newton_sampler, sample
from ldm.nonlinear import measurement
from ldm.operators import Mask, measure
from ldm.problems import PROBLEMS
from ldm.problems import problem as find_problem
from ldm.sampling import CountedDenoiser, DenoiserLike, States
from ldm.schedules import DiffusionSchedule, FlowSchedule
from ldm.table import PER_IMAGE

TASKS = {name: PROBLEMS[name].label for name in ("half", "hole", "strokes", "sparse", "sr4", "blur")}  # of the benchmarks

Sampler = Callable[..., States]  # (D, constraint, shape, seeds, device=, **settings)

# ---- tasks


class Task:
    """A measurement of images, and what the methods need to know of it.

    name         of a problem, see ldm/problems.py
    images       [N, C, H, H] in [-1, 1]
    numbers      one integer per image, 0, 1 ... if None: the seeds of its samples, and (plus 10,000) of its measurement's noise
    D, shape     denoiser, and shape of one sample of x_t
    first_stage  the model with encode and decode where D works on latents. Masks of regions without noise are put on latents then,
                 the other problems go through the decoder

    linear: whether y is a linear measurement of x0 itself, not through a decoder
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        D: DenoiserLike,
        shape: Sequence[int],
        first_stage: Any = None,
        numbers: Sequence[int] | None = None,
    ):
        self.name, self.images, self.D, self.schedule, self.shape = name, images, D, D.schedule, tuple(shape)
        problem, self.sigma_y = find_problem(name)
        self.A = problem(images.shape[3])
        self.numbers = list(range(len(images)) if numbers is None else numbers)
        self.y = measure(self.A, images, self.sigma_y, [10_000 + i for i in self.numbers])
        self.pixels, self.first_stage = measurement(self.A, self.y), first_stage
        self.linear = self.pixels.linear if first_stage is None else problem.on_latents and self.sigma_y == 0
        self.encode = first_stage.encode if first_stage is not None and not self.linear else None
        self.noise = dict(sigma_y=self.sigma_y)  # what a solver that weighs the noise with A is told

    def constraint(self, part: slice = slice(None)) -> Constraint:
        """The constraint of the images `part`, a slice."""
        if self.first_stage is None:
            return measurement(self.A, self.y[part])
        if self.linear and isinstance(self.A, Mask):
            return latent_inpainting(self.first_stage, self.images[part], self.A.mask.to(self.images.device))
        return DecodedConstraint(self.first_stage.decode, self.A, self.y[part], encode=self.encode)

    @torch.inference_mode()
    def to_images(self, x: Tensor, batch: int = 32) -> Tensor:
        """Samples of x_t's kind -> images [N, C, H, H], not clipped to [-1, 1]."""
        return x if self.first_stage is None else torch.cat([self.first_stage.decode(part) for part in x.split(batch)])

    def measure(self, x: Tensor) -> dict[str, Tensor]:
        """{measure: [N]} of images x, on the CPU: RMSE of what was measured, of x as it is; PSNR, SSIM and LPIPS against the
        truth, of x clipped to [-1, 1].

        LPIPS takes 64 x 64 pixels and more: smaller images are enlarged, grey ones tripled. NaN where its weights are missing.
        """
        residual = self.pixels.residual(x)
        lpips = lpips_distance(large(x), large(self.images)) if lpips_weights() else torch.full_like(residual, float("nan"))
        values = dict(residual=residual, psnr=psnr(x, self.images), ssim=ssim(x, self.images), lpips=lpips)
        return {k: v.cpu() for k, v in values.items()}


def large(x: Tensor) -> Tensor:
    """Images as AlexNet takes them: at least 64 x 64 pixels, three channels."""
    return interpolate(x, size=max(64, x.shape[3]), mode="bilinear").expand(-1, 3, -1, -1)


# ---- methods


EVERY_TASK = "every task", lambda task: True
NO_DECODER = "no task through the decoder and no non-linear one", lambda task: task.linear
ONLY_DECODER = "only tasks through the decoder, with a linear operator", lambda task: task.encode is not None and task.pixels.linear
LINEAR = "only tasks with a linear operator", lambda task: task.pixels.linear
ONLY_MASKS = "only masks on x_t itself", lambda task: task.linear and isinstance(task.A, Mask)
FLOWS = "only rectified flows, with a linear operator", lambda task: is_flow(task) and task.pixels.linear
NO_DECODER_FLOWS = "only rectified flows, no task through the decoder", lambda task: is_flow(task) and task.linear


@dataclass(frozen=True)
class Method:
    """A sampler with its settings for any budget. Called with (budget, task): (sampler, settings), or None where it does not apply.

    name      on command lines and in csv files
    sampler   a generator of State with the arguments (D, constraint, shape, seeds, device, **settings)
    settings  (budget, task) -> dict. The budget is a number of network evaluations, a backward pass counted as one more, which the
              settings approach from below; what is not set is the sampler's default, the paper's
    takes     which tasks, in words and as a test
    label     in tables and figures; "": the name
    """

    name: str
    sampler: Sampler
    settings: Callable[[int, Task], dict[str, Any]]
    takes: tuple[str, Callable[[Task], bool]] = EVERY_TASK
    label: str = ""

    def __call__(self, budget: int, task: Task) -> tuple[Sampler, dict[str, Any]] | None:
        return (self.sampler, self.settings(budget, task)) if self.takes[1](task) else None


def newton_settings(n: int, task: Task, **changed: Any) -> dict[str, Any]:
    """The authors' settings of the paper's loop for the task (ldm.newton_sampler.PAPER; 220 or 420 evaluations). With a lower
    budget fewer inner steps, then fewer diffusion steps of one inner step each; with a higher one more diffusion steps."""
    settings = PAPER["inpainting" if isinstance(task.A, Mask) else "super-resolution"] | changed
    most, steps = settings["newton_steps"], settings["steps"]
    inner = max(1, min(most, (n // steps - 1) // 2))
    affordable = n // (1 + 2 * inner)
    settings |= dict(newton_steps=inner, steps=affordable if inner == most else min(steps, affordable))
    if settings["eta"] == "paper" and not isinstance(task.schedule, DiffusionSchedule):
        settings["eta"] = 0.0  # a flow has no betas to make the authors' noise of
    return settings


def fast_settings(n: int, task: Task) -> dict[str, Any]:
    """As many diffusion steps as n allows, at most 200."""
    late = late_for(None if task.linear else task.constraint(slice(0, 1)), task.sigma_y)
    return dict(steps=steps_for(n, task.schedule, late=late), **task.noise)


def gradient_settings(n: int, task: Task) -> dict[str, Any]:
    """As the paper's loop: an inner step costs one forward and one backward evaluation."""
    settings = newton_settings(n, task)
    return dict(steps=settings["steps"], gradient_steps=settings["newton_steps"], lr=settings["lr"])


def is_flow(task: Task) -> bool:
    return isinstance(task.schedule, FlowSchedule)


def region(task: Task) -> bool:
    """Whether a region is missing, not pixels here and there."""
    return isinstance(task.A, Mask) and find_problem(task.name)[0].on_latents


def daps_settings(n: int, task: Task) -> dict[str, Any]:
    """The authors' 200 levels of 5 evaluations ("1K") for 1,000 and more; below 400, as in their smallest ones, 2 evaluations."""
    ode = 5 if n >= 400 else 2
    return dict(steps=n // ode, ode_steps=ode, lr=5e-5 if region(task) else 1e-4)  # lr: boxes 5e-5, the other linear tasks 1e-4


def sitcom_settings(n: int, task: Task) -> dict[str, Any]:
    """About as many gradient steps as levels, the best for few evaluations in the authors' ablation; at 1,000 their 20 levels.
    lr: so that the steps at one level reach as far as theirs, 30 of 0.02."""
    steps = int((n / 2.5) ** 0.5)
    inner = (n // steps - 1) // 2
    return dict(steps=steps, gradient_steps=inner, lr=0.6 / inner, tolerance=task.sigma_y + 0.001)


def pnp_flow_settings(n: int, task: Task) -> dict[str, Any]:
    """First the authors' 100 steps, then their 5 samples, then more steps; the powers of their tasks."""
    samples = max(1, min(5, n // 100))
    power = 0.5 if region(task) else 0.3 if task.name.startswith("sr") else 0.01
    return dict(steps=1 + (n - 1) // samples, samples=samples, power=power)


def flair_settings(n: int, task: Task) -> dict[str, Any]:
    """lambda is measured on 16 samples of D, once for each D; that is not counted."""
    if task.D not in FLAIR_WEIGHTS:
        device = task.images.device
        x0 = sample(task.D, None, (16, *task.shape), range(16), 20, device=device).x_t
        FLAIR_WEIGHTS[task.D] = flair_weights(task.D, x0, range(16, 32))
    return dict(steps=n, weights=FLAIR_WEIGHTS[task.D], encode=task.encode, **task.noise)


FLAIR_WEIGHTS: WeakKeyDictionary[DenoiserLike, list[float]] = WeakKeyDictionary()
METHODS = {
    method.name: method
    for method in (
        Method("newton", newton_sampler, newton_settings),
        # The constant step of the paper's super-resolution, and ancestral noise.
        Method("newton-eta1", newton_sampler, lambda n, task: newton_settings(n, task, lr=0.1, eta=1.0),
               label="newton, lr 0.1, eta 1"),
        Method("fast", fast_sampler, fast_settings),
        Method("gradient", gradient_steps, gradient_settings, label="gradient steps"),
        # One forward and one backward evaluation a step.
        Method("DPS", dps, lambda n, task: dict(steps=n // 2)),
        Method("PSLD", psld, lambda n, task: dict(steps=n // 2, encode=task.encode), ONLY_DECODER),
        Method("MPGD", mpgd, lambda n, task: dict(steps=n), NO_DECODER),
        Method("DDNM", ddnm, lambda n, task: dict(steps=n, **task.noise), NO_DECODER),
        # Each step is taken ten times, but the last once.
        Method("RePaint", repaint, lambda n, task: dict(steps=(n + 9) // 10), ONLY_MASKS),
        Method("DiffPIR", diffpir, lambda n, task: dict(steps=n, **task.noise), NO_DECODER),
        Method("LATINO", latino, lambda n, task: dict(steps=n, encode=task.encode, **task.noise), LINEAR),
        Method("DAPS", daps, daps_settings, NO_DECODER),
        # Consistent at every tenth of 500 levels in the paper: with other steps at as many levels, or at all of them.
        Method("ReSample", resample,
               lambda n, task: dict(steps=n, every=max(1, n // 50), encode=task.encode, **task.noise), LINEAR),
        Method("SITCOM", sitcom, sitcom_settings),
        Method("PnP-Flow", pnp_flow, pnp_flow_settings, NO_DECODER_FLOWS),
        Method("FlowDPS", flowdps, lambda n, task: dict(steps=n), FLOWS),
        Method("FLAIR", flair, flair_settings, FLOWS),
    )
}  # fmt: skip
LABELS = TASKS | {method.name: method.label or method.name for method in METHODS.values()}  # of tables and figures


# ---- running them


class EvaluationCounter(CountedDenoiser):
    """D, counting images x forward and x backward evaluations."""

    def __init__(self, D: DenoiserLike):
        super().__init__(D)
        self.forward = self.backward = 0

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        self.forward += len(x_t)
        x0 = self.D(x_t, t)
        if x0.requires_grad:
            x0.register_hook(self._count)
        return x0

    def _count(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


def run(
    task: Task, sampler: Sampler, settings: dict[str, Any], batch: int, device: torch.device, bar: Any = None
) -> tuple[Tensor, dict[str, float]]:
    """All images of a task through a sampler: x [N, ...], and the costs per image {nfe_forward, nfe_backward, seconds}.

    An image's seed is its number, in whatever batch it is. Seconds are this process's CPU seconds, on a GPU wall seconds: the
    median of the batches, since the first may compile, and a busy machine slows some.
    """
    D, out, seconds = EvaluationCounter(task.D), [], []
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for start in range(0, len(task.images), batch):
        part = slice(start, min(start + batch, len(task.images)))
        constraint, n = task.constraint(part), part.stop - part.start
        begin = clock()
        for state in sampler(D, constraint, shape=(n, *task.shape), seeds=task.numbers[part], device=device, **settings):
            if bar is not None:
                bar.set_postfix_str(f"{start}+{state.step}/{settings['steps']}", refresh=False)
                bar.update(0)
        out.append(state.x_t.clone())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((clock() - begin) / n)
    n = len(task.images)
    return torch.cat(out), dict(nfe_forward=D.forward / n, nfe_backward=D.backward / n, seconds=median(seconds))


def run_best(
    task: Task, sampler: Sampler, settings: dict[str, Any], batch: int, device: torch.device, runs: int
) -> tuple[Tensor, dict[str, float]]:
    """As `run`, of so many samples for each image the one that fits the measurement best: for problems with several solutions, such
    as phase retrieval. The seeds of run r are the numbers plus r millions."""
    numbers, samples, fits = task.numbers, [], []
    costs: dict[str, float] = {}
    for r in range(runs):
        task.numbers = [number + 1_000_000 * r for number in numbers]
        x, more = run(task, sampler, settings, batch, device)
        costs = {key: costs.get(key, 0) + value for key, value in more.items()}
        samples.append(x)
        fits.append(task.pixels.residual(task.to_images(x)))
    task.numbers = numbers
    best = torch.stack(fits).argmin(0)
    return torch.stack(samples)[best, torch.arange(len(best))], costs


def step_memory(task: Task, sampler: Sampler, settings: dict[str, Any], device: torch.device, n: int = 8) -> float | None:
    """Peak MiB per image that a sampler allocates up to the end of its first diffusion step (of all steps, if it yields but one
    State): by torch's profiler on the CPU, by CUDA's statistics on a GPU. None elsewhere."""
    n = min(n, len(task.images))
    constraint = task.constraint(slice(0, n)) if sampler is not unconstrained else None
    arguments = dict(shape=(n, *task.shape), seeds=range(n), device=device)
    step = lambda: next(sampler(task.D, constraint, **arguments, **settings))  # noqa: E731
    step()  # what is made once (a prompt's tokens, an operator's matrices) is no part of a step
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / n / 2**20
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes a line to the terminal whenever it starts or stops
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return torch.tensor([e.nbytes() for e in events]).cumsum(0).max().item() / n / 2**20


def unconstrained(D: DenoiserLike, constraint: Constraint | None, **settings: Any) -> States:
    """Sampling without a constraint, for `step_memory`."""
    return newton_sampler(D, None, **settings)


def intervals(values: dict[str, Tensor], reference: Tensor) -> dict[str, float]:
    """Mean and 95 % percentile bootstrap interval over the images of each measure: {name, name_low, name_high}.

    values: {measure: [N]} and features [N, d]; reference: features [M, d] of true images, for KID. Where values has `inception`
    and `inception_reference`, features too, FID (without interval) and another KID are measured in them.
    """
    draws = bootstrap(len(values["residual"]))
    row: dict[str, float] = {}
    for name in PER_IMAGE:
        v = values[name].double()
        row |= _interval(name, v.mean().item(), v[draws].mean(1))
    parts = kernel_parts(values["features"], reference)
    row |= _interval("kid", kid(parts), torch.tensor([kid(parts, i) for i in draws[:200]]))
    if "inception" in values:
        features = [values[name] for name in ("inception", "inception_reference")]
        parts = kernel_parts(*features)
        row |= _interval("kid_inception", kid(parts), torch.tensor([kid(parts, i) for i in draws[:200]]))
        row["fid"] = frechet_distance(*features)
    return row


def _interval(name: str, mean: float, samples: Tensor) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), (mean, *interval(samples)), strict=True))
