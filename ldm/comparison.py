"""Methods of constrained sampling on equal terms: tasks, settings for a budget of network evaluations, costs, rows of a table.

What benchmarks/compare.py (the shipped models) and ldm/evaluate.py (your pictures) share.
"""

import csv
import os
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import interpolate

from ldm.baselines import ddnm, diffpir, dps, gradient_steps, mpgd, psld, repaint
from ldm.constraints import DecodedConstraint, LinearConstraint, latent_inpainting
from ldm.inpainting import make_mask
from ldm.metrics import bootstrap, interval, kernel_parts, kid, lpips_distance, lpips_weights, psnr, ssim
from ldm.newton_sampler import newton_sampler
from ldm.operators import Mask, downsample, gaussian_blur, measure
from ldm.solver import fast_sampler, steps_for
from ldm.util import atomic_write

NOISE = 0.05
TASKS = {"half": "right half missing", "hole": "centre hole", "strokes": "brush strokes", "sparse": "90 % of pixels missing",
         "sr4": "x4 super-resolution", "blur": "blur, noise 0.05"}  # fmt: skip
PER_IMAGE = ["residual", "psnr", "ssim", "lpips", "accuracy"]  # one number per image; kid is one of the whole set
MEASURES = [*PER_IMAGE, "kid"]
NAMES = {"residual": "measurement RMSE", "psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "accuracy": "label accuracy",
         "kid": "KID"}  # fmt: skip
KEY = ["model", "task", "method", "budget", "images"]  # what tells one row from another
COSTS = ["nfe_forward", "nfe_backward", "seconds", "memory", "memory_plain"]
COLUMNS = KEY + COSTS + [measure + end for measure in MEASURES for end in ("", "_low", "_high")]


# ---- tasks


def operator(task, size):
    """The operator of a task on pictures of size x size pixels, and its sigma_y. "sr8" and the like are super-resolution too."""
    if task == "half":
        return Mask(make_mask("right", (size, size))), 0.0
    if task == "hole":
        side = round(size * 14 / 32)
        return Mask(make_mask(((size - side) // 2, (size - side) // 2, side, side), (size, size))), 0.0
    if task == "strokes":
        return Mask(make_mask("strokes", (size, size))), 0.0
    if task == "sparse":
        return Mask((torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)) < 0.1).float()), 0.0
    if task.startswith("sr") and task[2:].isdigit():
        return downsample((size, size), int(task[2:])), 0.0
    if task == "blur":
        return gaussian_blur((size, size), size / 32 * 1.5), NOISE
    raise ValueError(f"task = {task!r}: known are {', '.join(TASKS)}, and sr with another factor (sr8)")


class Task:
    """A measurement of pictures, and what the methods need to know of it.

    name         a key of TASKS, or "sr8" ...
    images       [N, C, H, H] in [-1, 1]
    numbers      one integer per image, 0, 1 ... if None: the seeds of its samples, and (plus 10,000) of its measurement's noise
    D, shape     denoiser, and shape of one sample of x_t
    first_stage  the model with encode and decode where D works on latents: masks, but the 90 % one, are put on latents then, the
                 other tasks go through the decoder (`linear` is False)
    """

    def __init__(self, name, images, D, shape, first_stage=None, numbers=None):
        self.name, self.images, self.D, self.schedule, self.shape = name, images, D, D.schedule, tuple(shape)
        self.A, self.sigma_y = operator(name, images.shape[3])
        self.numbers = list(range(len(images)) if numbers is None else numbers)
        self.y = measure(self.A, images, self.sigma_y, [10_000 + i for i in self.numbers])
        self.pixels, self.first_stage = LinearConstraint(self.A, self.y), first_stage
        self.linear = first_stage is None or name in ("half", "hole", "strokes")
        self.encode = None if self.linear else first_stage.encode
        self.noise = dict(sigma_y=self.sigma_y)  # what a solver that weighs the noise with A is told

    def constraint(self, part=slice(None)):
        """The constraint of the images `part`, a slice."""
        if self.first_stage is None:
            return LinearConstraint(self.A, self.y[part])
        if self.linear:
            return latent_inpainting(self.first_stage, self.images[part], self.A.mask.to(self.images.device))
        return DecodedConstraint(self.first_stage.decode, self.A, self.y[part])

    @torch.inference_mode()
    def pictures(self, x, batch=32):
        """Samples of x_t's kind -> pictures [N, C, H, H], not clipped to [-1, 1]."""
        return x if self.first_stage is None else torch.cat([self.first_stage.decode(part) for part in x.split(batch)])

    def measure(self, x):
        """{measure: [N]} of pictures x, on the CPU: RMSE of what was measured, of x as it is; PSNR, SSIM and LPIPS against the
        truth, of x clipped to [-1, 1].

        LPIPS takes 64 x 64 pixels and more: smaller pictures are enlarged, grey ones tripled. NaN where its weights are missing.
        """
        measured = self.pixels.rms(self.pixels.residual(x))
        lpips = lpips_distance(large(x), large(self.images)) if lpips_weights() else torch.full_like(measured, float("nan"))
        values = dict(residual=measured, psnr=psnr(x, self.images), ssim=ssim(x, self.images), lpips=lpips)
        return {k: v.cpu() for k, v in values.items()}


def large(x):
    """Pictures as AlexNet takes them: at least 64 x 64 pixels, three channels."""
    return interpolate(x, size=max(64, x.shape[3]), mode="bilinear").expand(-1, 3, -1, -1)


# ---- methods


def newton(n, **settings):
    """The paper's loop: 20 diffusion steps of as many inner steps, 1 to 5, as n allows; below 60 fewer diffusion steps of one inner
    step each, above 220 (the paper's number) more of five."""
    inner = max(1, min(5, (n // 20 - 1) // 2))
    steps = n // (1 + 2 * inner)
    return newton_sampler, dict(steps=steps if n > 220 else min(20, steps), newton_steps=inner, **settings)


def gradients(n):
    """As the paper's loop: an inner step costs one forward and one backward evaluation."""
    settings = newton(n)[1]
    return gradient_steps, dict(steps=settings["steps"], gradient_steps=settings["newton_steps"])


# name -> (budget n, task) -> (sampler, settings), or None where the method does not apply. n is a number of network evaluations, a
# backward pass counted as one more, which the settings approach from below; what is not set is the method's default, the paper's.
#   paper             see `newton`: as published; and with the constant step of its super-resolution and ancestral noise
#   fast              as many diffusion steps as n allows, at most 200
#   gradient steps    see `gradients`
#   DPS, PSLD         n / 2 steps of one forward and one backward evaluation
#   MPGD, DDNM, DiffPIR   n steps
#   RePaint           n / 10 steps, each taken 10 times, but the last once
METHODS = {
    "paper": lambda n, task: newton(n),
    "paper, lr 0.1, eta 1": lambda n, task: newton(n, lr=0.1, eta=1.0),
    "fast": lambda n, task: (fast_sampler, dict(steps=steps_for(n, task.schedule), **task.noise)),
    "gradient steps": lambda n, task: gradients(n),
    "DPS": lambda n, task: (dps, dict(steps=n // 2)),
    "PSLD": lambda n, task: (psld, dict(steps=n // 2, encode=task.encode)) if task.encode else None,
    "MPGD": lambda n, task: (mpgd, dict(steps=n)) if task.linear else None,
    "DDNM": lambda n, task: (ddnm, dict(steps=n, **task.noise)) if task.linear else None,
    "RePaint": lambda n, task: (repaint, dict(steps=(n + 9) // 10)) if task.linear and isinstance(task.A, Mask) else None,
    "DiffPIR": lambda n, task: (diffpir, dict(steps=n, **task.noise)) if task.linear else None,
}


# ---- running them


class Counted:
    """D, counting images x forward and x backward evaluations."""

    def __init__(self, D):
        self.D, self.schedule, self.forward, self.backward = D, D.schedule, 0, 0

    def __call__(self, x_t, t):
        self.forward += len(x_t)
        x0 = self.D(x_t, t)
        if x0.requires_grad:
            x0.register_hook(self._count)
        return x0

    def _count(self, gradient):
        self.backward += len(gradient)


def run(task, sampler, settings, batch, device, bar=None):
    """All images of a task through a sampler: x [N, ...], and the costs per image {nfe_forward, nfe_backward, seconds}.

    An image's seed is its number, in whatever batch it is. Seconds are this process's CPU seconds, on a GPU wall seconds: the
    median of the batches, since the first may compile, and a busy machine slows some.
    """
    D, out, seconds = Counted(task.D), [], []
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


def step_memory(task, sampler, settings, device, n=8):
    """Peak MiB per image that a sampler allocates up to the end of its first diffusion step (of all steps, if it yields but one
    State): by torch's profiler on the CPU, by CUDA's statistics on a GPU. None elsewhere."""
    n = min(n, len(task.images))
    constraint = task.constraint(slice(0, n)) if sampler is not plain else None
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


def plain(D, constraint, **settings):
    """Sampling without a constraint, for `step_memory`."""
    return newton_sampler(D, None, **settings)


def intervals(values, reference):
    """Mean and 95 % percentile bootstrap interval over the images of each measure: {name, name_low, name_high}.

    values: {measure: [N]} and features [N, d]; reference: features [M, d] of true pictures, for KID.
    """
    draws, row = bootstrap(len(values["residual"])), {}
    for name in PER_IMAGE:
        v = values[name].double()
        row |= _interval(name, v.mean().item(), v[draws].mean(1))
    parts = kernel_parts(values["features"], reference)
    return row | _interval("kid", kid(parts), torch.tensor([kid(parts, i) for i in draws[:200]]))


def _interval(name, mean, samples):
    return dict(zip((name, f"{name}_low", f"{name}_high"), (mean, *interval(samples)), strict=True))


# ---- the table


def rows(path):
    """The rows of a table, dicts of strings; none if there is no file. To have a row made anew, delete its line."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="") as file:
        return [dict.fromkeys(COLUMNS, "") | row for row in csv.DictReader(file)]


def in_table(path, key):
    return any(all(row[k] == str(v) for k, v in key.items()) for row in rows(path))


def append(path, row):
    """Add a row: the whole table is written beside the old one and takes its place, so that it is never cut off."""
    row = {k: f"{v:.5g}" if isinstance(v, float) else "" if v is None else v for k, v in row.items()}
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([*rows(path), row])


def measured(rows):
    """Those of MEASURES that some row has a number of."""
    return [m for m in MEASURES if any(row[m] not in ("", "nan") for row in rows)]


def markdown(rows, title, features):
    """The lines of a table for each task of the rows (of `rows`), cheapest first. features: in words, what KID is measured in."""
    measures, counts = measured(rows), sorted({int(row["images"]) for row in rows})
    images = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    lines = [f"# {title}, {images} images", "",
             "Mean [95 % bootstrap interval over the images]. Evaluations: of the network, per image, forward + backward. "
             "MiB: peak memory of one diffusion step, and its ratio to a step without constraint. Measurement RMSE: over the known "
             f"pixels, or what else was measured. KID: in {features}."]  # fmt: skip
    if "lpips" not in measures and lpips_weights() is None:
        lines += ["LPIPS is left out: AlexNet's weights are missing (make data-lpips)."]
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += ["", f"## {TASKS.get(task, task)}", ""]
        lines += head("method | images | evaluations | s per image | MiB per image", measures)
        for row in sorted((r for r in rows if r["task"] == task), key=evaluations):
            backward = f" + {float(row['nfe_backward']):.0f}" if float(row["nfe_backward"]) else ""
            memory, without = (float(row[k] or "nan") for k in ("memory", "memory_plain"))
            cells = [row["method"], row["images"], f"{float(row['nfe_forward']):.0f}{backward}", f"{float(row['seconds']):.3f}",
                     f"{memory:.2f} (x {memory / without:.2f})"]  # fmt: skip
            cells += [f"{float(row[m]):.3g} [{float(row[m + '_low']):.3g}, {float(row[m + '_high']):.3g}]" for m in measures]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def head(columns, measures):
    """The two lines that begin a Markdown table."""
    columns = [*columns.split(" | "), *(NAMES[m] for m in measures)]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def evaluations(row):
    return float(row["nfe_forward"]) + float(row["nfe_backward"])
