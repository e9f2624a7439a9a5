"""What each idea of `fast_sampler` is worth: one at a time off or changed, all at no more than --budget network evaluations.

    python benchmarks/compare_ablation.py [--images 64] [--budget 44] [--tasks half hole sr4 blur] [--variants ...]

On mnist, with the pictures, seeds and measures of compare.py. Appends to --out/compare_ablation.csv, skips rows that are there, and
writes compare_ablation.md: means, with half the width of the 95 % bootstrap interval.
"""

import argparse
from pathlib import Path

import compare_tasks as tasks
from tqdm import tqdm

from ldm.comparison import intervals, run
from ldm.solver import fast_sampler, steps_for
from ldm.table import append_row, in_table, read_rows
from ldm.util import resolve_device

VARIANTS = {
    "default": {},
    "strength 1": dict(strength=1.0),
    "strength 1.6": dict(strength=1.6),
    "strength 3": dict(strength=3.0),
    "eps fitted to the moved x0, strength 1": dict(refit=True, strength=1.0),
    "uniform levels": dict(grid="uniform"),
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
}
SHOWN = ["residual", "lpips", "psnr", "accuracy", "kid"]


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
        task, changed = model.task(task_name), VARIANTS[name]
        counted = {k: changed[k] for k in ("late", "vectors", "grid") if k in changed}
        steps = steps_for(args.budget, task.schedule, **counted)
        x, costs = run(task, fast_sampler, dict(steps=steps, **task.noise, **changed), args.batch, device, bar)
        append_row(path, key | costs | intervals(model.measure(x, task), model.reference))
    found = sorted((row for row in read_rows(path)), key=lambda row: (args.tasks + tasks.TASKS).index(row["task"]))
    path.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
