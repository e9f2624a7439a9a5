"""Every method of constrained sampling on the same network, pictures and seeds: quality against cost.

    python benchmarks/compare.py [--models mnist] [--tasks half hole ...] [--methods paper fast ...] [--budgets 20 44 100 220]
                                 [--images 256] [--quick]

Tasks: right half missing, centre hole, brush strokes, 90 % of the pixels missing, x4 super-resolution, blur with noise of
sigma_y = 0.05. A budget is a number of network evaluations, a backward pass counted as one more; each method gets the settings in
METHODS that come closest from below. Appends one row per (model, task, method, budget) to --out/compare.csv and skips rows that
are there, so that an interrupted run goes on; then writes compare-MODEL.md and compare-MODEL.png of all rows. --quick: 8 images,
two tasks, two budgets, into outputs/. --models tiny needs the captioned pictures (make data-emoji), mnist the MNIST data.

Every number has a 95 % bootstrap interval over the images. Seconds are the process's CPU seconds per image (on a GPU: wall). See
benchmarks/compare_tasks.py for models, tasks and measures. --memory prints each method's peak memory in one diffusion step instead,
per image, as torch's profiler counts allocations on the CPU.
"""

import argparse
import csv
import time
from pathlib import Path

import compare_tasks as tasks
import torch
from compare_report import report
from tqdm import tqdm

from ldm.baselines import ddnm, diffpir, dps, gradient_steps, mpgd, psld, repaint
from ldm.newton_sampler import newton_sampler
from ldm.operators import Mask
from ldm.solver import fast_sampler
from ldm.util import resolve_device


def newton(budget, **settings):
    """The paper's loop for a budget: up to 5 inner steps at up to 20 diffusion steps, rather fewer of the former."""
    inner = max(1, min(5, (budget // 15 - 1) // 2))
    return newton_sampler, dict(steps=min(20, budget // (1 + 2 * inner)), newton_steps=inner, **settings)


def gradients(budget):
    inner = max(1, min(5, (budget // 15 - 1) // 2))
    return gradient_steps, dict(steps=min(20, budget // (1 + 2 * inner)), gradient_steps=inner)


# name -> (budget, task) -> (sampler, settings), or None where the method does not apply. `fast_steps` inverts the NFE formula.
METHODS = {
    "paper": lambda n, task: newton(n),
    "paper, eta 1": lambda n, task: newton(n, eta=1.0),
    "paper, lr 0.1": lambda n, task: newton(n, lr=0.1),
    "paper, lr 0.1, eta 1": lambda n, task: newton(n, lr=0.1, eta=1.0),
    "fast": lambda n, task: (fast_sampler, dict(steps=tasks.fast_steps(n, task.schedule), **task.noise)),
    "gradient steps": lambda n, task: gradients(n),
    "DPS": lambda n, task: (dps, dict(steps=n // 2)),
    "PSLD": lambda n, task: (psld, dict(steps=n // 2, encode=task.encode)) if task.encode else None,
    "MPGD": lambda n, task: (mpgd, dict(steps=n)) if task.linear else None,
    "DDNM": lambda n, task: (ddnm, dict(steps=n, **task.noise)) if task.linear else None,
    "RePaint": lambda n, task: (repaint, dict(steps=n // 10, resamples=10)) if task.linear and isinstance(task.A, Mask) else None,
    "DiffPIR": lambda n, task: (diffpir, dict(steps=n, **task.noise)) if task.linear else None,
}


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


def run(task, sampler, settings, batch, device, bar):
    """All images of a task through a sampler: results [N, ...] and the costs per image."""
    settings, out, seconds = dict(settings), [], 0.0
    encode = settings.pop("encode", None)
    D = Counted(task.D)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for first in range(0, len(task.images), batch):
        part = slice(first, min(first + batch, len(task.images)))
        constraint, shape = task.constraint(part), (part.stop - part.start, *task.shape)
        seeds = range(part.start, part.stop)
        arguments = (D, constraint, encode, shape, seeds) if encode else (D, constraint, shape, seeds)
        start = clock()
        for state in sampler(*arguments, device=device, **settings):
            bar.set_postfix_str(f"{first}+{state.step}/{settings['steps']}", refresh=False)
            bar.update(0)
        seconds += clock() - start
        out.append(state.x_t)
    n = len(task.images)
    return torch.cat(out), dict(nfe_forward=D.forward / n, nfe_backward=D.backward / n, seconds=seconds / n)


@torch.no_grad()
def memory(task, n=8):
    """Peak MiB per image that the first step of each method allocates on the CPU, and of unconstrained sampling."""
    jobs = {"unconstrained": (newton_sampler, dict(newton_steps=0))} | {m: METHODS[m](220, task) for m in METHODS}
    for name, job in jobs.items():
        if job is None:
            continue
        sampler, settings = job
        encode = [settings.pop("encode")] if "encode" in settings else []
        constraint = None if name == "unconstrained" else task.constraint(slice(0, n))
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            next(sampler(task.D, constraint, *encode, (n, *task.shape), range(n), **settings))
        events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
        used = torch.tensor([e.nbytes() for e in events]).cumsum(0)
        print(f"{name:22} {used.max().item() / n / 2**20:8.2f} MiB per image")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mnist"], choices=["mnist", "tiny"])
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=list(tasks.TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--budgets", nargs="+", type=int, default=[20, 44, 100, 220], help="network evaluations, at least 20")
    parser.add_argument("--images", type=int, help="how many (mnist: 256, tiny: 128)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="data", help="folder of the pictures")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.images and not 2 <= args.images <= 1000:
        parser.error(f"--images {args.images}: give a number from 2 to 1000")
    if min(args.budgets) < 20:
        parser.error(f"--budgets {min(args.budgets)}: give at least 20 network evaluations")
    if args.quick:
        args.images, args.tasks, args.budgets, args.out = 8, ["half", "sr4"], [20, 44], Path("outputs/compare-quick")
    device = resolve_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    path, kept = args.out / "compare.csv", Path("outputs/compare")
    for name in args.models:
        n = args.images or {"mnist": 256, "tiny": 128}[name]
        model = tasks.Mnist(args.data, n, device) if name == "mnist" else tasks.Tiny(args.data, n, device)
        if args.memory:
            memory(model.task(args.tasks[0]))
            continue
        jobs = [(t, m, b) for b in sorted(args.budgets) for t in args.tasks for m in args.methods]
        bar = tqdm(jobs, desc=name)
        for task_name, method, budget in bar:
            key = dict(model=name, images=n, task=task_name, method=method, budget=budget)
            task = model.task(task_name)
            chosen = METHODS[method](budget, task)
            if chosen is None or in_table(path, key):
                continue
            bar.set_description(f"{task_name}, {method}, {budget}")
            x, costs = run(task, *chosen, args.batch, device, bar)
            values = model.measure(x, task)
            kept.mkdir(parents=True, exist_ok=True)  # per image, for paired comparisons and for the figures of the notebook
            torch.save(dict(x=x.cpu(), **values), kept / f"{name}-{n}-{task_name}-{method}-{budget}.pt".replace(" ", "_"))
            append(path, key | costs | tasks.intervals(values, model.reference))
        report(path, name, n, args.out, kept, model.reference)


def rows(path):
    return list(csv.DictReader(path.open())) if path.is_file() else []


def in_table(path, key):
    return any(all(row[k] == str(v) for k, v in key.items()) for row in rows(path))


def append(path, row):
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
