"""Rows of results in a csv file, one setting each, to which an interrupted run goes on adding."""

import csv
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
