"""The tables of the README, of the pages and of the models' cards, from the committed results:

    python benchmarks/tables.py [--check]

There a table stands between the comments <!-- NAME --> and <!-- /NAME -->; TABLES has the function that makes it. The command
writes them all anew; with --check it names those that differ and writes nothing. Figures that the results lack are empty cells.
"""

import argparse
import json
import re
import sys

import compare_report
import rows as csv_rows
import tables_of_cards as cards
from notebook_costs import table as notebook_costs
from rows import lines, short, signed

from ldm.comparison import TASKS
from ldm.table import read_rows
from ldm.util import ROOT, atomic_write

FILES = ["README.md", "benchmarks/README.md", "notebooks/README.md", "checkpoints/tiny/README.md", "checkpoints/mnist/README.md"]
RESULTS = ROOT / "benchmarks/results"
PER_TASK = ("half", "hole", "sr4")  # the columns of the README


def markdown_tables(path):
    """{heading: [row, a dict by column]} of the tables in a results file; the heading "" where there is none before."""
    found, heading, columns = {}, "", None
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif set(cells[0]) != {"-"}:
            found.setdefault(heading, []).append(dict(zip(columns, cells, strict=True)))
    return found


def mean_of(cell):
    """The number that a cell "0.123 [0.1, 0.14]" begins with."""
    return cell.split(" ")[0] if cell else ""


# ---- the comparison


def compared(model):
    """{(method, task, budget): row} of compare.csv."""
    return {(r["method"], r["task"], int(r["budget"])): r for r in read_rows(RESULTS / "compare.csv") if r["model"] == model}


def lpips(found, method, task, budget):
    row = found.get((method, task, budget))
    return float(row["lpips"]) if row else None


def best_of(found, family, task, budget):
    """(LPIPS, label) of the best method of a family, tuned or not."""
    methods = compare_report.LINES[f"{family}, best method and setting"][0]
    values = [(value, compare_report.LABELS[m]) for m in methods if (value := lpips(found, m, task, budget)) is not None]
    return min(values, default=(None, ""))


def comparison():
    """The README's: LPIPS of the paper's loop, ours, and the best of the others."""
    tables, columns = {name: compared(name) for name in ("mnist", "tiny")}, [(m, t) for m in ("mnist", "tiny") for t in PER_TASK]
    own = [("paper's loop", "newton", 220), ("paper's loop, lr 0.1, eta 1", "newton-eta1", 220),
           ("paper's loop, tuned", "newton-tuned", 220), ("**`fast`**", "fast", 44)]  # fmt: skip
    values = {(name, n): [(lpips(tables[m], method, t, n), "") for m, t in columns] for name, method, n in own}
    families = ("back-propagating", "without Jacobian")
    for family in families:
        values[f"best {family}", 44] = [best_of(tables[m], family, t, 44) for m, t in columns]
    of_both = lambda m, t: [found for f in families if (found := best_of(tables[m], f, t, 220))[0] is not None]  # noqa: E731
    values["best measured", 220] = [min(of_both(m, t), default=(None, "")) for m, t in columns]
    least = [min((short(row[i][0]) for row in values.values() if row[i][0] is not None), default="") for i in range(len(columns))]
    body = [
        [
            f"{name}, {n}",
            *(
                (f"**{short(v)}**" if v is not None and short(v) == low else short(v)) + f" {label}"
                for (v, label), low in zip(row, least, strict=True)
            ),
        ]
        for (name, n), row in values.items()
        if any(v is not None for v, _ in row)
    ]
    heads = ["method, evaluations", *(f"{'digits' if m == 'mnist' else 'emoji'}: {t.replace('sr4', 'x4')}" for m, t in columns)]
    return lines(heads, [[str(cell).strip() for cell in row] for row in body])


def all_methods(model, budget=44):
    """LPIPS of every method at one budget: with the settings of its paper, and (tuned)."""

    def build():
        found = compared(model)
        methods = dict.fromkeys(compare_report.plain(m) for m, _, n in found if n == budget)
        tasks = [task for task in TASKS if ("fast", task, budget) in found]
        best = {
            t: min(v for m, task, n in found if (task, n) == (t, budget) and (v := lpips(found, m, t, n)) is not None)
            for t in tasks
        }

        def cell(method, task):
            values = [lpips(found, m, task, budget) for m in (method, f"{method}-tuned")]
            marked = [f"**{short(v)}**" if v == best[task] else short(v) for v in values]
            return marked[0] + (f" ({marked[1]})" if marked[1] else "")

        rank = lambda m: sum((v if (v := lpips(found, m, t, budget)) is not None else 1) for t in tasks)  # noqa: E731
        name = lambda m: "**`fast`**" if m == "fast" else compare_report.LABELS[m]  # noqa: E731
        return lines(
            ["LPIPS", *(TASKS[t] for t in tasks)], [[name(m), *(cell(m, t) for t in tasks)] for m in sorted(methods, key=rank)]
        )

    return build


def ahead(found, task, budget):
    """[(LPIPS, method)] of the others with a lower one than `fast` at the same budget."""
    ours = lpips(found, "fast", task, budget)
    others = [m for m, t, n in found if (t, n) == (task, budget) and compare_report.plain(m) != "fast"]
    return sorted((v, m) for m in others if (v := lpips(found, m, task, budget)) < ours)


def better(model):
    """Where a method has a lower LPIPS than `fast` at the same budget; the interval of the difference is in compare-MODEL.md."""

    def build():
        found, body = compared(model), []
        for task in TASKS:
            for budget in sorted({n for m, t, n in found if (m, t) == ("fast", task)}):
                if others := ahead(found, task, budget):
                    names = ", ".join(f"{compare_report.LABELS[m]} {short(v)}" for v, m in others)
                    body.append([TASKS[task], budget, short(lpips(found, "fast", task, budget)), names])
        return lines(["task", "evaluations", "`fast`", "lower"], body or [["none"] * 4])

    return build


# ---- the paper's claims


def claims():
    """Those of the abstract (version 3), and of its analysis of J, next to what was measured."""
    digits, emoji = compared("mnist"), compared("tiny")
    style = json.loads((RESULTS / "tasks.json").read_text())["style"]
    unet = re.search(r"Forward only / with backward .*: time ([\d.]+)", (RESULTS / "unet-cpu.md").read_text())[1]

    def each(methods, task, budget, key, by=None, digits_after=2):
        """Of the methods that have a row: "label value, ..."; over the same of the row `by`, or over the column `by`."""
        cells = []
        for m in methods:
            row = digits.get((m, task, budget))
            base = row[by] if isinstance(by, str) and row else digits.get(by, {}).get(key) if by else 1
            if row and base:
                cells.append(f"{compare_report.LABELS[m]} {short(float(row[key]) / float(base), digits_after)}")
        return ", ".join(cells)

    measured = {name: [not ahead(found, t, 44) for t in TASKS if ("fast", t, 44) in found] for name, found in
                (("digits", digits), ("emoji", emoji))}  # fmt: skip
    later = "not measured yet"
    half, gradient = ("half", 44), ("gradient", "half", 220)
    both = [each(["newton"], *("half", 220), "seconds", gradient), each(["fast"], *half, "seconds", gradient)]
    faster = ", ".join(filter(None, both)) or later
    body = [
        ["Back-propagation through the denoiser makes sampling much slower, and it needs much more memory",
         f"peak memory of a step over plain sampling: {each(['DPS', 'newton', 'fast'], *half, 'memory', 'memory_plain')}; "
         f"the U-Net of Stable Diffusion v1 without the backward pass takes {unet.removeprefix('0')} of the time",
         "`mnist`: `compare.py`; a CPU: `unet.py`"],
        ["Methods that enforce the constraint only locally miss long-range correlations",
         f"right half missing, 44 evaluations, label accuracy: {each(['fast', 'DDNM', 'MPGD', 'DiffPIR'], *half, 'accuracy')}",
         "`mnist`: `compare.py`"],
        ["Newton's approximation is faster than back-propagation",
         f"seconds over those of gradient steps with as many inner steps (220 evaluations): {faster}",
         "`mnist`: `compare.py`"],
        ["The results rival or surpass the best training-free methods, in a fraction of the time",
         "of the methods measured, none has a lower LPIPS than `fast` at 44 evaluations in " +
         " and ".join(f"{sum(lowest)} of {len(lowest)} tasks of the {name}" for name, lowest in measured.items()),
         "`mnist`, `tiny`: `compare.py`, which names the others"],
        ["It works for linear constraints, inpainting and super-resolution",
         "RMSE of what was measured, in [-1, 1], the paper's loop: " +
         ("; ".join(f"{TASKS[t]} {short(digits['newton', t, 220]['residual'])}" for t in PER_TASK if ("newton", t, 220) in digits)
          or later),
         "`mnist`: `compare.py`"],
        ["It works for non-linear ones, such as style",
         f"the Gram distance falls by {100 * style['gram_distance']['falls_by']:.0f} %", "`tiny`: `tasks.py --tasks style`"],
        ["The largest eigenvalues of J are those of its symmetric part", "holds: finding 4", "`tiny`: `jacobian_analysis.ipynb`"],
        ["J e keeps the shape of an object better than the gradient", "not confirmed: finding 2",
         "`tiny`: `jacobian_exact_vs_gd.ipynb`"],
        ["15 seconds instead of PSLD's 8 minutes; PSNR, LPIPS and FID on ImageNet",
         "not measurable here: it takes Stable Diffusion, ImageNet and a GPU",
         "`python -m ldm.evaluate --preset paper data=/folder model=sd-v1-4.ckpt`"],
    ]  # fmt: skip
    return lines(["the paper says", "measured", "on, by"], body)


# ---- other benchmarks


def few_steps():
    body = []
    for task, rows in markdown_tables(RESULTS / "few_steps.md").items():
        cells = {}  # three budgets of each method, in order
        for row in rows:
            cells.setdefault(row["method"], []).append((int(row["evaluations"]), short(mean_of(row["LPIPS"]))))
        budgets = [4, 8, 12]
        within = lambda found, n, low: next((v for e, v in found[::-1] if low < e <= n), "")  # noqa: E731
        for method, found in cells.items():
            body.append([f"{task}: {method}", *(within(found, n, low) for n, low in zip(budgets, [0, 4, 8], strict=True))])
    return lines(["LPIPS", "at most 4 evaluations", "8", "12"], body)


def guidance():
    (rows,) = markdown_tables(RESULTS / "guidance.md").values()
    heads = ["method", "step", "evaluations", "mIoU, second parser", "pixels right", "caption in the first 5 %", "KID"]
    digits = {"mIoU, second parser": 2, "pixels right": 2, "caption in the first 5 %": 2, "KID": 4}
    return lines(heads, [[short(mean_of(row[h]), digits[h]) if h in digits else row[h] for h in heads] for row in rows])


def multiscale():
    return [line for line in (RESULTS / "multiscale.md").read_text().splitlines() if line.startswith("|")]


def posterior():
    """Distances on the mixture, by budget, dimensions and methods."""
    found = {(int(r["d"]), int(r["d_y"]), r["method"], int(r["budget"])): r for r in csv_rows.read(RESULTS / "posterior.csv")
             if r["part"] == "mixture"}  # fmt: skip
    names = {"particles-16": "**`fast`, 16 particles**", "particles-256": "**`fast`, 256 particles**", "fast": "`fast`",
             "newton": "`newton`", "DPS": "DPS", "azula-MMPS": "MMPS (azula)", "DDNM": "DDNM"}  # fmt: skip
    columns = [(d, y) for d in (8, 80, 800) for y in (1, 2, 4)]
    two = lambda row, key: "" if row is None else f"{float(row[key]):.2f}"  # noqa: E731
    body = [["two exact draws", "", *(two(found.get((*c, "fast", 44)), "exact") for c in columns)]]
    for budget in (44, 220, 1000):
        body += [[name, budget, *(two(found.get((*c, m, budget)), "distance") for c in columns)] for m, name in names.items()]
    return lines(["method", "budget", *(f"d = {d}, d_y = {y}" for d, y in columns)], body)


def particles():
    """Samples of images with and without particles at 44 evaluations."""
    measures = ["lpips", "accuracy", "spread", "crps"]
    names = {"fast": "`fast`", "particles-4": "4 particles", "weighted-4": "4 particles, weighted"}
    body, rows = [], csv_rows.read(RESULTS / "compare_particles.csv")
    place = {key: i for i, key in enumerate(dict.fromkeys((row["model"], row["task"]) for row in rows))}
    for row in sorted(rows, key=lambda row: place[row["model"], row["task"]]):
        if row["budget"] != "44" or row["method"] not in names:
            continue
        cells = []
        for m in measures:
            value, minus = (row[m], row[f"{m}_minus"])
            cell = short(value, 2 if m == "accuracy" else 3)
            if minus:
                low, high = row[f"{m}_minus_low"], row[f"{m}_minus_high"]
                cell += f" ({signed(minus)} [{signed(low)}, {signed(high)}])"
            cells.append(cell if value not in ("", "nan") else "")
        of = {"mnist": "digits", "tiny": "emoji"}[row["model"]]
        body.append([f"{of}, {TASKS[row['task']]}, {row['images']} images: {names[row['method']]}", *cells])
    return lines(["", "LPIPS", "label accuracy", "spread", "CRPS"], body)


def tasks(*parts):
    """Of tasks.json, those of the half that is missing."""

    def build():
        found, body = json.loads((RESULTS / "tasks.json").read_text()), []
        for part, model in zip(parts, ("tiny", "tiny-flow"), strict=True):
            for name, row in found.get(part, {}).items():
                if isinstance(row, dict):
                    nfe = row.get("nfe", found[part].get("nfe"))
                    known = [f"{row[key]:.1f} dB" for key in ("known_psnr_before_blending", "known_psnr_reencoded")]
                    body.append([f"`{model}`: {name}", nfe, short(row["lpips_alex"]), *known])
        return lines(["", "evaluations", "LPIPS", "known half, PSNR", "encoded once more"], body)

    return build


def notebooks():
    return notebook_costs(csv_rows.read(RESULTS / "notebooks.csv")).splitlines()


def notebooks_run():
    """Runs of two diffusion steps on random checkpoints of full width."""
    heads = ["notebook", "device", "size", "dtype", "evaluations", "seconds", "GiB", "expected GiB"]
    return lines(heads, [[row[h] for h in heads] for row in csv_rows.read(RESULTS / "notebooks-run.csv")])


TABLES = {
    "comparison": comparison,
    "comparison of digits": all_methods("mnist"),
    "comparison of emoji": all_methods("tiny"),
    "comparison of flows": all_methods("tiny-flow"),
    "better on digits": better("mnist"),
    "better on emoji": better("tiny"),
    "better on flows": better("tiny-flow"),
    "claims": claims,
    "few steps": few_steps,
    "guidance": guidance,
    "multiscale": multiscale,
    "posterior": posterior,
    "particles": particles,
    "half missing": tasks("inpainting", "flow"),
    "costs of notebooks": notebooks,
    "runs of notebooks": notebooks_run,
    "directions": cards.directions,
    "eigenvalues": cards.eigenvalues,
    "step lengths": cards.step_lengths,
    "repeated steps": cards.repeated,
    "differences": cards.differences,
    "layers": cards.layers,
    "autoencoder": cards.tiny_autoencoder,
    "clip": cards.tiny_clip,
    "judge": cards.tiny_judge,
    "parsers": cards.tiny_parsers,
    "generation": cards.tiny_generation,
    "digits": cards.mnist_quality,
}


def filled(text):
    """The text with every table made anew. KeyError for a name that is not in TABLES."""

    def block(match):
        return "\n".join([f"<!-- {match[1]} -->", *TABLES[match[1]](), f"<!-- /{match[1]} -->"])

    return re.sub(r"<!-- ([\w -]+) -->\n.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; an error where a table differs")
    args = parser.parse_args(argv)
    for name in FILES:
        path, text = ROOT / name, (ROOT / name).read_text()
        new = filled(text)
        if new == text:
            continue
        if args.check:
            old = set(text.splitlines())
            sys.exit(f"{name} differs from the results, python benchmarks/tables.py writes it anew:\n" +
                     "\n".join(line for line in new.splitlines() if line not in old))  # fmt: skip
        with atomic_write(path) as temporary:
            temporary.write_text(new)
        print(name)


if __name__ == "__main__":
    main()
