"""compare.csv as a table, with paired differences, and as figures."""

import compare_tune
import foreign
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

from ldm import comparison  # noqa: E402
from ldm.comparison import TASKS  # noqa: E402
from ldm.metrics import bootstrap, interval  # noqa: E402
from ldm.table import NAMES, PER_IMAGE, evaluations, markdown, measures_in, table_head  # noqa: E402

LABELS = comparison.LABELS | {method.name: method.label for method in foreign.OTHERS.values()} | compare_tune.LABELS
LOWER_IS_BETTER = {"residual", "lpips", "kid"}
FAMILIES = {  # family: (colour in every figure, its methods)
    "fast (ours)": ("#d62728", ["fast"]),
    "the paper's loop": ("#1f4e9c", ["newton", "newton-eta1"]),
    "back-propagating": (
        "#2a8c4a",
        ["gradient", "DPS", "PSLD", "SITCOM", "azula-MMPS", "azula-TMPD", "azula-PGDM", "azula-DPS", "deepinv-PiGDM",
         "deepinv-DPS"],
    ),
    "without Jacobian": (
        "#e08214",
        ["DDNM", "MPGD", "DiffPIR", "RePaint", "LATINO", "DAPS", "ReSample", "azula-DiffPIR", "azula-RePaint", "deepinv-DDRM",
         "deepinv-DiffPIR"],
    ),
    "flows only": ("#7b3fa0", ["PnP-Flow", "FlowDPS", "FLAIR"]),
}  # fmt: skip
COLOURS = {method: colour for colour, methods in FAMILIES.values() for method in methods}
BACK_PROPAGATING = FAMILIES["back-propagating"][1]
LINES = {  # of the curves, at most six: which methods, and how they are drawn; of several methods the best one at each budget
    "fast (ours)": (["fast"], dict(lw=3, ms=7, zorder=4)),
    "the paper's loop, its settings": (["newton"], dict(lw=1.8, ms=5, zorder=3)),
    "the paper's loop, tuned": (["newton-tuned"], dict(lw=1.8, ms=5, ls=(0, (5, 1.5)), zorder=3)),
    **{
        f"{family}, best method and setting": ([*methods, *(f"{m}-tuned" for m in methods)], dict(lw=1.2, ms=3.5, zorder=2))
        for family, (_, methods) in list(FAMILIES.items())[2:]
    },
}


def plain(method):
    """The method's name without the word that says that it was tuned."""
    return method.removesuffix("-tuned")


def seconds(row):
    """NaN where they have not been measured."""
    return float(row["seconds"] or "nan")


def name_of(row):
    """A row's name where the measures of its images are kept."""
    return "{model}-{images}-{task}-{method}-{budget}".format(**row)


def report(rows, name, model, out, images):
    """compare-NAME.md and the figures of this model's rows; images: {name of a row: PER_IMAGE [5, N]} for
    paired differences, of the rows that have it."""
    rows = _most_images([row for row in rows if row["model"] == name])
    if not rows:
        return
    text = "\n".join(markdown(rows, name, model.features, LABELS) + differences(rows, images)) + "\n"
    (out / f"compare-{name}.md").write_text(text)
    curves(rows, out / f"compare-{name}.png", "evaluations")
    if any(row["seconds"] for row in rows):
        curves(rows, out / f"compare-{name}-seconds.png", "seconds")
    ranking(rows, out / f"compare-{name}-ranking.png")
    print(text)


def _most_images(rows):
    """Of rows with the same task, method and budget that with the most images; tasks in TASKS' order."""
    best = {}
    for row in sorted(rows, key=lambda row: int(row["images"])):
        best[row["task"], row["method"], row["budget"]] = row
    return sorted(best.values(), key=lambda row: list(TASKS).index(row["task"]))


def differences(rows, images):
    """Two tables of paired differences, image by image: `fast` minus `newton` at 220 evaluations, in its settings and tuned; and
    `fast` at 44 minus every other method at 44, back-propagating ones at equal time and at their dearest."""
    measures, lines = [m for m in measures_in(rows) if m in PER_IMAGE], []
    of = lambda task, test: [r for r in rows if r["task"] == task and test(r)]  # noqa: E731
    ours = sorted((r for r in rows if r["method"] == "fast"), key=lambda r: int(r["budget"]))
    ours = [r for task in TASKS for r in ours if r["task"] == task]
    pairs = [(a, b) for a in ours for b in of(a["task"], lambda r: plain(r["method"]) == "newton" and r["budget"] == "220")]
    lines += _differences("fast minus newton at 220 evaluations, paired", "", pairs, measures, images)
    pairs = []
    for a in (r for r in ours if r["budget"] == "44"):
        for method in (m for m in COLOURS if m != "fast"):
            theirs = sorted(of(a["task"], lambda r, m=method: r["method"] == m), key=evaluations)
            if method in BACK_PROPAGATING:
                equal = [r for r in theirs if seconds(r) >= 0.85 * seconds(a)][:1]
                pairs += [(a, b) for b in (equal + theirs[-1:] if equal != theirs[-1:] else equal)]
            else:
                pairs += [(a, b) for b in theirs if b["budget"] == "44"]
    note = ("Back-propagating methods at equal time (the cheapest row that takes at least .85 times as long as fast: so much do "
            "times vary from run to run) and at their dearest, the others at 44 evaluations.")  # fmt: skip
    return lines + _differences("fast at 44 evaluations minus the other methods, paired", note, pairs, measures, images)


def _differences(title, note, pairs, measures, images):
    lines = []
    for a, b in pairs:
        both = [images[name] for name in (name_of(a), name_of(b)) if name in images]
        if len(both) < 2:
            continue
        n = min(values.shape[1] for values in both)
        ours, theirs = (dict(zip(PER_IMAGE, values[:, :n].double(), strict=True)) for values in both)
        draws, cells = bootstrap(n), []
        for m in measures:
            d = ours[m] - theirs[m]
            low, high = interval(d[draws].mean(1))
            worse, better = (low > 0, high < 0) if m in LOWER_IS_BETTER else (high < 0, low > 0)
            cells.append(f"{d.mean():+.3g} [{low:+.3g}, {high:+.3g}]{' worse' if worse else ' better' if better else ''}")
        costs = [f"{evaluations(r):.0f}, {seconds(r):.3f} s" for r in (a, b)]
        lines.append(f"| {TASKS[a['task']]} | {costs[0]} | {LABELS[b['method']]}: {costs[1]} | {n} | {' | '.join(cells)} |")
    if not lines:
        return []
    return ["", f"## {title}", *(["", note] if note else []), "", *table_head("task | fast | the other | images", measures), *lines]


# ---- figures


def ranking(rows, path, budget="44", reference="220"):
    """The methods at one budget, the best on top, by LPIPS with its interval, or PSNR where LPIPS is missing: a dot with the
    settings of their papers, a ring where they were tuned. A panel for each task that at least two methods, and half as many as
    any, were run on; the dashed line is `newton` at the budget `reference`."""
    measure = "lpips" if "lpips" in measures_in(rows) else "psnr"
    panels = {t: [r for r in rows if r["task"] == t and r["budget"] == budget] for t in TASKS}
    panels = {t: _by_method(found, measure) for t, found in panels.items()}
    most, lines = max(map(len, panels.values())), {}
    panels = {t: found for t, found in panels.items() if len(found) > 1 and 2 * len(found) >= most}
    if not panels:
        return
    fig, axes = _panels(len(panels), 4.7, 0.21 * most + 0.7)
    for ax, (task, found) in zip(axes, panels.items(), strict=True):
        for y, (method, both) in enumerate(found.items()):
            for r in both:
                value, low, high = (float(r[measure + end]) for end in ("", "_low", "_high"))
                face = COLOURS[method] if r["method"] == method else "white"
                ax.plot([low, high], [y, y], color=COLOURS[method], lw=2, alpha=0.35, zorder=1)
                ax.plot(value, y, "o", color=COLOURS[method], mfc=face, ms=9 if method == "fast" else 5.5)
        for r in rows:
            if (r["task"], r["budget"]) == (task, reference) and r["method"] == "newton":
                line = ax.axvline(float(r[measure]), color=COLOURS["newton"], ls=(0, (4, 3)), lw=1)
                lines[f"the paper's loop, {reference} evaluations"] = line
        ax.set_yticks(range(len(found)), [LABELS[method] for method in found], fontsize=8.5)
        for label, method in zip(ax.get_yticklabels(), found, strict=True):
            label.set(color=COLOURS[method], fontweight="bold" if method == "fast" else "normal")
        values = [float(r[measure]) for both in found.values() for r in both]
        if max(values) > 10 * min(values) > 0:
            _log_axis(ax.xaxis)
        ax.set_ylim(len(found) - most - 0.6, len(found) - 0.4)
        ax.set_title(TASKS[task], fontsize=11, fontweight="bold")
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", alpha=0.25, lw=0.5)
        ax.spines[["top", "right", "left"]].set_visible(False)
    present = {method for found in panels.values() for method in found}
    families = {family: colour for family, (colour, methods) in FAMILIES.items() if present & set(methods)}
    handles = [plt.Line2D([], [], color=colour, marker="o", lw=2) for colour in families.values()]
    ring = plt.Line2D([], [], color="black", marker="o", mfc="white", lw=0)
    fig.legend(
        [*handles, ring, *lines.values()],
        [*families, "tuned on other images", *lines],
        loc="outside lower center",
        ncols=min(3, len(panels)) + 1,
        frameon=False,
        fontsize=9,
    )
    fig.suptitle(f"{NAMES[measure]} at {budget} evaluations of the network{_direction(measure)}", fontsize=12)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _by_method(rows, measure):
    """{method: its rows, as it is and tuned}, the best method last."""
    found = {}
    for row in rows:
        found.setdefault(plain(row["method"]), []).append(row)
    best = min if measure in LOWER_IS_BETTER else max
    quality = {method: best(float(row[measure]) for row in both) for method, both in found.items()}
    return {method: found[method] for method in sorted(found, key=quality.get, reverse=measure in LOWER_IS_BETTER)}


def curves(rows, path, against):
    """LPIPS (PSNR where it is missing) against "evaluations" or "seconds" per image: LINES. A panel for each task that `fast` was
    run on at several budgets, or for all tasks if there is none."""
    measure = "lpips" if "lpips" in measures_in(rows) else "psnr"
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    budgets = {task: len({row["budget"] for row in rows if (row["task"], row["method"]) == (task, "fast")}) for task in tasks}
    tasks = [task for task in tasks if budgets[task] > 1] or tasks
    fig, axes = _panels(len(tasks), 4.4, 3.2)
    for ax, task in zip(axes, tasks, strict=True):
        for label, (style, points) in _curves_of([row for row in rows if row["task"] == task], measure, against).items():
            x, y, low, high = zip(*points, strict=True)
            ax.plot(x, y, marker="o", label=label, **style)
            if label in list(LINES)[:1]:
                ax.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
        _log_axis(ax.xaxis)
        values = [value for line in ax.lines for value in line.get_ydata()]
        if values and max(values) > 5 * min(values) > 0:
            _log_axis(ax.yaxis)
        ax.set_title(TASKS[task], fontsize=11, fontweight="bold")
        ax.grid(alpha=0.25, lw=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    what = {"evaluations": "evaluations, backward passes too", "seconds": "seconds"}[against]
    for ax in axes[-3:]:
        ax.set_xlabel(f"{what}, per image", fontsize=10)
    handles = dict(pair[::-1] for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True))
    handles = {label: handles[label] for label in LINES if label in handles}
    fig.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=min(3, len(tasks)),
        frameon=False,
        fontsize=9,
        handlelength=3.2,
    )
    fig.suptitle(f"{NAMES[measure]} against {against} per image{_direction(measure)}", fontsize=12)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _curves_of(rows, measure, against):
    """{label: (style, [(cost, value, low, high) of each budget, cheapest first])} of the rows of one task."""
    found, best = {}, min if measure in LOWER_IS_BETTER else max
    cost = evaluations if against == "evaluations" else seconds
    rows = [row for row in rows if cost(row) == cost(row)]  # no NaN
    for label, (methods, style) in LINES.items():
        own = [row for row in rows if row["method"] in methods]
        budgets = [[row for row in own if row["budget"] == budget] for budget in {row["budget"] for row in own}]
        chosen = [best(same, key=lambda row: float(row[measure])) for same in budgets]
        points = sorted((cost(row), *(float(row[measure + end]) for end in ("", "_low", "_high"))) for row in chosen)
        if points:
            found[label] = style | dict(color=COLOURS[plain(methods[0])]), points
    return found


def _panels(count, width, height):
    """A figure with so many panels, at most three next to each other, width x height inches each."""
    across = min(3, count)
    down = -(-count // across)
    fig, axes = plt.subplots(down, across, figsize=(width * across, height * down + 0.9), squeeze=False, layout="constrained")
    for ax in axes.flat[count:]:
        ax.axis("off")
    return fig, axes.flat[:count]


def _direction(measure):
    return f", {'lower' if measure in LOWER_IS_BETTER else 'higher'} is better"


def _log_axis(axis, subs=(1, 2, 5)):
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
