"""Tables of tables.py: of the models' cards, from their quality.json, and of the notebooks' findings, from what they printed."""

import json
import re

import rows as csv_rows
from rows import lines, percent, short

from ldm.util import ROOT

# ---- cards


def card(path):
    return json.loads((ROOT / "checkpoints" / path / "quality.json").read_text())


def tiny_autoencoder():
    names = {"names": "held-out names", "pairs": "held-out pairs", "held_out": "held-out names in the first two styles",
             "sample": "the 32 of them in the repository"}  # fmt: skip
    found = card("tiny")["autoencoder"]
    body = [[label, r["images"], f"{r['psnr']:.1f} dB", *(short(r.get(k)) for k in ("ssim", "lpips_alex", "moved_by_5_percent"))]
            for key, label in names.items() if (r := found.get(key))]  # fmt: skip
    return lines(["images of", "number", "PSNR", "SSIM", "LPIPS-Alex", "moved by 5 %"], body)


def tiny_clip():
    names = {"held_out": "held-out images", "training": "training images"}
    found = card("tiny")["clip"]
    body = [[label, found[key]["names"], *(percent(found[key][k]) for k in ("top_1", "top_10", "top_5_percent"))]
            for key, label in names.items()]  # fmt: skip
    return lines(["", "names", "first", "among the first 10", "among the first 5 %"], body)


def tiny_judge():
    names = {"names": "held-out names", "pairs": "held-out pairs"}
    found = card("tiny")["judge"]
    body = [[label, found[key]["images"], *(percent(found[key].get(k)) for k in ("category", "top_1", "top_5"))]
            for key, label in names.items()]  # fmt: skip
    return lines(["", "images", "category", "name is the first", "among the first five"], body)


def tiny_parsers():
    names = {"names": "held-out names", "pairs": "held-out pairs"}
    found = card("tiny")["parsers"]
    body = [[label, found["by_rules"][key]["images"],
             *(percent(found[parser][key][k]) for parser in ("tiny-parser", "by_rules") for k in ("miou", "pixels"))]
            for key, label in names.items()]  # fmt: skip
    return lines(["", "images", "parser: mIoU", "pixels", "rules: mIoU", "pixels"], body)


def tiny_generation():
    found = card("tiny")["generation"]
    names = {"tiny": "`tiny`", "tiny-flow": "`tiny-flow`", "real": "real images of the same captions"}
    spread = lambda pair: "" if pair is None else f"{pair[0]:.4f} ± {pair[1]:.4f}"  # noqa: E731
    body = []
    for key, label in names.items():
        r = found[key]
        judged = [percent(r.get(k)) for k in ("judge_top_5", "judge_top_5_of_the_sheet")] + [spread(r.get("judge_kid_to_held_out"))]
        body.append([label, *judged, percent(r["top_5_percent"]), spread(r["kid_to_held_out"])])
    if "held_out_pairs" in found:
        body.append(["held-out drawings of known names", percent(found["held_out_pairs"]["judge_top_5"]), "", "", "", ""])
    heads = ["", "judge: name in its first five", "the same, the 64 above", "KID by the judge", "CLIP: caption in its first 5 %",
             "KID by CLIP"]  # fmt: skip
    return lines(heads, body)


def mnist_quality():
    q = card("mnist")
    of, real = q["samples_by_eta"], q["kid_training_digits_to_test"]
    each = lambda key, shown: [shown(values[key]) for values in of.values()]  # noqa: E731
    kid = lambda v: f"{v[0]:.2f} ± {v[1]:.2f}"  # noqa: E731
    heads = ["", *(f"samples, eta = {eta}" for eta in of), "real digits"]
    body = [
        ["classified with a probability of at least 0.9", *each("top_probability_at_least_0.9", percent),
         f"{percent(q['test_digits_top_probability_at_least_0.9'])} (test digits)"],
        ["kernel distance (KID) to the test digits, in the classifier's features", *each("kid_to_test", kid),
         f"{kid(real)} (as many training digits)"],
        ["distance of the background from black, RMS in [-1, 1]", *each("background_rms", short), "0"],
        ["share of each digit, 0 to 9", *each("share_of_each_digit", lambda v: ", ".join(f"{100 * s:.1f}" for s in v) + " %"), ""],
    ]  # fmt: skip
    return lines(heads, body)


# ---- what notebooks printed


def printed(path):
    """All that the cells of a committed notebook printed."""
    cells = json.loads((ROOT / path).read_text())["cells"]
    return "".join("".join(out.get("text", "")) for cell in cells for out in cell.get("outputs", []))


PAIR = r"([\d.]+) \+- ([\d.]+)"


def directions():
    """jacobian_exact_vs_gd: J e and J^T e on one image."""
    text, body = printed("stable-diffusion/jacobian_exact_vs_gd.ipynb"), []
    cell = lambda value, spread: " ± ".join(short(v, 2 if float(value) > 0.05 else 3) for v in (value, spread))  # noqa: E731
    for row in re.finditer(rf"^(.+?) +(?:{PAIR} *){{4}}$", text, re.MULTILINE):
        body.append([row[1].replace("|", "\\|"), *(cell(*pair) for pair in re.findall(PAIR, row[0]))])
    steps = re.findall(rf"^t = (\d+), (.+?) +known half {PAIR}, hidden half {PAIR}$", text, re.MULTILINE)
    for half, at in (("known", 2), ("hidden", 4)):
        for direction in dict.fromkeys(step[1] for step in steps):
            own = [cell(*step[at : at + 2]) for step in steps if step[1] == direction]
            body.append([f"one step along {direction}: error of the {half} half, after / before", *own])
    return lines(["", *(f"t = {t}" for t in dict.fromkeys(step[0] for step in steps))], body)


def eigenvalues():
    """jacobian_analysis: the largest |mu|, next to the paper's."""
    text = printed("stable-diffusion/jacobian_analysis.ipynb")
    printed_there = {"J": "16.85, 8.45, 7.88, 4.98", "symmetric": "16.44, 8.65, 9.00, 6.52", "skew": "2.67, 3.35, 2.51, 1.22"}
    body = [["Stable Diffusion v1.5, printed in the paper", *printed_there.values(), ""]]
    for model in dict.fromkeys(re.findall(r"^(\S+) +symmetric ", text, re.MULTILINE)):
        row = [f"`{model}`"]
        for kind in (*printed_there, "|J - J^T|/|J|"):
            line = re.search(rf"^{model} +{re.escape(kind)} .*$", text, re.MULTILINE)[0]
            row.append(", ".join(short(mean, 2) for mean, _ in re.findall(PAIR, line)))
        body.append(row)
    return lines(["", "$J$", "$(J + J^\\top)/2$", "$(J - J^\\top)/2$", "$\\lvert J - J^\\top\\rvert / \\lvert J\\rvert$"], body)


def step_lengths():
    """jacobian_analysis: the paper's study of step lengths."""
    text = printed("stable-diffusion/jacobian_analysis.ipynb")
    found = re.findall(r"^(.+?) +error ([\d.e+]+) at first, ([\d.e+]+) at the end, NFE (\d+)$", text, re.MULTILINE)
    return lines(["step length", "evaluations", "error at first", "at the end"], [[name, n, a, b] for name, a, b, n in found])


def differences():
    """jacobian_study: the h with the least error of J e."""
    text, rows = printed("notebooks/jacobian_study.ipynb"), {}
    for model, arithmetic, error, h in re.findall(
        r"^(\w+): (float.*?|bfloat16) *least error ([\d.e-]+) at h = ([\d.]+)$", text, re.MULTILINE
    ):
        rows.setdefault(arithmetic, {})[model] = f"{h}: {100 * float(error):.2g} %"
    models = list(next(iter(rows.values())))
    return lines(["", *(f"`{m}`" for m in models)], [[arithmetic, *(row[m] for m in models)] for arithmetic, row in rows.items()])


def repeated():
    """jacobian_study: what five steps leave of the residual."""
    text = printed("notebooks/jacobian_study.ipynb")
    found = re.findall(rf"^(\w+), t = (\d+): (.+?) +{PAIR} after 5 steps$", text, re.MULTILINE)
    times = list(dict.fromkeys(t for _, t, *_ in found))
    body = {}
    for model, _, direction, value, spread in found:
        body.setdefault(f"`{model}`: {direction}", []).append(f"{short(value, 2)} ± {short(spread, 2)}")
    return lines(["", *(f"t = {t}" for t in times)], [[name, *cells] for name, cells in body.items()])


def layers():
    """Two layers and a mask: intersection over union."""
    names = {"all": "all ones", "starts": "the discs that it begins with, mean", "otsu": "brightness (Otsu)",
             "colour": "k-means of colours", "disc": "a disc in the middle", "mean": "layers: mean over starts",
             "chosen": "the start of the highest likelihood", "best": "the best start, known from the truth only"}  # fmt: skip
    rows = csv_rows.read(ROOT / "benchmarks/results" / "layers.csv")
    return lines(
        ["mask", "IoU"],
        [[label, short(sum(float(row[f"iou {key}"]) for row in rows) / len(rows), 2)] for key, label in names.items()],
    )
