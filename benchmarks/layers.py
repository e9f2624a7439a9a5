"""How well are two layers and their mask found in one image?

    python benchmarks/layers.py [--numbers 1 3 5 7 9 11 13 15] [--starts 3] [--rounds 4]

Compositions of two held-out emoji (ldm/data/compositions.py) and the starts of `infer_layers` for each of them. Adds a row for each
composition to results/layers.csv and writes results/layers.md; a composition that is there already is not done again.
"""

import argparse
import csv
import time
from pathlib import Path
from statistics import mean

import torch

from ldm.checkpoints import load_model
from ldm.data.compositions import compositions
from ldm.denoisers import LatentDenoiser
from ldm.layers import colour_mask, discs, finished, infer_layers, iou, otsu_mask
from ldm.metrics import lpips_distance
from ldm.util import ROOT, atomic_write

RESULTS = ROOT / "benchmarks/results"
ROWS = {
    "iou all": "mask of ones",
    "iou disc": "disc of a fifth of the image in its middle",
    "iou starts": "the discs that it begins with, mean",
    "iou otsu": "brightness (Otsu)",
    "iou colour": "k-means of colours, the cluster nearest to a fifth of the image",
    "iou first": "layers, first round, mean over starts",
    "iou mean": "layers, mean over starts",
    "iou chosen": "layers, the start of the highest likelihood",
    "iou best": "layers, the best start (known from the truth only)",
}  # fmt: skip


def disc(x):
    """[B, 1, H, W], the disc of a fifth of the image in its middle."""
    h, w = x.shape[2:]
    i, j = torch.meshgrid(torch.arange(h) + 0.5 - h / 2, torch.arange(w) + 0.5 - w / 2, indexing="ij")
    return (i**2 + j**2 <= 0.2 * h * w / torch.pi).to(x).expand(len(x), 1, h, w)


def measure(model, D, number, starts, rounds):
    """A row: numbers of one composition."""
    begin, c = time.perf_counter(), compositions([number])
    x, seeds = c.image.expand(starts, -1, -1, -1), list(range(starts))
    states = list(infer_layers(model, D, x, seeds, rounds))
    found, best = [iou(state.mask, c.mask) for state in states], states[-1].log_likelihood.argmax()
    last = finished(model, D, x, states[-1], seeds)
    lpips = {"F": lpips_distance(last.foreground, c.foreground.expand_as(x)),
             "B": lpips_distance(last.background, c.background.expand_as(x)),
             "x": lpips_distance(c.image, c.background).expand(starts)}  # fmt: skip
    error = (last.recomposed - x).square().mean((1, 2, 3)).sqrt()
    row = {
        "number": number,
        "iou all": iou(torch.ones_like(c.mask), c.mask),
        "iou disc": iou(disc(c.image), c.mask),
        "iou starts": iou(discs(seeds, x.shape[2:]), c.mask).mean(),
        "iou otsu": iou(otsu_mask(c.image), c.mask),
        "iou colour": iou(colour_mask(c.image), c.mask),
        "iou first": found[0].mean(),
        "iou mean": found[-1].mean(),
        "iou chosen": found[-1][best],
        "iou best": found[-1].max(),
        **{f"lpips {key} mean": value.mean() for key, value in lpips.items()},
        **{f"lpips {key} chosen": value[best] for key, value in lpips.items()},
        "rms mean": error.mean(),
        "rms chosen": error[best],
        "seconds": time.perf_counter() - begin,
    }
    return {key: value if key == "number" else round(float(value), 4) for key, value in row.items()}


def table(rows):
    """results/layers.md."""
    of = lambda key: f"{mean(float(row[key]) for row in rows):.2f}".replace("0.", ".")  # noqa: E731
    each = lambda key: ", ".join(f"{float(row[key]):.2f}".replace("0.", ".") for row in rows)  # noqa: E731
    lines = [f"Compositions {', '.join(str(row['number']) for row in rows)}.", "", "| mask | IoU | each |", "|---|---|---|"]
    lines += [f"| {label} | {of(key)} | {each(key)} |" for key, label in ROWS.items()]
    lines += ["", "| | mean over starts | chosen |", "|---|---|---|"]
    for key, label in {"lpips F": "LPIPS of the foreground", "lpips B": "LPIPS of the background",
                       "lpips x": "the image as it is, as background", "rms": "recomposition, RMS"}.items():  # fmt: skip
        lines.append(f"| {label} | {of(f'{key} mean')} | {of(f'{key} chosen')} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 3, 5, 7, 9, 11, 13, 15])
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = load_model("tiny")
    D, path = LatentDenoiser(model, ""), args.out / "layers.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    for number in args.numbers:
        if str(number) in {str(row["number"]) for row in rows}:
            continue
        rows = sorted([*rows, measure(model, D, number, args.starts, args.rounds)], key=lambda row: int(row["number"]))
        with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        (args.out / "layers.md").write_text(table(rows))
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
