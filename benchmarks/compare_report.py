"""Table and figure of compare.csv."""

import csv

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from compare_tasks import MEASURES, bootstrap, kernels, kid  # noqa: E402

TITLES = {"half": "right half missing", "hole": "centre hole", "strokes": "brush strokes", "sparse": "90 % of pixels missing",
          "sr4": "x4 super-resolution", "blur": "blur, noise 0.05"}  # fmt: skip
NAMES = {"residual": "measurement RMSE", "psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "accuracy": "label accuracy",
         "kid": "KID"}  # fmt: skip
LOWER_IS_BETTER = {"residual", "lpips", "kid"}
QUANTILES = torch.tensor([0.025, 0.975], dtype=torch.float64)


def report(path, model, n, out, kept, reference):
    """compare-MODEL.md and -.png of this model's rows with n images; paired differences of what lies in the folder `kept`."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and int(row["images"]) == n]
    if not rows:
        return
    (out / f"compare-{model}.md").write_text("\n".join(table(rows, model, n, kept, reference)) + "\n")
    figure(rows, out / f"compare-{model}.png")
    print((out / f"compare-{model}.md").read_text())


def table(rows, model, n, kept, reference):
    measures = [m for m in (*MEASURES, "kid") if any(row[m] != "nan" for row in rows)]
    lines = [f"# {model}, {n} images", "",
             "Mean [95 % bootstrap interval over the images]. Evaluations: of the network, per image, forward + backward."]
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += ["", f"## {TITLES[task]}", "",
                  "| method | evaluations | s per image | " + " | ".join(NAMES[m] for m in measures) + " |",
                  "|" + "---|" * (3 + len(measures))]  # fmt: skip
        for row in sorted((r for r in rows if r["task"] == task), key=lambda r: float(r["nfe_forward"]) + float(r["nfe_backward"])):
            backward = f" + {float(row['nfe_backward']):.0f}" if float(row["nfe_backward"]) else ""
            cells = [row["method"], f"{float(row['nfe_forward']):.0f}{backward}", f"{float(row['seconds']):.2f}"]
            cells += [f"{float(row[m]):.3g} [{float(row[m + '_low']):.3g}, {float(row[m + '_high']):.3g}]" for m in measures]
            lines.append("| " + " | ".join(cells) + " |")
    return lines + differences(rows, model, n, kept, reference, measures)


def differences(rows, model, n, kept, reference, measures):
    """`fast` against the paper's loop at 220 evaluations in each of its settings, image by image."""
    load = lambda task, method, budget: kept / f"{model}-{n}-{task}-{method}-{budget}.pt".replace(" ", "_")  # noqa: E731
    lines = ["", "## fast minus the paper's loop at 220 evaluations, paired", "",
             "| task | evaluations | the paper's | " + " | ".join(NAMES[m] for m in measures) + " |",
             "|" + "---|" * (3 + len(measures))]  # fmt: skip
    draws, rules = bootstrap(n), len(lines)
    theirs_rows = [r for r in rows if r["method"].startswith("paper") and r["budget"] == "220"]
    pairs = ((a, b) for a in rows if a["method"] == "fast" for b in theirs_rows if b["task"] == a["task"])
    for row, other in sorted(pairs, key=lambda p: (p[0]["task"], p[1]["method"], int(p[0]["budget"]))):
        files = load(row["task"], "fast", row["budget"]), load(row["task"], other["method"], 220)
        if not all(f.is_file() for f in files):
            continue
        ours, theirs = (torch.load(f, weights_only=True) for f in files)
        cells = []
        for m in measures:
            if m == "kid":
                low, middle, high = _kid_difference(ours["features"], theirs["features"], reference, draws[:200])
            else:
                d = (ours[m] - theirs[m]).double()
                middle, (low, high) = d.mean().item(), torch.quantile(d[draws].mean(1), QUANTILES).tolist()
            worse = low > 0 if m in LOWER_IS_BETTER else high < 0
            better = high < 0 if m in LOWER_IS_BETTER else low > 0
            cells.append(f"{middle:+.3g} [{low:+.3g}, {high:+.3g}]{' worse' if worse else ' better' if better else ''}")
        lines.append(f"| {TITLES[row['task']]} | {float(row['nfe_forward']):.0f} | {other['method']} | {' | '.join(cells)} |")
    return lines if len(lines) > rules else []


def _kid_difference(ours, theirs, reference, draws):
    a, b = (kernels(f, reference) for f in (ours, theirs))
    everything = torch.arange(len(ours))
    samples = torch.tensor([kid(a, i) - kid(b, i) for i in draws]).double()
    low, high = torch.quantile(samples, QUANTILES).tolist()
    return low, kid(a, everything) - kid(b, everything), high


def figure(rows, path):
    """Quality against cost: one row of panels per task, one curve per method."""
    measures = [m for m in ("lpips", "kid", "accuracy", "residual") if any(row[m] != "nan" for row in rows)]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    fig, axes = plt.subplots(len(tasks), len(measures), figsize=(3.2 * len(measures), 2.5 * len(tasks) + 0.7), squeeze=False)
    colours = {method: plt.get_cmap("tab20").colors[i % 20] for i, method in enumerate(methods)}
    for task, line in zip(tasks, axes, strict=True):
        for measure, ax in zip(measures, line, strict=True):
            for method in methods:
                points = sorted((float(r["seconds"]), *(float(r[measure + s]) for s in ("", "_low", "_high"))) for r in rows
                                if r["task"] == task and r["method"] == method)  # fmt: skip
                if not points:
                    continue
                x, y, low, high = map(torch.tensor, zip(*points, strict=True))
                thick = 2.5 if method == "fast" else 1.2
                if measure == "residual":
                    y = y.clamp_min(1e-4)
                else:
                    ax.fill_between(x, low, high, color=colours[method], alpha=0.08, lw=0)
                ax.plot(x, y, "o-", ms=3.5, lw=thick, color=colours[method], label=method, zorder=3 if method == "fast" else 2)
            ax.set_xscale("log")
            if measure == "residual":
                ax.set_yscale("log")
            ax.grid(alpha=0.25, lw=0.5)
            if task == tasks[0]:
                ax.set_title(f"{NAMES[measure]}, {'lower' if measure in LOWER_IS_BETTER else 'higher'} is better", fontsize=9)
            if measure == measures[0]:
                ax.set_ylabel(TITLES[task], fontsize=9)
            if task == tasks[-1]:
                ax.set_xlabel("seconds per image", fontsize=9)
            ax.tick_params(labelsize=8)
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="upper center", ncols=min(len(handles), 5), fontsize=9, frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.55 / fig.get_figheight()))
    fig.savefig(path, dpi=110)
    plt.close(fig)
