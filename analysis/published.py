"""Published results, from published.csv: data with their source, never typed into code."""

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("published.csv")


@dataclass(frozen=True, kw_only=True)
class Published:
    experiment: str
    miou: float  # per cent, mean over all classes
    selection: str  # how the checkpoint was chosen
    source: str


def published() -> dict[str, Published]:
    """By experiment; a result that was not found anywhere is absent."""
    with FILE.open(newline="") as file:
        rows = [Published(**{**row, "miou": float(row["miou"])}) for row in csv.DictReader(file)]  # pyright: ignore
    return {row.experiment: row for row in rows}
