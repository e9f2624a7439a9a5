"""Every method of constrained sampling on the same network, images and seeds: quality against cost.

    python benchmarks/compare.py [--models mnist tiny tiny-flow] [--tasks half hole ...] [--methods newton fast ...]
                                 [--budgets 20 44 100 220 1000] [--images 256] [--workers 1] [--compile] [--quick]
    python benchmarks/compare.py --seconds 8 [--models ...]

Tasks: right half missing, centre hole, brush strokes, 90 % of the pixels missing, x4 super-resolution, blur with noise of
sigma_y = 0.05. A budget is a number of network evaluations, a backward pass counted as one more; METHODS in ldm/comparison.py and
OTHERS in benchmarks/foreign.py (other people's implementations: azula, deepinv) have each method's settings for it; NAME-tuned has
the best of twelve on other images instead, where compare_tune.py has searched.

Appends one row per (model, task, method, budget, images) to --out/compare.csv and skips rows that are there, so that an
interrupted run goes on and a deleted line is made anew. Each image's measures go to --out/compare.safetensors, for paired
differences.
Then writes compare-MODEL.md, compare-MODEL.png (quality against evaluations), compare-MODEL-seconds.png and
compare-MODEL-ranking.png (at 44 evaluations); of rows that differ in the number of images only, those of the most images. Rows are
made in the order of --budgets. --workers: so many processes share them, which pays on a GPU that one small network leaves idle.
--quick: 4 images, two tasks, two budgets, into outputs/compare-quick. --report: only write what follows from the rows. --models
tiny and tiny-flow need the captioned images (make data-emoji), mnist the MNIST data.

Every number has a 95 % bootstrap interval over the images. Memory is the peak of one diffusion step, per image, measured once for
each method and task. Seconds are the process's CPU seconds per image (on a GPU: wall). Several workers on a GPU slow each other,
and leave them empty: --seconds fills them in, on whatever machine it runs on, from so many images at about 44 evaluations, times
the evaluations of the row over those of that run.
"""

import argparse
import subprocess
import sys
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import compare_tune
import foreign
import torch
from compare_report import name_of, report
from compare_tasks import MODELS, TASKS
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ldm.comparison import METHODS, intervals, run, step_memory, unconstrained
from ldm.table import PER_IMAGE, append_row, evaluations, in_table, put_row, read_rows
from ldm.util import atomic_write, resolve_device

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
    return kept / f"{name_of(key)}.safetensors"


def gathered(path, kept):
    """{name of a row: PER_IMAGE [5, N], float16} of the rows of the table `path` that have them. They move from the folder `kept`
    to compare.safetensors next to the table, where those of rows that are gone are dropped."""
    file, names = path.with_suffix(".safetensors"), {name_of(row) for row in read_rows(path)}
    found = load_file(file) if file.is_file() else {}
    parts = [part for part in kept.glob("*.safetensors") if part.stem in names]
    for part in parts:
        found |= load_file(part)
    found = {name: found[name] for name in sorted(names & found.keys())}
    with atomic_write(file) as temporary:
        save_file(found, temporary)
    for part in parts:  # a later run may get this row from somewhere else
        part.unlink()
    return found


def made(model, task, key, chosen, path, kept, args, device, bar):
    """The row of a key: its images are sampled and measured, and their measures kept in a file of the folder `kept`."""
    x, costs = run(task, *chosen, args.batch, device, bar)
    if args.worker and device.type == "cuda":
        costs["seconds"] = None
    costs |= memory(path, key, task, chosen, device)
    values = model.measure(x, task)
    save_file({name_of(key): torch.stack([values[m] for m in PER_IMAGE]).half()}, file_of(kept, key))
    return key | costs | intervals(values, model.reference)


# ---- several processes


def claimed(file):
    """Whether this process is the first one to ask for the row that is kept in `file`."""
    try:
        file.with_suffix(".taken").open("x").close()
    except FileExistsError:
        return False
    return True


@contextmanager
def locked(kept):
    """Between processes, one after the other."""
    import fcntl  # not on Windows, where --workers 1 runs

    with (kept / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def work(path, kept, key, make):
    """Make a row as one of several workers, unless it is another's. Returns whether it did not fail."""
    if not claimed(file_of(kept, key)):
        return True
    try:
        row = make()
    except Exception:  # a method that makes NaN of a task leaves its row out, and the others go on
        print(key, traceback.format_exc(), file=sys.stderr, flush=True)
        return False
    with locked(kept):
        append_row(path, row)
    return True


def fill_seconds(path, model, name, callables, args, device):
    """Write the seconds of this model's rows that lack them; `model` has the images to measure them with."""
    lacking = {}
    for row in read_rows(path):
        if row["model"] == name and not row["seconds"]:
            lacking.setdefault((row["task"], row["method"]), []).append(row)
    for (task_name, method), rows in (bar := tqdm(lacking.items(), desc=name)):
        bar.set_description(f"{task_name}, {method}")
        task, budget = model.task(task_name), min((int(row["budget"]) for row in rows), key=lambda n: abs(n - 44))
        _, costs = run(task, *callables[method](budget, task), args.batch, device)
        each = costs["seconds"] / (costs["nfe_forward"] + costs["nfe_backward"])
        for row in rows:
            put_row(path, row | dict(seconds=each * evaluations(row)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mnist"], choices=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=ALL_METHODS, metavar="METHOD", help=", ".join(ALL_METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[20, 44, 100, 220], help="network evaluations, 20 to 1000")
    parser.add_argument("--images", type=int, help="how many (mnist: 256, at most 1000; tiny, tiny-flow: 128, at most 128)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the rows")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of them
    parser.add_argument("--seconds", type=int, metavar="N", help="fill in seconds that are missing, from N images")
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
    if args.workers > 1 and args.seconds:
        parser.error(f"--workers {args.workers} and --seconds: workers slow each other, leave --workers out")
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
    if args.workers > 1 and not args.worker:
        for file in kept.glob("*.taken"):
            file.unlink()
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--worker"]
        failed = [process.wait() for process in [subprocess.Popen(command) for _ in range(args.workers)]]
        print(f"{args.workers} workers have ended; rows that failed: {sum(failed)}")
        args.report = True
    failed = 0
    for name in args.models:
        model = MODELS[name](args.data, args.seconds or args.images or MODELS[name].usual, device)
        if args.compile:
            # one compilation for each batch, and with or without gradients, inference mode, azula's and deepinv's modes ...
            torch._dynamo.config.recompile_limit = 64
            model.D.compile()
        callables = METHODS | foreign.OTHERS | compare_tune.tuned(args.out / compare_tune.FILE, name)
        if args.seconds:
            fill_seconds(path, model, name, callables, args, device)
        jobs = [] if args.report or args.seconds else [(b, t, m) for b in args.budgets for t in args.tasks for m in methods]
        for budget, task_name, method in (bar := tqdm(jobs, desc=name, disable=args.worker)):
            key = dict(model=name, task=task_name, method=method, budget=budget, images=len(model.images))
            if in_table(path, key):
                continue
            task = model.task(task_name)
            chosen = callables[method](budget, task)
            if chosen is None:
                continue
            bar.set_description(f"{task_name}, {method}, {budget}")
            make = partial(made, model, task, key, chosen, path, kept, args, device, bar)
            if args.worker:
                failed += not work(path, kept, key, make)
            else:
                append_row(path, make())
        if not args.worker:
            report(read_rows(path), name, model, args.out, gathered(path, kept))
    if args.worker:
        sys.exit(min(failed, 99))


if __name__ == "__main__":
    main()
