"""Rows of results: in a csv file, one setting each, to which an interrupted run goes on adding; and as a Markdown table."""

import csv
import re
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none if it is not there."""
    return list(csv.DictReader(path.open(newline=""))) if path.is_file() else []


def append(path: Path, row: dict, columns: list[str]) -> None:
    """Add a row, and the header before the first one. Floats get four digits; columns that the row lacks stay empty."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def short(value, digits=3):
    """0.1234 -> ".123"; "" where there is nothing."""
    return "" if value in (None, "", "nan") else re.sub(r"^(-?)0\.", r"\1.", f"{float(value):.{digits}f}")


def signed(value):
    """0.1234 -> "+.123"."""
    return re.sub(r"^(.)0\.", r"\1.", f"{float(value):+.3f}")


def percent(value, digits=1):
    return "" if value is None else f"{100 * value:.{digits}f} %"


def lines(heads, body):
    """A Markdown table, without the columns that are empty."""
    kept = [i for i in range(len(heads)) if any(row[i] != "" for row in body)]
    return [f"| {' | '.join(str(row[i]) for i in kept)} |" for row in (heads, ["---"] * len(heads), *body)]
