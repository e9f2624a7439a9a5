"""The table of a comparison: one csv row per model, task, method, budget and number of images, and its Markdown."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ldm.metrics import lpips_weights
from ldm.util import atomic_write

Row: TypeAlias = Mapping[str, Any]  # value by column
PER_IMAGE = ["residual", "psnr", "ssim", "lpips", "accuracy"]  # one number per image; the others are of the whole set
MEASURES = [*PER_IMAGE, "kid", "fid", "kid_inception"]  # FID without interval
NAMES = {"residual": "measurement RMSE", "psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "accuracy": "label accuracy",
         "kid": "KID", "fid": "FID", "kid_inception": "KID, Inception"}  # fmt: skip
KEY = ["model", "task", "method", "budget", "images"]  # what tells one row from another
COSTS = ["nfe_forward", "nfe_backward", "seconds", "memory", "memory_plain"]
COLUMNS = KEY + COSTS + [measure + end for measure in MEASURES for end in ("", "_low", "_high")]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a table, dicts of strings; none if there is no file. To have a row made anew, delete its line."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="") as file:
        return [dict.fromkeys(COLUMNS, "") | row for row in csv.DictReader(file)]


def in_table(path: str | Path, key: Row) -> bool:
    return any(all(row[k] == str(v) for k, v in key.items()) for row in read_rows(path))


def append_row(path: str | Path, row: Row) -> None:
    """Add a row. Numbers keep five digits, None is an empty cell."""
    _write(path, [*read_rows(path), _cells(row)])


def put_row(path: str | Path, row: Row) -> None:
    """Add a row, in the place of the one with the same KEY."""
    others = [other for other in read_rows(path) if any(other[k] != str(row[k]) for k in KEY)]
    _write(path, [*others, _cells(row)])


def _cells(row):
    return {k: f"{v:.5g}" if isinstance(v, float) else "" if v is None else v for k, v in row.items()}


def _write(path, rows):
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def measures_in(rows: Sequence[Row]) -> list[str]:
    """Those of MEASURES that some row has a number of."""
    return [m for m in MEASURES if any(row[m] not in ("", "nan") for row in rows)]


def markdown(rows: Sequence[Row], title: str, features: str, labels: Mapping[str, str]) -> list[str]:
    """The lines of a table for each task of the rows, cheapest first. features: in words, what KID is measured in; labels: of the
    tasks and methods by name."""
    measures, counts = measures_in(rows), sorted({int(row["images"]) for row in rows})
    images = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    lines = [f"# {title}, {images} images", "",
             "Mean [95 % bootstrap interval over the images]. Evaluations: of the network, per image, forward + backward. "
             "MiB: peak memory of one diffusion step, and its ratio to a step without constraint. Measurement RMSE: over the known "
             f"pixels, or what else was measured. KID: in {features}."]  # fmt: skip
    if "lpips" not in measures and lpips_weights() is None:
        lines += ["LPIPS is left out: AlexNet's weights are missing (make data-lpips)."]
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += ["", f"## {labels.get(task, task)}", ""]
        lines += table_head("method | images | evaluations | s per image | MiB per image", measures)
        for row in sorted((r for r in rows if r["task"] == task), key=evaluations):
            backward = f" + {float(row['nfe_backward']):.0f}" if float(row["nfe_backward"]) else ""
            memory, without = (float(row[k] or "nan") for k in ("memory", "memory_plain"))
            cells = [labels.get(row["method"], row["method"]), row["images"],
                     f"{float(row['nfe_forward']):.0f}{backward}", row["seconds"] and f"{float(row['seconds']):.3f}",
                     f"{memory:.2f} (x {memory / without:.2f})"]  # fmt: skip
            cells += [_with_interval(row, m) for m in measures]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _with_interval(row, measure):
    value, low, high = (row[measure + end] for end in ("", "_low", "_high"))
    return f"{float(value or 'nan'):.3g}" + (f" [{float(low):.3g}, {float(high):.3g}]" if low else "")


def table_head(columns: str, measures: Sequence[str]) -> list[str]:
    """The two lines that begin a Markdown table."""
    heads = [*columns.split(" | "), *(NAMES[m] for m in measures)]
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]


def evaluations(row: Row) -> float:
    """Forward and backward evaluations per image."""
    return float(row["nfe_forward"]) + float(row["nfe_backward"])
