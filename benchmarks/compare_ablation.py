"""What each idea of `fast_sampler` is worth: one at a time off or changed, all at no more than --budget network evaluations.

    python benchmarks/compare_ablation.py [--images 64] [--budget 44] [--tasks half hole sr4 blur] [--variants ...]

On mnist, with the images, seeds and measures of compare.py. Appends to --out/compare_ablation.csv, skips rows that are there, and
writes compare_ablation.md: means, with half the width of the 95 % bootstrap interval.
"""

import argparse
import math
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import compare_tasks as tasks
from tqdm import tqdm

from ldm.comparison import intervals, run
from ldm.linalg import dot, ratio
from ldm.table import append_row, in_table, read_rows
from ldm.util import resolve_device

fast = import_module("ldm.fast_sampler")  # the room, not the function of its name
VARIANTS = {
    "default": {},
    "strength 1": dict(strength=1.0),
    "strength 1.6": dict(strength=1.6),
    "strength 3": dict(strength=3.0),
    "eps fitted to the moved x0, strength 1": dict(strength=1.0),
    "uniform levels": {},
    "J at every step but the last": dict(late=0.0),
    "J left out below sigma/alpha = 0.6": dict(late=0.6),
    "no J at all (late = infinity)": dict(late=1e9),
    "two vectors, fewer steps, strength 1.6": dict(vectors=2, strength=1.6),
    "three vectors, fewer steps, strength 1": dict(vectors=3, strength=1.0),
    "DDIM, eta = 0": dict(eta=0.0),
    "ancestral noise, eta = 1": dict(eta=1.0),
    "fresh = 0.5 where J is left out": dict(fresh=0.5),
    "fresh = 1 where J is left out": dict(fresh=1.0),
    "h = 0.1": dict(h=0.1),
    "without preconditioner": {},
    "second-order multistep": {},
    "one product with J for two steps": {},
}
PLAIN = "without preconditioner"
MOVED, UNIFORM = "eps fitted to the moved x0, strength 1", "uniform levels"
MULTISTEP, SHARED = "second-order multistep", "one product with J for two steps"
SHOWN = ["residual", "lpips", "psnr", "accuracy", "kid"]


def settings(name, task, budget):
    """The arguments of `fast_sampler` for a variant, with the most diffusion steps for the budget."""
    changed = VARIANTS[name]
    steps = fast.steps_for(budget, task.schedule, **{k: changed[k] for k in ("late", "vectors") if k in changed})
    if name == UNIFORM:
        cost = lambda levels: len(levels) - 1 + sum(fast.uses_J(now, to, 0.3) for now, to in pairwise(levels))  # noqa: E731
        levels = max((task.schedule.levels(n) for n in range(1, budget) if cost(task.schedule.levels(n)) <= budget), key=len)
        changed, steps = dict(levels=levels), len(levels) - 1
    if name == SHARED:
        with_J = lambda n: sum(fast.uses_J(now, to, 0.3) for now, to in pairwise(task.schedule.log_levels(n)))  # noqa: E731
        steps = max(n for n in range(3, 200) if n + (with_J(n) + 1) // 2 <= budget)
    return dict(steps=steps, **task.noise, **changed)


def step_from_the_moved_x0(D, constraint, x_t, x0, now, to, noise, s):
    """`step_with_J` with eps fitted to the moved x0: exact for a Gaussian."""
    d = fast.correction_with_J(D, constraint, x_t, x0, now, s)
    return D.schedule.step(x_t, x0 + s.strength * d, now, to, s.eta, noise), x0 + d


def step_without_preconditioner(*args):
    with patch("ldm.correction.preconditioner", lambda *_: lambda u: u):
        return STEP(*args)


class Multistep:
    """`step_with_J` whose DDIM step is DPM-Solver++(2M)'s (Lu et al. 2022): x0 + (x0 - the one before) h / (2 h of before), h the
    step in log alpha / sigma."""

    def __init__(self):
        self.before = None

    def __call__(self, D, constraint, x_t, x0, now, to, noise, s):
        h = log_ratio(to) - log_ratio(now)
        guess = x0
        if self.before is not None and self.before[2] == now:
            guess = x0 + (x0 - self.before[0]) * h / (2 * self.before[1])
        self.before = (x0, h, to)
        x_s, moved = STEP(D, constraint, x_t, x0, now, to, noise, s)
        shift = D.schedule.step(x_t, guess, now, to, 0.0) - D.schedule.step(x_t, x0, now, to, 0.0)
        return x_s + shift, moved


class Shared:
    """`step_with_J` that takes a product with J every other time: between, d is along the last one, its length by the new r."""

    def __init__(self):
        self.kept = None

    def __call__(self, D, constraint, x_t, x0, now, to, noise, s):
        if self.kept is None or self.kept[2] != now:
            x_s, moved = STEP(D, constraint, x_t, x0, now, to, noise, s)
            w = moved - x0
            self.kept = w, constraint.linearised(x0)[0](w), to
            return x_s, moved
        w, m, _ = self.kept
        r = constraint.linearised(x0)[1]
        self.kept, d = None, w * ratio(dot(r, m), dot(m, m))
        return D.schedule.step(x_t, x0, now, to, s.eta, noise) + to.alpha * s.strength * d, x0 + d


def log_ratio(level):
    return math.log(max(level.alpha, 1e-3) / level.sigma)


STEP = fast.step_with_J
STEPS = {PLAIN: lambda: step_without_preconditioner, MOVED: lambda: step_from_the_moved_x0, MULTISTEP: Multistep, SHARED: Shared}


def table(found):
    lines = ["| task | variant | evaluations | " + " | ".join(SHOWN) + " |", "|" + "---|" * (3 + len(SHOWN))]
    for row in found:
        cells = [f"{float(row[m]):.3g} ± {(float(row[m + '_high']) - float(row[m + '_low'])) / 2:.2g}" for m in SHOWN]
        lines.append(f"| {row['task']} | {row['method']} | {float(row['nfe_forward']):.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--budget", type=int, default=44)
    parser.add_argument("--tasks", nargs="+", default=["half", "hole", "sr4", "blur"], choices=tasks.TASKS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="data")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    device, path = resolve_device(args.device), args.out / "compare_ablation.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    model = tasks.Mnist(args.data, args.images, device)
    for name, task_name in (bar := tqdm([(v, t) for v in args.variants for t in args.tasks])):
        key = dict(model="mnist", images=args.images, task=task_name, method=name, budget=args.budget)
        if in_table(path, key):
            continue
        bar.set_description(f"{task_name}, {name}")
        task = model.task(task_name)
        with patch.object(fast, "step_with_J", STEPS.get(name, lambda: STEP)()):
            x, costs = run(task, fast.fast_sampler, settings(name, task, args.budget), args.batch, device, bar)
        append_row(path, key | costs | intervals(model.measure(x, task), model.reference))
    found = sorted((row for row in read_rows(path)), key=lambda row: (args.tasks + tasks.TASKS).index(row["task"]))
    path.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
