"""compare.csv as a table, with paired differences, and as figures."""

import itertools

import foreign
import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

from ldm import comparison  # noqa: E402
from ldm.comparison import TASKS  # noqa: E402
from ldm.metrics import bootstrap, interval, kernel_parts, kid  # noqa: E402
from ldm.table import NAMES, evaluations, markdown, measures_in, table_head  # noqa: E402

LABELS = comparison.LABELS | {method.name: method.label for method in foreign.OTHERS.values()}
LOWER_IS_BETTER = {"residual", "lpips", "kid"}
FAMILIES = {  # family: (colour, its methods in the order of the line styles)
    "ours": ("#d62728", ["fast"]),
    "the paper's loop": ("#1f4e9c", ["newton", "newton-eta1"]),
    "back-propagating": ("#2a8c4a", ["gradient", "DPS", "PSLD"]),
    "without Jacobian": ("#e08214", ["DDNM", "MPGD", "DiffPIR", "RePaint"]),
    "azula, back-propagating": ("#7b3fa0", ["azula-MMPS", "azula-TMPD", "azula-PGDM", "azula-DPS"]),
    "azula, without Jacobian": ("#b9a032", ["azula-DiffPIR", "azula-RePaint"]),
    "deepinv": ("#4d4d4d", ["deepinv-PiGDM", "deepinv-DPS", "deepinv-DDRM", "deepinv-DiffPIR"]),
}
BACK_PROPAGATING = ["gradient", "DPS", "PSLD", *FAMILIES["azula, back-propagating"][1], "deepinv-PiGDM", "deepinv-DPS"]
LINES, MARKERS = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5))], "osD^"


def report(rows, name, model, out, file_of):
    """compare-NAME.md and the figures of this model's rows; file_of: row -> file of its samples, for paired differences."""
    rows = _most_images([row for row in rows if row["model"] == name])
    if not rows:
        return
    text = "\n".join(markdown(rows, name, model.features, LABELS) + differences(rows, model, file_of)) + "\n"
    (out / f"compare-{name}.md").write_text(text)
    curves(rows, out / f"compare-{name}.png")
    ranking(rows, out / f"compare-{name}-ranking.png")
    print(text)


def _most_images(rows):
    """Of rows with the same task, method and budget that with the most images; tasks in TASKS' order."""
    best = {}
    for row in sorted(rows, key=lambda row: int(row["images"])):
        best[row["task"], row["method"], row["budget"]] = row
    return sorted(best.values(), key=lambda row: list(TASKS).index(row["task"]))


def differences(rows, model, file_of):
    """Two tables of paired differences, image by image: `fast` minus the paper's loop at 220 evaluations in each of its settings,
    and minus every back-propagating method at equal time and at its dearest."""
    measures, lines = measures_in(rows), []
    of = lambda task, test: [r for r in rows if r["task"] == task and test(r)]  # noqa: E731
    ours = sorted((r for r in rows if r["method"] == "fast"), key=lambda r: int(r["budget"]))
    ours = [r for task in TASKS for r in ours if r["task"] == task]
    pairs = [(a, b) for a in ours for b in of(a["task"], lambda r: r["method"].startswith("newton") and r["budget"] == "220")]
    lines += _differences("fast minus the paper's loop at 220 evaluations, paired", "", pairs, measures, model, file_of)
    pairs = []
    for a in (r for r in ours if r["budget"] == "44"):
        for method in BACK_PROPAGATING:
            theirs = sorted(of(a["task"], lambda r, m=method: r["method"] == m), key=lambda r: float(r["seconds"]))
            equal = [r for r in theirs if float(r["seconds"]) >= 0.85 * float(a["seconds"])][:1]
            pairs += [(a, b) for b in (equal + theirs[-1:] if equal != theirs[-1:] else equal)]
    note = ("Each method at equal time (its cheapest row that takes at least .85 times as long as fast at 44 evaluations: "
            "so much do times vary from run to run) and its dearest row.")  # fmt: skip
    return lines + _differences("fast minus back-propagating methods, paired", note, pairs, measures, model, file_of)


def _differences(title, note, pairs, measures, model, file_of):
    lines = []
    for a, b in pairs:
        if not all(file_of(row).is_file() for row in (a, b)):
            continue
        ours, theirs = (torch.load(file_of(row), weights_only=True) for row in (a, b))
        n = min(len(ours["x"]), len(theirs["x"]))
        cells = []
        for m in measures:
            middle, (low, high) = _difference(ours, theirs, m, n, model.reference)
            worse, better = (low > 0, high < 0) if m in LOWER_IS_BETTER else (high < 0, low > 0)
            cells.append(f"{middle:+.3g} [{low:+.3g}, {high:+.3g}]{' worse' if worse else ' better' if better else ''}")
        costs = [f"{evaluations(r):.0f}, {float(r['seconds']):.3f} s" for r in (a, b)]
        lines.append(f"| {TASKS[a['task']]} | {costs[0]} | {LABELS[b['method']]}: {costs[1]} | {n} | {' | '.join(cells)} |")
    if not lines:
        return []
    return ["", f"## {title}", *(["", note] if note else []), "", *table_head("task | fast | the other | images", measures), *lines]


def _difference(ours, theirs, measure, n, reference):
    draws = bootstrap(n)
    if measure == "kid":
        a, b = (kernel_parts(values["features"][:n], reference) for values in (ours, theirs))
        return kid(a) - kid(b), interval(torch.tensor([kid(a, i) - kid(b, i) for i in draws[:200]]))
    d = (ours[measure][:n] - theirs[measure][:n]).double()
    return d.mean().item(), interval(d[draws].mean(1))


# ---- figures


def ranking(rows, path, budget="44", reference="220"):
    """The methods at one budget, the best on top, by LPIPS with its interval, or PSNR where LPIPS is missing. A panel for each task
    that at least two methods were run on; the dashed line is the paper's loop at the budget `reference`."""
    measure = "lpips" if "lpips" in measures_in(rows) else "psnr"
    panels = {t: [r for r in rows if r["task"] == t and r["budget"] == budget] for t in TASKS}
    panels = {t: found for t, found in panels.items() if len(found) > 1}
    if not panels:
        return
    across = min(3, len(panels))
    down, most = -(-len(panels) // across), max(map(len, panels.values()))
    size = 4.7 * across, down * (0.21 * most + 0.7) + 0.8
    fig, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    colour = {m: colour for colour, methods in FAMILIES.values() for m in methods}
    for ax, (task, found) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=(None, [])):
        if not found:
            ax.axis("off")
            continue
        found = sorted(found, key=lambda r: float(r[measure]), reverse=measure in LOWER_IS_BETTER)
        for y, r in enumerate(found):
            value, low, high = (float(r[measure + end]) for end in ("", "_low", "_high"))
            ax.plot([low, high], [y, y], color=colour[r["method"]], lw=2, alpha=0.45)
            ax.plot(value, y, "o", color=colour[r["method"]], ms=9 if r["method"] == "fast" else 5.5)
        for r in rows:
            if (r["task"], r["method"], r["budget"]) == (task, "newton", reference):
                ax.axvline(float(r[measure]), color=colour["newton"], ls=(0, (4, 3)), lw=1)
        ax.set_yticks(range(len(found)), [LABELS[r["method"]] for r in found], fontsize=8.5)
        for label, r in zip(ax.get_yticklabels(), found, strict=True):
            label.set(color=colour[r["method"]], fontweight="bold" if r["method"] == "fast" else "normal")
        values = [float(r[measure]) for r in found]
        if max(values) > 10 * min(values) > 0:
            _log_axis(ax.xaxis)
        ax.set_ylim(len(found) - most - 0.6, len(found) - 0.4)
        ax.set_title(TASKS[task], fontsize=11, fontweight="bold")
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", alpha=0.25, lw=0.5)
        ax.spines[["top", "right", "left"]].set_visible(False)
    present = {r["method"] for found in panels.values() for r in found}
    handles = [plt.Line2D([], [], color=c, marker="o", lw=2, label=f) for f, (c, ms) in FAMILIES.items() if present & set(ms)]
    handles += [
        plt.Line2D([], [], color=colour["newton"], ls=(0, (4, 3)), lw=1, label=f"the paper's loop, {reference} evaluations")
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    better = "lower" if measure in LOWER_IS_BETTER else "higher"
    fig.suptitle(f"{NAMES[measure]} at {budget} evaluations of the network, {better} is better", fontsize=12)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def curves(rows, path):
    """Quality against seconds: one row of panels per task, one curve per method, a colour for each family of methods."""
    measures, tasks = [m for m in ("lpips", "kid", "accuracy", "residual") if m in measures_in(rows)], {row["task"] for row in rows}
    tasks = [task for task in TASKS if task in tasks]
    present = {row["method"] for row in rows}
    families = {f: [m for m in methods if m in present] for f, (_, methods) in FAMILIES.items()}
    families = {f: methods for f, methods in families.items() if methods}
    size = 4.1 * len(measures), 3.0 * len(tasks) + 1.9
    fig, axes = plt.subplots(len(tasks), len(measures), figsize=size, squeeze=False, sharex=True)
    for ax in axes.flat:
        ax.tick_params(labelbottom=True)
    for task, line in zip(tasks, axes, strict=True):
        for measure, ax in zip(measures, line, strict=True):
            for family, methods in families.items():
                for method in methods:
                    _curve(ax, [r for r in rows if r["task"] == task and r["method"] == method], measure, family, method)
            _decorate(ax, measure, task if measure == measures[0] else None, task == tasks[-1])
            if task == tasks[0]:
                ax.set_title(f"{NAMES[measure]}  ({'lower' if measure in LOWER_IS_BETTER else 'higher'} is better)", fontsize=11)
    height = fig.get_figheight()
    fig.tight_layout(rect=(0, 0, 1, 1 - 1.35 / height))
    for i, (family, methods) in enumerate(families.items()):
        handles = [plt.Line2D([], [], **_style(family, m)) for m in methods]
        corner = 0.02 + 0.965 * i / len(families), 1 - 0.08 / height
        fig.legend(
            handles, [LABELS[m] for m in methods], title=family, loc="upper left", bbox_to_anchor=corner, fontsize=9,
            title_fontsize=9.5, frameon=False, handlelength=3.2, alignment="left")  # fmt: skip
    fig.savefig(path, dpi=100)
    plt.close(fig)


def _style(family, method):
    colour, methods = FAMILIES[family]
    i, ours = methods.index(method), family == "ours"
    return dict(color=colour, ls=LINES[i], marker=MARKERS[i], ms=6 if ours else 3.5, lw=3 if ours else 1.4, zorder=4 if ours else 2)


def _curve(ax, rows, measure, family, method):
    points = sorted((float(r["seconds"]), *(float(r[measure + end]) for end in ("", "_low", "_high"))) for r in rows)
    if not points:
        return
    x, y, low, high = zip(*points, strict=True)
    style = _style(family, method)
    if measure == "residual":
        y = [max(v, 1e-4) for v in y]  # what is met to rounding lies on the lower edge
    elif method in ("fast", "newton"):
        ax.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)
    ax.plot(x, y, **style)


def _decorate(ax, measure, task, lowest):
    _log_axis(ax.xaxis)
    values = [v for line in ax.lines for v in line.get_ydata()]
    if measure in ("residual", "lpips") and max(values) > 10 * min(values) > 0:
        _log_axis(ax.yaxis, subs=(1, 2, 5) if min(values) > 1e-3 else (1,))
    if measure == "residual" and min(values) < 1e-3:
        ax.set_ylim(bottom=7e-5)
    if measure == "kid" and ax.get_ylim()[1] > 50:  # some methods are far from the others
        ax.set_yscale("symlog", linthresh=10)
        ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.25, lw=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    if task:
        ax.set_ylabel(TASKS[task], fontsize=12, fontweight="bold")
    if lowest:
        ax.set_xlabel("seconds per image", fontsize=10)


def _log_axis(axis, subs=(1, 2, 5)):
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
