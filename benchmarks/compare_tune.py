"""Twelve settings of every method on images that are not in the comparison: which is the best one for the task?

    python benchmarks/compare_tune.py [--models mnist tiny tiny-flow] [--tasks half hole ...] [--methods newton DPS ...]
                                      [--budgets 44 220] [--images 16]

GRIDS has the twelve settings of each method, around those of its paper; `fast` has twelve too. Methods without such a setting
(azula's MMPS, PGDM and TMPD, deepinv's PiGDM) are left out, and so are other packages' copies of methods that are here already.
The images follow those of compare.py: digits from 7,000 on, held-out emoji from the 129th on. The best one has the lowest LPIPS.

Adds one row per (model, task, method, budget, setting) to --out/compare_tune.csv, and skips rows that are there. compare.py has a
method `NAME-tuned` for each NAME here, with the best setting in that table for its model, task and budget.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import foreign
import rows as csv_rows
from compare_tasks import MODELS, TASKS
from tqdm import tqdm

from ldm.comparison import METHODS, Method, run
from ldm.fast_sampler import steps_for
from ldm.metrics import lpips_weights
from ldm.util import resolve_device

FILE = "compare_tune.csv"
COLUMNS = ["model", "task", "method", "budget", "images", "setting", "lpips"]


def _grid(**values):
    """All combinations of the values."""
    return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]


LR = [0.05, 0.1, 0.2, (0.5, 0.1)]  # the last one falls over the inner steps
GRIDS = {
    "newton": _grid(lr=LR, eta=[0.0, "paper", 1.0]),
    "fast": _grid(strength=[1.5, 2.3, 3.0], late=[0.3, 0.6], fresh=[0.7, 0.85]),
    "gradient": _grid(lr=LR, eta=[0.0, 0.5, 1.0]),
    "DPS": _grid(zeta=[0.25, 0.5, 1.0, 2.0, 4.0, 8.0], eta=[0.5, 1.0]),
    "PSLD": _grid(omega=[0.5, 1.0, 2.0, 4.0], gamma=[0.05, 0.1, 0.5]),
    "MPGD": _grid(scale=[0.25, 0.5, 1.0, 1.5], eta=[0.0, 0.5, 1.0]),
    "DDNM": _grid(eta=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 1.0]),
    "RePaint": _grid(resamples=[1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 20]),
    "DiffPIR": _grid(weight=[1.0, 3.0, 7.0, 15.0], zeta=[0.1, 0.3, 0.9]),
    "LATINO": _grid(delta=[0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]),
    "DAPS": _grid(lr=[2e-5, 5e-5, 1e-4, 2e-4], beta=[0.005, 0.01, 0.03]),
    "ReSample": _grid(gamma=[4.0, 13.0, 40.0, 130.0], every=[1, 2, 4]),
    "SITCOM": _grid(lr=[0.05, 0.1, 0.2, 0.4], weight=[0.0, 0.1, 1.0]),
    "PnP-Flow": _grid(power=[0.01, 0.1, 0.3, 0.5, 0.8, 1.2], samples=[1, 2]),
    "FlowDPS": _grid(gradient_steps=[1, 3, 10], length=[0.01, 0.04, 0.1, 0.2]),
    "FLAIR": _grid(last=[0.02, 0.05, 0.1, 0.14, 0.18, 0.22, 0.26, 0.3, 0.35, 0.4, 0.5, 0.6]),
    "deepinv-DDRM": _grid(eta=[0.5, 0.7, 0.85, 1.0], etab=[0.5, 0.8, 1.0]),
}
METHODS_HERE = {name: method for name, method in (METHODS | foreign.OTHERS).items() if name in GRIDS}


def with_setting(method, n, task, setting):
    """(sampler, settings) of a method at a budget with the setting in place of its own, at the same number of evaluations; None
    where it does not apply."""
    chosen = method(n, task)
    if chosen is None:
        return None
    sampler, settings = chosen
    settings = settings | setting
    if "late" in setting:  # fewer steps with J make more steps
        settings["steps"] = steps_for(n, task.schedule, late=setting["late"])
    if "resamples" in setting:  # each step is taken so many times, but the last once
        settings["steps"] = (n + setting["resamples"] - 1) // setting["resamples"]
    if "samples" in setting:  # of PnP-Flow at each step, but one at the first
        settings["steps"] = 1 + (n - 1) // setting["samples"]
    return sampler, settings


def best(path, model, task, method, budget):
    """The setting with the lowest LPIPS in the table; None where it has no row."""
    found = [row for row in csv_rows.read(path) if [row[k] for k in COLUMNS[:4]] == [model, task, method, str(budget)]]
    return json.loads(min(found, key=lambda row: float(row["lpips"]))["setting"]) if found else None


@dataclass(frozen=True)
class Tuned:
    """A method with the best setting of the table `path`; called as a Method. Rows that the table lacks do not apply."""

    method: Method
    path: Path
    model: str

    def __call__(self, budget, task):
        setting = best(self.path, self.model, task.name, self.method.name, budget)
        return None if setting is None else with_setting(self.method, budget, task, setting)


def tuned(path, model):
    """{NAME-tuned: Tuned} of a model."""
    return {f"{name}-tuned": Tuned(method, path, model) for name, method in METHODS_HERE.items()}


LABELS = {f"{name}-tuned": f"{method.label or name}, tuned" for name, method in METHODS_HERE.items()}


def quality(task, chosen, device):
    """Mean LPIPS of a task's images; 1 for those that a method makes NaN of."""
    try:
        x, _ = run(task, *chosen, len(task.images), device)
    except FloatingPointError:
        return 1.0
    return task.measure(task.to_images(x))["lpips"].nan_to_num(1.0).mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mnist"], choices=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS_HERE), default=list(METHODS_HERE), metavar="METHOD",
                        help=", ".join(METHODS_HERE))  # fmt: skip
    parser.add_argument("--budgets", nargs="+", type=int, default=[44], help="network evaluations, 20 to 1000")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="data", help="folder of the images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if lpips_weights() is None:
        parser.error("AlexNet's weights are missing: `make data-lpips` fetches them")
    device, path = resolve_device(args.device), args.out / FILE
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        model = MODELS[name](args.data, args.images, device, tuning=True)
        jobs = list(product(args.budgets, args.tasks, args.methods))
        for budget, task_name, method in (bar := tqdm(jobs, desc=name)):
            task = model.task(task_name)
            for setting in GRIDS[method]:
                row = dict(model=name, task=task_name, method=method, budget=budget, images=args.images)
                row |= dict(setting=json.dumps(setting))
                if any(all(other[k] == str(v) for k, v in row.items()) for other in csv_rows.read(path)):
                    continue
                chosen = with_setting(METHODS_HERE[method], budget, task, setting)
                if chosen is None:
                    break
                bar.set_description(f"{name}, {task_name}, {method}, {budget}")
                csv_rows.append(path, row | dict(lpips=quality(task, chosen, device)), COLUMNS)


if __name__ == "__main__":
    main()
