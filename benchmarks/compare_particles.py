"""Particles on images, next to `fast` without them at the same number of evaluations per sample.

    python benchmarks/compare_particles.py [--model mnist] [--tasks half hole sr4 blur] [--budgets 44 220] [--methods fast ...]
                                           [--images 32] [--report]

Images, tasks and measures of compare.py. particles-P draws P samples of each measurement y, and `fast` --samples. Here y has at
least 64 values and the samples have one vector: they are not weighted (ldm/particles.py), and P only says how many there are.
weighted-P: as if they were, the log weights by sqrt(K / m). Samples of one y then depend on one another. So a y counts once: its
samples are averaged, and the 95 % bootstrap intervals are over images. Where the samples of `fast` are there, "minus fast" is the
paired difference.

spread  root of the mean variance of a pixel among the samples of one y, without bias. An exact sampler's is the posterior's
CRPS    of a pixel, mean over the image: mean |x_i - truth| - mean |x_i - x_j| / 2 (i != j), in units of [-1, 1]. Lowest for the
        posterior: both a bias and too little or too much spread cost (Gneiting and Raftery 2007)

Appends one row per setting to --out/compare_particles.csv, skips rows that are there, and writes compare_particles.md. What the
paired differences need is kept in outputs/compare_particles/.
"""

import argparse
import copy
from pathlib import Path
from unittest.mock import patch

import torch
from compare_tasks import MODELS, TASKS
from rows import append, read
from tqdm import tqdm

from ldm.comparison import LABELS, METHODS, Method, run
from ldm.fast_sampler import fast_sampler
from ldm.metrics import bootstrap, interval
from ldm.util import resolve_device


def weighted(*args, **settings):
    """`fast_sampler` whose particles are weighted however many values y has."""
    by_root = lambda vectors, r: (vectors / (r != 0).flatten(1).sum(1).clamp_min(1)).clamp_max(1).sqrt()  # noqa: E731
    with patch("ldm.particles.trusted", by_root):
        yield from fast_sampler(*args, **settings)


def method(name, sampler, p, label):
    return Method(name, sampler, lambda n, task: dict(particles=p, evaluations=n, **task.noise), label=f"fast, {p} {label}")


ALL = {"fast": METHODS["fast"]}
ALL |= {f"particles-{p}": method(f"particles-{p}", fast_sampler, p, "particles") for p in (4, 16, 64)}
ALL |= {f"weighted-{p}": method(f"weighted-{p}", weighted, p, "weighted particles") for p in (4, 16, 64)}
MEASURES = {"residual": "measurement RMSE", "psnr": "PSNR, dB", "lpips": "LPIPS", "accuracy": "label accuracy", "spread": "spread",
            "crps": "CRPS"}  # fmt: skip
ENDS = ("", "_low", "_high", "_minus", "_minus_low", "_minus_high")  # the last three: minus fast
KEY = ["model", "task", "method", "budget", "images", "samples"]
COLUMNS = [*KEY, "nfe", *(m + end for m in MEASURES for end in ENDS)]


def several(task, count):
    """The task with `count` samples of every image in a row, of one y: a seed for each."""
    many = copy.copy(task)
    many.images, many.y = (v.repeat_interleave(count, 0) for v in (task.images, task.y))
    many.numbers = [number + 1_000_000 * i for number in task.numbers for i in range(count)]
    return many


def spread(x):
    """[N, P, ...] -> [N]: root of the unbiased variance among P samples, mean over pixels."""
    return x.var(1).flatten(1).mean(1).sqrt()


def crps(x, truth):
    """Samples [N, P, ...] of truths [N, ...] -> [N]: of a pixel, the estimate without bias, mean over pixels."""
    P = x.shape[1]
    x, at = x.sort(1).values, torch.arange(P).view(-1, *[1] * (x.ndim - 2))
    apart = 2 * ((2 * at - P + 1) * x).sum(1) / (P * (P - 1))  # mean |x_i - x_j|, of sorted samples
    return ((x - truth[:, None]).abs().mean(1) - apart / 2).flatten(1).mean(1)


def measured(model, task, x):
    """{measure: [images]} of samples [images, samples, ...], means over the samples."""
    each = [model.measure(part, task) for part in x.unbind(1)]
    values = {m: torch.stack([v[m] for v in each]).double().mean(0) for m in MEASURES if m in each[0]}
    images = torch.stack([task.to_images(part) for part in x.unbind(1)], 1).clamp(-1, 1).cpu().double()
    return values | dict(spread=spread(images), crps=crps(images, task.images.cpu().double()))


def row_of(values, other):
    """Means with intervals over images, and those of the differences to `other`, on the images that both have."""
    row = {}
    for m, v in values.items():
        pairs = [v] if other is None else [v, (v[: len(other[m])] - other[m][: len(v)])]
        for d, ends in zip(pairs, (ENDS[:3], ENDS[3:]), strict=False):
            row |= dict(zip([m + end for end in ends], (d.mean().item(), *interval(d[bootstrap(len(d))].mean(1))), strict=True))
    return row


def number(row, name, signed=False):
    value, low, high = (float(row[name + end] or "nan") for end in ("", "_low", "_high"))
    if value != value:
        return ""
    sure = "**" if signed and not low <= 0 <= high else ""
    return f"{sure}{value:{'+' if signed else ''}.3g}{sure} [{low:.3g}, {high:.3g}]"


def tables(rows):
    lines = ["# Particles on images", "", "By `python benchmarks/compare_particles.py`, whose first lines say what is measured. "
             "Mean over images [95 % bootstrap interval over images]. Below: paired differences to fast, bold where the interval "
             "leaves out 0."]  # fmt: skip
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        own.sort(key=lambda row: (int(row["budget"]), list(ALL).index(row["method"])))
        shown = [m for m in MEASURES if any(row[m] not in ("", "nan") for row in own)]
        head = ["method", "budget", "evaluations", "images x samples", *(MEASURES[m] for m in shown)]
        for title, end, found in (("", "", own), (", minus fast", "_minus", [row for row in own if row["psnr_minus"]])):
            lines += ["", f"## {model}, {LABELS[task]}{title}", ""] if found else []
            lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] if found else []
            for row in found:
                cells = [ALL[row["method"]].label or row["method"], row["budget"], f"{float(row['nfe']):.0f}",
                         f"{row['images']} x {row['samples']}", *(number(row, m + end, bool(end)) for m in shown)]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist", choices=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=["half", "hole", "sr4", "blur"], choices=TASKS)
    parser.add_argument("--budgets", nargs="+", type=int, default=[44, 220], help="evaluations of D per sample")
    parser.add_argument("--methods", nargs="+", default=["fast", "particles-4", "weighted-4"], choices=list(ALL))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4, help="of each image, of fast")
    parser.add_argument("--report", action="store_true", help="sample nothing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="data")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if args.samples < 2:
        parser.error(f"--samples {args.samples}: give 2 or more")
    args.out.mkdir(parents=True, exist_ok=True)
    path, kept = args.out / "compare_particles.csv", Path("outputs/compare_particles")
    kept.mkdir(parents=True, exist_ok=True)
    device, done = resolve_device(args.device), {tuple(row[k] for k in KEY) for row in read(path)}
    model = None if args.report else MODELS[args.model](args.data, args.images, device)
    jobs = [] if args.report else [(t, m, b) for b in args.budgets for t in args.tasks for m in args.methods]
    for name, method, budget in (bar := tqdm(jobs)):
        count = args.samples if method == "fast" else int(method.split("-")[1])
        key = dict(zip(KEY, (args.model, name, method, budget, args.images, count), strict=True))
        if tuple(map(str, key.values())) in done:
            continue
        bar.set_description(f"{name}, {method}, {budget}")
        task = model.task(name)
        x, costs = run(several(task, count), *ALL[method](budget, task), max(32, count), device)
        values = measured(model, task, x.view(args.images, count, *x.shape[1:]))
        file = lambda m: kept / f"{args.model}-{name}-{m}-{budget}.pt"  # noqa: B023, E731
        torch.save(values, file(method))
        other = torch.load(file("fast"), weights_only=True) if method != "fast" and file("fast").is_file() else None
        append(path, key | dict(nfe=costs["nfe_forward"]) | row_of(values, other), COLUMNS)
    text = tables(read(path))
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
