"""What the parts of the particles are worth, and split Gibbs sampling instead of them: on the mixtures of posterior.py, d = 8.

    python benchmarks/posterior_ablation.py [--problems 6] [--budgets 220] [--variants ...]

Each variant changes one thing of `fast` with 16 particles and one vector; where d_y < 4, only some are measured. The problems,
draws and distances are those of posterior.py. Appends to --out/posterior_ablation.csv, skips rows that are there, and writes
posterior_ablation.md.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import posterior
from rows import append, read
from tqdm import tqdm

from ldm.baselines import solve_without_J
from ldm.comparison import Method
from ldm.fast_sampler import fast_sampler
from ldm.particles import trusted
from ldm.sampling import State

DEFAULT, WITHOUT, FULL = "16 particles, 1 vector", "no particles", "full weight"
GIBBS = "no particles, then split Gibbs"
VARIANTS = {
    DEFAULT: {},
    "4 particles": dict(particles=4),
    "64 particles": dict(particles=64),
    "256 particles": dict(particles=256),
    "2 vectors": dict(vectors=2),
    "4 vectors": dict(vectors=4),
    FULL: {},
    f"2 vectors, {FULL}": dict(vectors=2),
    WITHOUT: dict(particles=1),
    GIBBS: {},
}


def split_gibbs(D, constraint, shape, seeds, noise, evaluations, sigma_y, start=44, inner=8):
    """Split Gibbs sampling (Vono et al. 2019) that begins with samples of `fast` at `start` evaluations.

    rho falls from 1 to 0.05. Each sweep draws z from N(z; x, rho^2 I) N(y; A z, sigma_y^2 I), exactly, and x from its distribution
    given z = x + rho n: by `inner` ancestral steps from the noise level rho, without y.
    """
    for state in fast_sampler(D, constraint, shape, seeds, noise=noise, evaluations=start, sigma_y=sigma_y):  # noqa: B007
        pass
    x, sweeps = state.x_t, (evaluations - start) // inner
    for i in range(sweeps):
        first = 0.05 ** (i / max(sweeps - 1, 1))
        levels = D.schedule.log_levels(inner + 1, first=first, last=first / 8)[1:]
        rho = levels[0].sigma / levels[0].alpha
        z = x + rho * noise()
        A, r = constraint.linearised(z)
        r = r - sigma_y * noise().flatten(1)[:, : r[0].numel()].view_as(r)
        x = levels[0].alpha * (z + solve_without_J(A, r, rho**2, sigma_y**2))
        for now, to in pairwise(levels):
            x = D.schedule.step(x, D(x, now.t), now, to, 1.0, noise)
    yield State(sweeps, 0, x, x, None, 0)


def method(name):
    sampler, given = (split_gibbs, {}) if name == GIBBS else (fast_sampler, dict(particles=16, vectors=1) | VARIANTS[name])
    return Method(name, sampler, lambda n, task: dict(evaluations=n, **given, **task.noise), label=name)


def table(rows):
    lines = ["# Particles, one part at a time", "", "By `python benchmarks/posterior_ablation.py`, whose first lines say what is "
             "measured: sliced Wasserstein distance to the posterior, ± 1.96 standard errors.", "",
             "| variant | budget | evaluations | d_y = 1 | d_y = 2 | d_y = 4 |", "|---|---|---|---|---|---|"]  # fmt: skip
    exact = [next((f"{float(r['exact']):.2f}" for r in rows if r["d_y"] == d_y), "") for d_y in "124"]
    lines.append("| two exact draws | | | " + " | ".join(exact) + " |")
    for budget in sorted({int(row["budget"]) for row in rows}):
        for name in VARIANTS:
            same = {r["d_y"]: r for r in rows if (r["method"], r["budget"]) == (name, str(budget))}
            if same:
                spent = max(posterior.nfe(r) for r in same.values())
                cells = [name, str(budget), f"{spent:.0f}", *(posterior.cell(same.get(k)) for k in "124")]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--budgets", nargs="+", type=int, default=[220])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "posterior_ablation.csv"
    some = {DEFAULT, WITHOUT, GIBBS}
    settings = [(b, k, name) for b in args.budgets for k in (4, 2, 1) for name in args.variants if k == 4 or name in some]
    for budget, d_y, name in (bar := tqdm(settings)):
        key = dict(part="ablation", d=8, d_y=d_y, method=name, budget=budget)
        there = any(all(row[k] == str(v) for k, v in key.items()) for row in read(path))
        if there:
            continue
        bar.set_description(f"d_y = {d_y}, {name}, {budget}")
        with patch("ldm.particles.trusted", (lambda vectors, r: 1.0) if FULL in name else trusted):
            append(path, key | posterior.mixture_row(8, d_y, method(name), budget, args.problems, 1024), posterior.COLUMNS)
    path.with_suffix(".md").write_text(table(read(path)))


if __name__ == "__main__":
    main()
