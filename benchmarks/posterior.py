"""Methods where the posterior is known: mixtures of Gaussians, and Gaussians with the covariance of images.

    python benchmarks/posterior.py [--parts mixture gaussian w2 nonlinear] [--dims 8 80 800] [--budgets 44 220 ...]
                                   [--methods particles-16 fast ...] [--seconds 300] [--report] [--quick]

Without arguments: the rows of the committed table, see PLAN.

mixture   The problems of Cardoso et al., "Monte Carlo guided diffusion for Bayesian linear inverse problems" (ICLR 2024), as their
          code makes them: 25 Gaussians of unit covariance in d dimensions (`lattice`), A [d_y, d] with random orthonormal bases and
          singular values uniform in [0, 1], sigma_y uniform in [0, 1] times the largest. D gets the data divided by 11.36, their
          deviation for even weights. The sliced Wasserstein distance (W1, 100 directions) of the samples to as many exact draws is
          in the units above, with 1.96 standard errors over the problems.
gaussian  Images of 32x32 with the covariance exp(-distance / 6). Coverage: how often a pixel of the truth lies between its 4th and
          36th, and its 10th and 30th, of 39 samples: .8 and .5 for an exact sampler. Pixels that are known exactly do not count.
w2        The same for images of 8x8: the exact distance W2 (`gaussian_w2`) between the posterior and the Gaussian with the mean and
          the covariance of 1,024 samples, divided by 8 = sqrt(pixels). The estimate is never 0: exact draws have that of their row.
          Samples of a linear method are Gaussian; those of others are at least that far away.
nonlinear The mixture with d = 8, d_y = 2 and y = |A x_0| + noise, or y = clip(A x_0, -0.5, 0.5) + noise, sigma_y = .57 in the units
          above. The truth are 200,000 draws of the prior, weighted by their likelihood.

Budgets count forward and backward evaluations of D. 1,000 is the largest: the schedule has 1,000 levels, most methods take one step
for each, and `fast` at most 200 (`nfe` is what was spent). Large budgets have fewer problems, see PROBLEMS.

Appends one row per setting to --out/posterior.csv and skips rows that are there: an interrupted run goes on. --seconds: begin no
row after so much time. Then writes posterior.md and posterior.png. --quick: a few rows, into outputs/posterior-quick.
"""

import argparse
import functools
import time
from pathlib import Path
from unittest.mock import patch

import foreign
import matplotlib
import torch
from rows import append, read
from tqdm import tqdm

from ldm.comparison import METHODS, EvaluationCounter, Method
from ldm.fast_sampler import fast_sampler
from ldm.mixture import Mixture, gaussian_w2, lattice, sliced_wasserstein
from ldm.nonlinear import NonlinearOperator, measurement
from ldm.operators import Mask, Separable, downsample, gaussian_blur, measure
from ldm.problems import PROBLEMS as IMAGE_PROBLEMS
from ldm.schedules import DiffusionSchedule, make_beta_schedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SCHEDULE = DiffusionSchedule(make_beta_schedule("sqrt_linear", 1000))
SCALE = 129**-0.5
PARTICLES = {
    f"particles-{p}": Method(
        f"particles-{p}",
        fast_sampler,
        lambda n, task, p=p: dict(particles=p, evaluations=n, **task.noise),
        label=f"fast, {p} particles",
    )
    for p in (16, 256)
}
# Left out: RePaint, for masks only; PSLD, for decoders; azula's DPS, which is ours to rounding; deepinv's DPS and DiffPIR, which
# clip x0 to [-1, 1].
OURS = {name: METHODS[name] for name in ("fast", "newton", "newton-eta1", "gradient", "DPS", "MPGD", "DDNM", "DiffPIR")}
THEIRS = ("azula-PGDM", "azula-TMPD", "azula-MMPS", "azula-DiffPIR", "deepinv-PiGDM", "deepinv-DDRM")
ALL = PARTICLES | OURS | {name: foreign.OTHERS[name] for name in THEIRS if name.split("-")[0] not in foreign.MISSING}
SHOWN = {"particles-16": "#d62728", "particles-256": "#7f1d1d", "fast": "#e08214", "newton": "#1f4e9c", "DPS": "#2a8c4a"}
MAIN = [n for n in ("particles-16", "particles-256", "fast", "newton", "DPS", "DDNM", "azula-MMPS") if n in ALL]

# the rows of the committed table; d: {budget: methods}
PLAN = {
    8: {10: [n for n in ALL if n not in PARTICLES], 20: MAIN, 44: list(ALL), 100: MAIN, 220: MAIN, 1000: MAIN},
    80: {20: MAIN, 44: MAIN, 100: MAIN, 220: MAIN, 1000: MAIN},
    800: {44: MAIN, 220: MAIN},
}
# d: how many up to 220 evaluations; above, for `fast` with and without particles, and for the others
PROBLEMS = {8: (20, 20, 8), 80: (20, 6, 6), 800: (6, 2, 2)}
SAMPLES = {8: 1024, 80: 1024, 800: 256}
PARTS = ["mixture", "gaussian", "w2", "nonlinear"]
COLUMNS = "part d d_y method budget problems failed samples nfe_forward nfe_backward distance error exact cover50 cover80".split()


class Problem:
    """A measurement y = A x_0 + sigma_y n of a draw of a prior, as the settings of methods ask for it (ldm.comparison.Task).

    shape, of one sample [C, H, W]; n samples of it are asked for.
    """

    linear, first_stage, encode = True, None, None

    def __init__(self, prior, A, shape, sigma_y, seed):
        self.A, self.shape, self.sigma_y, self.noise, self.schedule = A, shape, sigma_y, dict(sigma_y=sigma_y), SCHEDULE
        self.D, self.truth = prior.denoiser(SCHEDULE), prior.sample(1, generator(seed)).view(1, *shape)
        self.y = measure(A, self.truth, sigma_y, [seed + 1])

    def sample(self, method, budget, n, seed):
        """n samples [n, d] and the evaluations of D, forward and backward; None where they are not finite."""
        sampler, settings = method(budget, self)
        D, g, shape = EvaluationCounter(self.D), generator(seed), (n, *self.shape)
        constraint = measurement(self.A, self.y.float().expand(n, *self.y.shape[1:]))
        noise = lambda: torch.randn(shape, generator=g)  # noqa: E731
        theirs = sampler.__module__ == "foreign"
        given = dict(seeds=range(n)) if theirs else dict(seeds=None, noise=noise)
        try:
            # one generator for all samples instead of one for each: most of the time otherwise
            with patch.object(foreign, "seeded_noise", lambda *args: noise):
                for state in sampler(D, constraint, shape, **given, **settings):  # noqa: B007
                    pass
            x = state.x_t.flatten(1) if torch.isfinite(state.x_t).all() else None
        except FloatingPointError:
            x = None
        return x, D.forward / n, D.backward / n


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---- mixtures


def mixture_problem(d, d_y, seed, function=None, sigma_y=None):
    """(Problem, its exact posterior). With a function of A x the posterior is None."""
    g = generator(1000 * d_y + seed)
    prior = lattice(d, g, SCALE)
    U, _, Vt = torch.linalg.svd(torch.randn(d_y, d, generator=g, dtype=torch.float64), full_matrices=False)
    singular = torch.rand(d_y, generator=g, dtype=torch.float64)
    A = U * singular @ Vt
    if function is not None:
        rows = Separable(A, torch.ones(1, 1, dtype=torch.float64))
        return Problem(prior, NonlinearOperator(lambda x: function(rows(x))), (1, d, 1), sigma_y, seed), None
    sigma_y = SCALE * float(torch.rand((), generator=g, dtype=torch.float64) * singular.max())
    problem = Problem(prior, Separable(A, torch.ones(1, 1, dtype=torch.float64)), (1, d, 1), sigma_y, seed)
    return problem, prior.posterior(A, problem.y.flatten(), sigma_y)


def distances(problems, samples, method, budget, make):
    """What a row says of so many problems; make: seed -> (Problem, two sets of exact draws)."""
    found, exact = [], []
    for seed in range(problems):
        problem, truth, other = make(seed)
        x, forward, backward = problem.sample(method, budget, samples, seed + 502)
        exact.append(sliced_wasserstein(truth, other) / SCALE)
        if x is not None:
            found.append(sliced_wasserstein(x, truth) / SCALE)
    found, exact = torch.tensor(found or [torch.nan]), torch.tensor(exact)
    return dict(problems=problems, failed=problems - int(found.isfinite().sum()), samples=samples, nfe_forward=forward,
                nfe_backward=backward, distance=found.mean().item(), error=1.96 * found.std().item() / len(found) ** 0.5,
                exact=exact.mean().item())  # fmt: skip


def mixture_row(d, d_y, method, budget, problems, samples):
    def make(seed):
        problem, posterior = mixture_problem(d, d_y, seed)
        return problem, *(posterior.sample(samples, generator(seed + k)) for k in (500, 501))

    return distances(problems, samples, method, budget, make)


FUNCTIONS = {"magnitude": torch.abs, "clipped": lambda y: y.clamp(-0.5, 0.5)}


def nonlinear_row(kind, method, budget, problems, samples):
    def make(seed):
        problem, _ = mixture_problem(8, 2, seed, FUNCTIONS[kind], 0.05)
        x = problem.D.prior.sample(200_000, generator(seed + 500))
        r = (problem.y - problem.A(x.view(-1, *problem.shape))).flatten(1)
        weights = (-0.5 * (r / problem.sigma_y).square().sum(1)).softmax(0)
        chosen = torch.multinomial(weights, 2 * samples, replacement=True, generator=generator(seed + 501))
        return problem, *x[chosen].chunk(2)

    return distances(problems, samples, method, budget, make)


# ---- a Gaussian with the covariance of images


@functools.cache
def image_prior(side=32, length=6.0):
    at = torch.cartesian_prod(*[torch.arange(float(side), dtype=torch.float64)] * 2)
    return Mixture(torch.ones(1), torch.zeros(1, side**2), torch.exp(-torch.cdist(at, at) / length))


def image_operators(side=32):
    """{name: (A, sigma_y)}"""
    half, hole = (IMAGE_PROBLEMS[name](side) for name in ("half", "hole"))
    return {"half": (half, 0.0), "hole": (hole, 0.0), "sr4": (downsample((side, side), 4), 0.0),
            "noisy blur": (gaussian_blur((side, side), 1.5), 0.1)}  # fmt: skip


def covered(x, truth, free):
    """The shares of the pixels `free` of a truth between the 10th and 30th, and the 4th and 36th, of 39 samples [39, d]."""
    rank = (x < truth.flatten()).sum(0)[free]  # 0 .. 39, evenly if exact
    return [((rank >= k) & (rank <= 39 - k)).double().mean().item() for k in (10, 4)]


def gaussian_row(task, method, budget, problems):
    (A, sigma_y), prior, inside = image_operators()[task], image_prior(), []
    for seed in range(problems):
        problem = Problem(prior, A, (1, 32, 32), sigma_y, seed)
        x, forward, backward = problem.sample(method, budget, 48, seed + 502)
        if x is not None:
            inside.append(covered(x[:39], problem.truth, A.mask.flatten() == 0 if isinstance(A, Mask) else slice(None)))
    inside = torch.tensor(inside or [[torch.nan] * 2])
    return dict(problems=problems, failed=problems - len(inside), samples=39, nfe_forward=forward, nfe_backward=backward,
                cover50=inside[:, 0].mean().item(), cover80=inside[:, 1].mean().item(),
                error=1.96 * inside[:, 1].std().item() / len(inside) ** 0.5)  # fmt: skip


def w2_row(task, method, budget, problems, samples=1024):
    (A, sigma_y), prior, found = image_operators(8)[task], image_prior(8), []
    rows = A(torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)).flatten(1).T  # A [m, 64]
    distance = lambda x, truth: gaussian_w2(x.mean(0), torch.cov(x.T), truth.means[0], truth.cov) / 8  # noqa: E731
    exact = torch.zeros(problems)
    for seed in range(problems):
        problem = Problem(prior, A, (1, 8, 8), sigma_y, seed)
        truth = prior.posterior(rows, problem.y.flatten(), sigma_y)
        x, forward, backward = problem.sample(method, budget, samples, seed + 502)
        exact[seed] = distance(truth.sample(samples, generator(seed + 500)), truth)
        if x is not None:
            found.append(distance(x.double(), truth))
    found = torch.tensor(found or [torch.nan])
    return dict(problems=problems, failed=problems - int(found.isfinite().sum()), samples=samples, nfe_forward=forward,
                nfe_backward=backward, distance=found.mean().item(), error=1.96 * found.std().item() / len(found) ** 0.5,
                exact=exact.mean().item())  # fmt: skip


# ---- rows, table, figure


def label(name):
    return ALL[name].label or name


def nfe(row):
    return float(row["nfe_forward"]) + float(row["nfe_backward"])


def tables(rows):
    lines = ["# Where the posterior is known", "", "By `python benchmarks/posterior.py`, whose first lines say what is measured."]
    found = [row for row in rows if row["part"] == "mixture"]
    for d in sorted({int(row["d"]) for row in found}):
        own = [row for row in found if int(row["d"]) == d]
        columns = sorted({int(row["d_y"]) for row in own})
        lines += ["", f"## Mixture, d = {d}: sliced Wasserstein distance to the posterior, ± 1.96 standard errors", "",
                  "| method | budget | evaluations | problems | " + " | ".join(f"d_y = {k}" for k in columns) + " |",
                  "|" + "---|" * (4 + len(columns))]  # fmt: skip
        exact = [[float(r["exact"]) for r in own if int(r["d_y"]) == k and int(r["budget"]) <= 220] for k in columns]
        lines.append("| two exact draws | | | | " + " | ".join(f"{max(e):.2f}" if e else "" for e in exact) + " |")
        for budget in sorted({int(row["budget"]) for row in own}):
            for name in ALL:
                same = {int(r["d_y"]): r for r in own if r["method"] == name and int(r["budget"]) == budget}
                if same:
                    spent = sorted({f"{nfe(r):.0f}" for r in same.values()}, key=int)
                    cells = [label(name), str(budget), " to ".join(dict.fromkeys((spent[0], spent[-1]))),
                             next(iter(same.values()))["problems"], *map(cell, map(same.get, columns))]  # fmt: skip
                    lines.append("| " + " | ".join(cells) + " |")
    found = [row for row in rows if row["part"] in ("gaussian", "w2")]
    if found:
        tasks = list(dict.fromkeys(row["d"] for row in found))
        lines += ["", "## Gaussian images: coverage of the 50 % and 80 % intervals of a pixel, and W2 to the posterior", "",
                  "| method | budget | " + " | ".join(f"{t}: coverage | W2" for t in tasks) + " |",
                  "|" + "---|" * (2 + 2 * len(tasks))]  # fmt: skip
        exact = {r["d"]: float(r["exact"]) for r in found if r["part"] == "w2"}
        lines.append(
            "| exact draws | | " + " | ".join(f"0.50, 0.80 | {exact[t]:.3f}" if t in exact else " | " for t in tasks) + " |"
        )
        order = sorted({(int(row["budget"]), list(ALL).index(row["method"])) for row in found})
        for budget, name in ((str(budget), list(ALL)[i]) for budget, i in order):
            cells = []
            for t in tasks:
                same = {r["part"]: r for r in found if (r["d"], r["method"], r["budget"]) == (t, name, budget)}
                inside, far = same.get("gaussian"), same.get("w2")
                cells += [f"{float(inside['cover50']):.2f}, {float(inside['cover80']):.2f}" if inside else "", cell(far, 3)]
            lines.append(f"| {label(name)} | {budget} | " + " | ".join(cells) + " |")
    found = [row for row in rows if row["part"] == "nonlinear"]
    if found:
        lines += ["", "## Mixture, d = 8, non-linear measurements: sliced Wasserstein distance to the posterior", "",
                  "| method | budget | problems | " + " | ".join(FUNCTIONS) + " |", "|---|---|---|---|---|"]  # fmt: skip
        exact = [max((float(r["exact"]) for r in found if r["d"] == kind), default=float("nan")) for kind in FUNCTIONS]
        lines.append("| two exact draws | | | " + " | ".join(f"{e:.2f}" for e in exact) + " |")
        for name, budget in dict.fromkeys((row["method"], row["budget"]) for row in found):
            same = {r["d"]: r for r in found if (r["method"], r["budget"]) == (name, budget)}
            cells = [label(name), budget, next(iter(same.values()))["problems"], *map(cell, map(same.get, FUNCTIONS))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(row, digits=2):
    """A distance with its error, and how many problems ended without finite samples."""
    if row is None:
        return ""
    failed = f" ({row['failed']} failed)" if int(row["failed"]) else ""
    return f"{float(row['distance']):.{digits}f} ± {float(row['error']):.{digits}f}{failed}"


def figure(rows, path):
    rows = [row for row in rows if row["part"] == "mixture"]
    dims, sizes = (sorted({int(row[k]) for row in rows}) for k in ("d", "d_y"))
    dims = [d for d in dims if len({row["budget"] for row in rows if int(row["d"]) == d}) > 1] or dims  # one budget is no curve
    fig, axes = plt.subplots(len(dims), len(sizes), figsize=(3.4 * len(sizes), 2.7 * len(dims) + 0.6), squeeze=False,
                             sharex=True, layout="constrained")  # fmt: skip
    for ax, (d, d_y) in zip(axes.flat, [(d, k) for d in dims for k in sizes], strict=True):
        own = [row for row in rows if (int(row["d"]), int(row["d_y"])) == (d, d_y)]
        for name, colour in SHOWN.items():
            found = sorted((row for row in own if row["method"] == name and row["distance"] != "nan"), key=nfe)
            if found:
                x, y, e = ([f(row) for row in found] for f in (nfe, lambda r: float(r["distance"]), lambda r: float(r["error"])))
                wide = name.startswith("particles")
                ax.plot(x, y, "o-", color=colour, label=label(name), lw=2.6 if wide else 1.5, ms=5 if wide else 3.5)
                ax.fill_between(x, [max(a - b, 1e-3) for a, b in zip(y, e, strict=True)],
                                [a + b for a, b in zip(y, e, strict=True)], color=colour, alpha=0.1, lw=0)  # fmt: skip
        exact = [float(row["exact"]) for row in own if int(row["budget"]) <= 220]
        if exact:
            ax.axhline(max(exact), color="black", ls=(0, (4, 3)), lw=1, label="two exact draws")
        ax.set(xscale="log", yscale="log", title=f"d = {d}, d_y = {d_y}", ylim=(0.04, 12))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.25, lw=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    fig.supxlabel("evaluations of D (forward + backward) per sample", fontsize=10)
    fig.supylabel("sliced Wasserstein distance to the posterior", fontsize=10)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def jobs(args):
    """The settings to measure, the smallest budgets first: (key of the row, function that makes it)."""
    few = 2 if args.quick else 12
    for budget in sorted(args.budgets or {budget for d in args.dims for budget in PLAN[d]}):
        for d in args.dims if "mixture" in args.parts else []:
            planned = MAIN if args.budgets else PLAN[d].get(budget, [])
            for d_y, name in [(d_y, name) for d_y in (1, 2, 4) for name in args.methods or planned]:
                n = PROBLEMS[d][0 if budget <= 220 else 1 if name in ("fast", *PARTICLES) else 2]
                n, samples = (2, 256) if args.quick else (n, SAMPLES[d])
                key = dict(part="mixture", d=d, d_y=d_y, method=name, budget=budget)
                yield key, lambda d=d, d_y=d_y, m=ALL[name], b=budget, n=n, s=samples: mixture_row(d, d_y, m, b, n, s)
        methods = [name for name in args.methods or MAIN if name in MAIN and name != "particles-256"]
        for task, name in [(t, m) for t in image_operators() for m in methods if budget == 44]:
            key = dict(d=task, d_y="", method=name, budget=budget)
            if "gaussian" in args.parts:
                yield dict(part="gaussian") | key, lambda t=task, m=ALL[name], b=budget: gaussian_row(t, m, b, few)
            if "w2" in args.parts:
                yield dict(part="w2") | key, lambda t=task, m=ALL[name], b=budget: w2_row(t, m, b, min(few, 4))
        methods = [m for m in args.methods or ALL if m in ("fast", "particles-16", "newton", "newton-eta1", "gradient")]
        for kind, name in [(k, m) for k in FUNCTIONS for m in methods if "nonlinear" in args.parts and budget == 44]:
            key = dict(part="nonlinear", d=kind, d_y=2, method=name, budget=budget)
            yield key, lambda k=kind, m=ALL[name], b=budget: nonlinear_row(k, m, b, few, 1024)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--dims", nargs="+", type=int, default=[8, 80, 800], choices=list(PROBLEMS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[], help="evaluations of D; default: PLAN")
    parser.add_argument("--methods", nargs="+", default=[], choices=list(ALL), metavar="METHOD", help=", ".join(ALL))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so much time")
    parser.add_argument("--report", action="store_true", help="only write what follows from the rows")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if args.quick:
        args.out, args.dims, args.budgets = Path("outputs/posterior-quick"), [8], [44]
        args.methods = [name for name in args.methods or ALL if name in (*MAIN, "deepinv-DDRM")]
    if wrong := [n for n in args.budgets if not 10 <= n <= 1000]:
        parser.error(f"--budgets {wrong[0]}: give 10 to 1000 evaluations")
    args.out.mkdir(parents=True, exist_ok=True)
    path, start = args.out / "posterior.csv", time.monotonic()
    done = {tuple(row[k] for k in COLUMNS[:5]) for row in read(path)}
    left = [] if args.report else [job for job in jobs(args) if tuple(str(job[0][k]) for k in COLUMNS[:5]) not in done]
    for key, make in (bar := tqdm(left)):
        if time.monotonic() - start > args.seconds:
            break
        bar.set_description(" ".join(str(v) for v in key.values()))
        append(path, key | make(), COLUMNS)
    rows = read(path)
    (args.out / "posterior.md").write_text(tables(rows))
    if any(row["part"] == "mixture" for row in rows):
        figure(rows, args.out / "posterior.png")


if __name__ == "__main__":
    main()
