"""Every method of constrained sampling on the same network, images and seeds: quality against cost.

    python benchmarks/compare.py [--models mnist tiny tiny-flow] [--tasks half hole ...] [--methods newton fast ...]
                                 [--budgets 20 44 100 220 1000] [--images 256] [--compile] [--quick]

Tasks: right half missing, centre hole, brush strokes, 90 % of the pixels missing, x4 super-resolution, blur with noise of
sigma_y = 0.05. A budget is a number of network evaluations, a backward pass counted as one more; METHODS in ldm/comparison.py and
OTHERS in benchmarks/foreign.py (other people's implementations: azula, deepinv) have each method's settings for it; NAME-tuned has
the best of twelve on other images instead, where compare_tune.py has searched.

Appends one row per (model, task, method, budget, images) to --out/compare.csv and skips rows that are there, so that an
interrupted run goes on and a deleted line is made anew; what was sampled is kept in outputs/compare/ for paired differences. Then
writes compare-MODEL.md, compare-MODEL.png (quality against seconds) and compare-MODEL-ranking.png (at 44 evaluations); of rows that
differ in the number of images only, those of the most images. --quick: 4 images, two tasks, two budgets, into
outputs/compare-quick. --report: only write what follows from the rows. --models tiny and tiny-flow need the captioned images
(make data-emoji), mnist the MNIST data.

Every number has a 95 % bootstrap interval over the images. Seconds are the process's CPU seconds per image (on a GPU: wall). Memory
is the peak of one diffusion step, per image, measured once for each method and task.
"""

import argparse
from pathlib import Path

import compare_tune
import foreign
import torch
from compare_report import report
from compare_tasks import MODELS, TASKS
from tqdm import tqdm

from ldm.comparison import METHODS, intervals, run, step_memory, unconstrained
from ldm.table import append_row, in_table, read_rows
from ldm.util import resolve_device

ALL_METHODS = [*METHODS, *foreign.OTHERS, *compare_tune.LABELS]


def memory(path, key, task, chosen, device):
    """{memory, memory_plain} of a method on a task: of the table if it is there, in any setting, otherwise measured."""
    of = lambda row: (row["model"], row["task"], row["method"].removesuffix("-tuned"))  # noqa: E731
    known = [row for row in read_rows(path) if of(row) == of(key) and row["memory"]]
    if known:
        return {k: float(known[0][k]) for k in ("memory", "memory_plain")}
    plain = step_memory(task, unconstrained, dict(newton_steps=0), device)
    return dict(memory=step_memory(task, *chosen, device), memory_plain=plain)


def file_of(kept, key):
    """Where the samples of a row are kept."""
    return kept / "{model}-{images}-{task}-{method}-{budget}.pt".format(**key)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mnist"], choices=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=ALL_METHODS, metavar="METHOD", help=", ".join(ALL_METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[20, 44, 100, 220], help="network evaluations, 20 to 1000")
    parser.add_argument("--images", type=int, help="how many (mnist: 256, at most 1000; tiny, tiny-flow: 128, at most 128)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="sample nothing")
    parser.add_argument("--compile", action="store_true", help="the network, by torch.compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="data", help="folder of the images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.tasks, args.budgets, args.out = 4, ["half", "sr4"], [20, 44], Path("outputs/compare-quick")
    for n in args.budgets:
        if not 20 <= n <= 1000:
            parser.error(f"--budgets {n}: give 20 to 1000 network evaluations")
    for name in args.models:
        if args.images and not 2 <= args.images <= MODELS[name].most:
            parser.error(f"--images {args.images}: give a number from 2 to {MODELS[name].most} for {name}")
    asked = args.methods or ALL_METHODS
    missing = [m for m in asked if m.split("-")[0] in foreign.MISSING]
    if missing:
        words = f"{' and '.join(foreign.MISSING)} not installed (pip install {' '.join(foreign.MISSING)})"
        if args.methods:
            parser.error(f"--methods {missing[0]}: {words}")
        print(f"left out: {', '.join(missing)}; {words}")
    methods, device = [m for m in asked if m not in missing], resolve_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    path, kept = args.out / "compare.csv", Path("outputs") / args.out.name.replace("results", "compare")
    kept.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        model = MODELS[name](args.data, args.images or MODELS[name].usual, device)
        if args.compile:
            # one compilation for each batch, and with or without gradients, inference mode, azula's and deepinv's modes ...
            torch._dynamo.config.recompile_limit = 64
            model.D.compile()
        callables = METHODS | foreign.OTHERS | compare_tune.tuned(args.out / compare_tune.FILE, name)
        jobs = [] if args.report else [(t, m, b) for b in sorted(args.budgets) for t in args.tasks for m in methods]
        bar = tqdm(jobs, desc=name)
        for task_name, method, budget in bar:
            key = dict(model=name, task=task_name, method=method, budget=budget, images=len(model.images))
            if in_table(path, key):
                continue
            task = model.task(task_name)
            chosen = callables[method](budget, task)
            if chosen is None:
                continue
            bar.set_description(f"{task_name}, {method}, {budget}")
            x, costs = run(task, *chosen, args.batch, device, bar)
            costs |= memory(path, key, task, chosen, device)
            values = model.measure(x, task)
            torch.save(dict(x=x.cpu(), **values), file_of(kept, key))
            append_row(path, key | costs | intervals(values, model.reference))
        report(read_rows(path), name, model, args.out, lambda key: file_of(kept, key))


if __name__ == "__main__":
    main()
